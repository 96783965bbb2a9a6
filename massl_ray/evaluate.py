"""massl-ray evaluate WHAT ...: what features are worth, of runs and of what could be used instead, in one table."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from massl_ray.config import Config, OwnFlags
from massl_ray.errors import UserError
from massl_ray.shown import in_a_line

if TYPE_CHECKING:
    from massl_ray.data.listing import Listing
    from massl_ray.evaluation.split_features import Compute
    from massl_ray.evaluation.subjects import Subject

HELP = """usage: massl-ray evaluate WHAT [WHAT ...] [--data.source TRAIN] [--test SOURCE] [--protocols LIST] [--transfer SOURCE ...]

Measure what frozen features are worth, each figure with its 95 % interval. Several WHATs are put side by side. WHAT is

  a run directory            its latest checkpoint; or a checkpoint's folder step_N
  a folder or file           that massl-ray export wrote
  a weights file             .safetensors, .pth or .pt, with --backbone NAME: of DINO, iBOT, supervised training and others
  a timm model name          with timm's weights; untrained:NAME without
  untrained:RUN              a run's backbone before the first step
  python:MODULE:CALLABLE     a module of your own that maps (n, C, H, W) to (n, D); your code is run
  pixels                     the images themselves, at 32 px

  --data.source TRAIN  labelled images [those of the first run; else demo]; any source of massl-ray train
  --test SOURCE        test images, with classes that train has [a tenth of train, held out]; the same as --data.test_source
  --protocols LIST     of knn, linear, lowshot, retrieval, clustering, quality, with commas; or all [knn]
  --transfer SOURCE .. several data sets instead of one, in one table
  --backbone NAME      of weights files that do not say their architecture
  --ks LIST            neighbours of knn [10,20,100,200]
  --seed N             of held-out parts, draws and intervals [0]
  --out DIR            where eval files go; without it into the run's eval/, and into its report.html
  --fresh              compute features anew, even if this machine keeps them from before
  --json               for programs

Of the settings of massl-ray train these matter: data.*, eval.knn_temp, eval.max_images, and, instead of what WHAT was made for,
views.global_size, eval.crop, data.mean, data.std, train.precision. train.device: where features are computed.

Exit code 0: done; 1: it failed; 2: a mistake in what was asked for."""


@dataclass(frozen=True)
class Data:
    """A data set with its two sides."""

    name: str
    train: "Listing"
    test: "Listing"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments or not arguments:
        print(HELP)
        return 0 if arguments else 2
    try:
        given, settings = read_arguments(arguments)
        return evaluate(given, settings)
    except UserError as error:
        print(f"massl-ray: {error}" + ("" if str(error).endswith(".") else "."), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def read_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own flags, and the settings. Raises UserError."""
    parser = OwnFlags("massl-ray evaluate")
    parser.add_argument("what", nargs="*")
    parser.add_argument("--test")
    parser.add_argument("--protocols", default="knn")
    parser.add_argument("--transfer", nargs="+", default=[])
    parser.add_argument("--backbone")
    parser.add_argument("--ks", type=_numbers, default=[10, 20, 100, 200])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--json", action="store_true")
    given, settings = parser.read(arguments)
    if not given.what:
        raise UserError("There is nothing to evaluate: name a run directory, for instance. See --help.")
    return given, settings + (["--data.test_source", given.test] if given.test else [])


def evaluate(given: argparse.Namespace, settings: list[str]) -> int:
    from massl_ray.evaluation.protocols import check_labels, check_neighbours, read_protocols  # late: torch takes seconds to import

    names = read_protocols(given.protocols)
    from massl_ray.evaluation.asked import read_config
    from massl_ray.reporting.tables import print_tables

    config, asked = read_config(given.what, settings)
    sets = [open_data(source, config, asked, given) for source in given.transfer or [config.data.source]]
    for data in sets:
        check_labels(names, data.train, data.test)
        check_neighbours(names, given.ks, data.train)
    subjects = [open_what(what, given.backbone, config, asked) for what in given.what]
    options = {"ks": given.ks, "temperature": config.eval.knn_temp, "seed": given.seed}
    runs = [subject.facts["run"] for subject in subjects if "run" in subject.facts]
    records: list[dict[str, Any]] = []
    written: list[str] = []
    with ExitStack() as stack:
        compute = _compute(config, stack)
        for data in sets:
            for subject in subjects:
                records.append(measure(subject, data, names, options, config, compute, given.fresh))
                written += keep(records[-1], runs, given.out)
    if given.out is None:
        for run in dict.fromkeys(runs):
            report(run)
    if given.json:
        print(json.dumps({"records": records, "written": written}, indent=2))
    else:
        print_tables(records)
        for path in written:
            say(f"Written   {path}")
    return 0


