"""massl-ray evaluate WHAT ...: what features are worth, of runs and of what could be used instead, in one table."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from massl_ray.config import Config, OwnFlags
from massl_ray.errors import UserError
from massl_ray.shown import in_a_line

if TYPE_CHECKING:
    from massl_ray.evaluation.measuring import Measurer, Sides
    from massl_ray.evaluation.subjects import Subject

HOLD_OUT = "-"  # as a test source: a tenth of train

HELP = """usage: massl-ray evaluate WHAT [WHAT ...] [--data.source TRAIN] [--test SOURCE] [--protocols LIST] [--transfer SOURCE ...]
                          [--landmarks DIR] [--clips DIR]

Measure what frozen features are worth, each figure with its 95 % interval. Several WHATs are put side by side. WHAT is

  a run directory            its latest checkpoint; or a checkpoint's folder step_N
  a folder or file           that massl-ray export wrote
  a weights file             .safetensors, .pth or .pt, with --backbone NAME: of DINO, iBOT, supervised training and others
  a timm model name          with timm's weights; untrained:NAME without
  untrained:RUN              a run's backbone before the first step, its running statistics adapted to the run's images; that of
                             untrained:NAME are adapted to the train images
  python:MODULE:CALLABLE     a module of your own that maps (n, C, H, W) to (n, D); your code is run
  pixels                     the images themselves, at 32 px

  --data.source TRAIN  labelled images [those of the first run; else demo]; any source of massl-ray train
  --test SOURCE        test images, with classes that train has [a tenth of train, held out]; the same as --data.test_source
  --protocols LIST     of knn, linear, lowshot, retrieval, clustering, robustness, quality, copies, with commas; or all, which
                       is all but copies [knn, unless --landmarks or --clips is given]
  --transfer SOURCE .. several data sets instead of one, a table each; --test then takes one for each of them, or - to hold out
  --landmarks DIR      image retrieval on revisited Oxford or Paris: a folder with jpg and gnd_*.pkl
  --clips DIR          video object segmentation on DAVIS, or what lies as it does
  --backbone NAME      of weights files that do not say their architecture
  --ks LIST            neighbours of knn [1,10,20,100,200]
  --augment N          linear: trained on N random crops of each image instead of the centred view [0]
  --seed N             of held-out parts, draws and intervals [0]
  --out DIR            where eval files go; without it into the run's eval/, and into its report.html
  --fresh              compute features anew, even if this machine keeps them from before
  --json               for programs

Of the settings of massl-ray train these matter: data.*, eval.knn_temp, eval.max_images, and, instead of what WHAT was made for,
views.global_size, eval.crop, data.mean, data.std, train.precision. train.device: where features are computed.

Exit code 0: done; 1: it failed; 2: a mistake in what was asked for."""


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
    parser.add_argument("--test", nargs="+", default=[])
    parser.add_argument("--protocols")
    parser.add_argument("--transfer", nargs="+", default=[])
    parser.add_argument("--landmarks")
    parser.add_argument("--clips")
    parser.add_argument("--backbone")
    parser.add_argument("--ks", type=_numbers, default=[1, 10, 20, 100, 200])
    parser.add_argument("--augment", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--json", action="store_true")
    given, settings = parser.read(arguments)
    if not given.what:
        raise UserError("There is nothing to evaluate: name a run directory, for instance. See --help.")
    if given.augment < 0:
        raise UserError(f"--augment is {given.augment}; give a number of crops, or 0 for none.")
    wanted = len(given.transfer) or 1
    if given.test and len(given.test) != wanted:
        raise UserError(f"--test names {len(given.test)} sources, and there are {wanted} of train images: give one for each, or -.")
    if given.protocols is None and not given.landmarks and not given.clips:
        given.protocols = "knn"
    return given, settings


def evaluate(given: argparse.Namespace, settings: list[str]) -> int:
    from massl_ray.evaluation.protocols import check_labels, check_neighbours, read_protocols  # late: torch takes seconds to import

    names = [] if given.protocols is None else read_protocols(given.protocols)
    from massl_ray.evaluation.asked import read_config
    from massl_ray.evaluation.clips import open_clips
    from massl_ray.evaluation.landmarks import open_landmarks
    from massl_ray.evaluation.measuring import Measurer
    from massl_ray.reporting.tables import print_tables

    config, asked = read_config(given.what, settings)
    sets = open_sets(given, config, asked) if names else []
    for data in sets:
        check_labels(names, data.train, data.test)
        check_neighbours(names, given.ks, data.train)
    todo = [partial(Measurer.on_sides, data=data, names=names) for data in sets]
    if given.landmarks:
        todo.append(partial(Measurer.on_landmarks, name=names_of([given.landmarks])[0], landmarks=open_landmarks(given.landmarks)))
    if given.clips:
        size = config.views.global_size if "global_size" in asked.get("views", {}) else None
        todo.append(partial(Measurer.on_clips, name=names_of([given.clips])[0], clips=open_clips(given.clips), size=size))
    subjects = [open_what(what, given.backbone, config, asked) for what in given.what]
    runs = [subject.facts["run"] for subject in subjects if "run" in subject.facts]
    records: list[dict[str, Any]] = []
    written: list[str] = []
    with ExitStack() as stack:
        measurer = _measurer(given, config, stack)
        for measure in todo:
            for subject in subjects:
                records.append(measure(measurer, subject))
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


def open_sets(given: argparse.Namespace, config: Config, asked: dict[str, Any]) -> "list[Sides]":
    """Train and test images of each data set that is asked for. Raises UserError."""
    from massl_ray.evaluation.measuring import Sides
    from massl_ray.evaluation.sides import open_sides

    sources = given.transfer or [config.data.source]
    tests = given.test or [None if given.transfer else config.data.test_source] * len(sources)
    limit = config.eval.max_images if "max_images" in asked.get("eval", {}) else None
    return [
        Sides(name, *open_sides(source, None if test == HOLD_OUT else test, config.data.cache_gb, limit))
        for name, source, test in zip(names_of(sources), sources, tests, strict=True)
    ]


def names_of(sources: Sequence[str]) -> list[str]:
    """Their last parts, and as many before them as tell them apart."""
    parts = [source.rstrip("/").split("/") for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) or source for part, source in zip(parts, sources, strict=True)]
        if len(set(names)) == len(set(sources)):
            return names
    return list(sources)


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


def _measurer(given: argparse.Namespace, config: Config, stack: ExitStack) -> "Measurer":
    """Features are computed over the cluster that RAY_ADDRESS names; on this machine where it names none."""
    import torch

    from massl_ray.evaluation.measuring import Measurer
    from massl_ray.evaluation.split_features import here
    from massl_ray.reporting.progress import counted

    wanted = config.train.device
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if wanted != "cpu" and has_gpu else "cpu")
    if os.environ.get("RAY_ADDRESS"):
        from massl_ray.on_ray.cluster import cluster
        from massl_ray.on_ray.features import over_cluster

        stack.enter_context(cluster())
        compute = over_cluster
    elif wanted == "cuda" and not has_gpu:
        raise UserError("train.device is cuda, but there is no GPU here: leave it out.")
    else:
        compute = here(device)
    options = {"ks": given.ks, "temperature": config.eval.knn_temp, "augment": given.augment, "seed": given.seed}
    return Measurer(config, compute, device, options, say, counted, given.fresh)


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return numbers


if __name__ == "__main__":
    sys.exit(main())