def open_data(source: str, config: Config, asked: dict[str, Any], given: argparse.Namespace) -> Data:
    from massl_ray.evaluation.sides import open_sides

    test = None if given.transfer else config.data.test_source
    limit = config.eval.max_images if "max_images" in asked.get("eval", {}) else None
    return Data(os.path.basename(source.rstrip("/")) or source, *open_sides(source, test, config.data.cache_gb, limit))


def open_what(what: str, backbone: str | None, config: Config, asked: dict[str, Any]) -> "Subject":
    from massl_ray.evaluation.subjects import PIXELS, open_subject

    def over(section: str, key: str, otherwise: Any = None) -> Any:
        return getattr(getattr(config, section), key) if key in asked.get(section, {}) else otherwise

    if what == PIXELS:
        return open_subject(what, config=config)
    return open_subject(
        what,
        backbone=backbone,
        size=over("views", "global_size"),
        crop=over("eval", "crop"),
        mean=over("data", "mean", ()),
        std=over("data", "std", ()),
        precision=over("train", "precision"),
        config=config,
    )


def measure(
    subject: "Subject",
    data: Data,
    names: Sequence[str],
    options: dict[str, Any],
    config: Config,
    compute: "Compute",
    fresh: bool,
) -> dict[str, Any]:
    """A record of all protocols for one subject on one data set. Raises UserError."""
    from massl_ray.evaluation.protocols import run_protocol
    from massl_ray.evaluation.records import data_facts, to_record
    from massl_ray.evaluation.split_features import split_features
    from massl_ray.reporting.progress import counted

    splits, bad = [], []
    for images in (data.train, data.test):
        say(f"{subject.name}: features of {len(images):,} images of {images.root}")
        split, unreadable = split_features(subject, images, config.data, compute, counted=counted, fresh=fresh)
        splits.append(split)
        bad += unreadable
        if len(unreadable) > config.data.max_skipped * len(images):
            raise UserError(
                f"{len(unreadable):,} of {len(images):,} images of {images.root} cannot be read, more than data.max_skipped "
                f"{config.data.max_skipped:g} allows (first: {unreadable[0]}). Mend or remove them, or raise data.max_skipped."
            )
    if bad:
        say(f"{len(bad):,} images cannot be read and are left out, the first {bad[0]}")
    results = []
    for name in names:
        say(f"{subject.name}: {name}")
        results.append(run_protocol(name, splits[0], splits[1], options))
    return to_record(subject, data_facts(data.name, data.train, data.test, bad), results)


def keep(record: dict[str, Any], runs: Sequence[str], out: str | None) -> list[str]:
    """Write a record: to --out; else to its own run, or to the first of the runs if it is of none. Returns where it is."""
    from massl_ray.evaluation.records import write_record
    from massl_ray.storage import Folder, reason

    run = record["from"].get("run") or next(iter(runs), None)
    if out is None and run is None:
        return []
    folder = Folder(out) if out is not None else Folder(str(run)) / "eval"
    try:
        return [f"{folder}/{write_record(folder, record)}"]
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({reason(error)}). Choose another place with --out.") from None


def report(run: str) -> None:
    """Write a run's report.html anew, if it lies on this machine."""
    from massl_ray.reporting.html import write_report
    from massl_ray.storage import Folder

    folder = Folder(run)
    if folder.is_local and (folder.path / "config.toml").is_file():
        write_report(folder.path)


def say(text: str) -> None:
    print(in_a_line(text), file=sys.stderr)


def _compute(config: Config, stack: ExitStack) -> "Compute":
    """Over the cluster that RAY_ADDRESS names; on this machine where it names none."""
    if os.environ.get("RAY_ADDRESS"):
        from massl_ray.on_ray.cluster import cluster
        from massl_ray.on_ray.features import over_cluster

        stack.enter_context(cluster())
        return over_cluster
    import torch

    from massl_ray.evaluation.split_features import here

    wanted = config.train.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but there is no GPU here: leave it out.")
    return here(torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"))


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return numbers


if __name__ == "__main__":
    sys.exit(main())
