"""massl-ray sweep SPEC.toml: many runs over the points of a space, and which of them to choose."""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from massl_ray.config import Config, load, read_flags, secret_keys, to_toml
from massl_ray.config.space import Sweep, at, base_of, plan, read_sweep, words
from massl_ray.errors import UserError

if TYPE_CHECKING:
    from massl_ray.sweeping.rounds import Rounds

SPEC, BASE = "sweep.toml", "base.toml"
SHOWN = 5  # of the points that cannot be run


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 no trial finished, 2 a mistake in what was asked for, 128 + n ended by signal n."""
    parser = argparse.ArgumentParser(
        prog="massl-ray sweep",
        usage="massl-ray sweep SPEC.toml --run.dir DIR [--section.key VALUE ...], or massl-ray sweep --resume DIR",
        description="Train at every point of a space. Leaves results.csv, best.toml and report.html in DIR; each trial is a run "
        "directory in DIR/trials. Settings of all trials are given as to massl-ray train.",
        allow_abbrev=False,
    )
    parser.add_argument("spec", nargs="?", type=Path, help="a file like those in sweeps/")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="continue the sweep in this directory")
    try:
        arguments, flags = parser.parse_known_args(argv)
        if arguments.resume:
            if arguments.spec or flags:
                raise UserError("--resume takes a directory and nothing else: a sweep goes on with the settings that it has.")
            return _sweep(*_earlier(arguments.resume))
        if not arguments.spec:
            raise UserError("Give a file like those in sweeps/ and --run.dir DIR, or --resume DIR.")
        sweep = read_sweep(arguments.spec)
        return _sweep(arguments.spec.read_text(), sweep, base_of(sweep, read_flags(flags)))
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("Stopped. The same command, or massl-ray sweep --resume DIR, goes on with it.", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _earlier(root: Path) -> tuple[str, Sweep, Config]:
    if not (root / SPEC).is_file() or not (root / BASE).is_file():
        raise UserError(f"{root} holds no sweep: it has no {SPEC} and {BASE}. Give the --run.dir of a sweep.")
    flags = ["--config", str(root / BASE), "--run.dir", str(root.absolute())]  # where it is now
    sweep = read_sweep(root / SPEC)
    return (root / SPEC).read_text(), sweep, load(flags)


def _sweep(text: str, sweep: Sweep, base: Config) -> int:
    from massl_ray.data.sources import open_source  # late: a mistake is answered at once
    from massl_ray.storage import Folder
    from massl_ray.sweeping.results import write_results
    from massl_ray.sweeping.rounds import Rounds
    from massl_ray.sweeping.search import check_search
    from massl_ray.training.lock import hold
    from massl_ray.training.run import write_atomically

    if secret := secret_keys(base):
        raise UserError(
            f"{secret[0]} has a password, a key or a token in it, and a sweep would hand it to its trials in files: let the "
            "environment, a profile or the machine's role say who you are."
        )
    root = Path(base.run.dir).absolute()
    base = at(base, {"run.dir": str(root)})
    check_search(sweep)
    images = open_source(base.data.source, cache_gb=base.data.cache_gb)
    if sweep.sweep.metric == "knn" and images.labels is None:
        raise UserError(
            f"sweep.metric is knn, but {images.root} has no labels, so no trial would report it: take effective_rank, or sort the "
            "images into folders."
        )
    found = plan(sweep, base, len(images))
    for point, fault in found.refused[:SHOWN]:
        print(f"Left out  {words(point)}: {fault}")
    if more := found.refused[SHOWN:]:
        print(f"          and {len(more):,} more")
    _claim(root, text, base)
    with hold(Folder(root)):
        write_atomically(root / SPEC, text)
        write_atomically(root / BASE, to_toml(base))
        rounds = Rounds(root, sweep, base, len(images), found)
        _announce(sweep, rounds)
        try:
            if not rounds.over:
                _run(rounds)
        finally:
            scores = write_results(root, sweep, base, rounds.trials)
    print(f"Results   {root}/results.csv, best.toml and report.html")
    return 0 if scores else 1


def _claim(root: Path, text: str, base: Config) -> None:
    """Raises UserError where the directory holds another sweep, or something else."""
    names = [path.name for path in root.iterdir() if path.name[0] != "."] if root.is_dir() else []
    if SPEC not in names:
        if names:
            raise UserError(f"run.dir: {root} exists and is not a sweep. Choose another --run.dir.")
        root.mkdir(parents=True, exist_ok=True)
    elif _earlier(root)[::2] != (text, base):
        raise UserError(f"run.dir: {root} holds a sweep of another space or other settings. Choose another --run.dir.")


def _announce(sweep: Sweep, rounds: "Rounds") -> None:
    known, left = len(rounds.trials), len(rounds.left)
    later = {
        "optuna": f" of {sweep.sweep.points * len(sweep.sweep.seeds):,}; each {sweep.sweep.round} points follow from those before",
        "population": f" in {sweep.sweep.generations} generations",
    }
    more = later.get(sweep.sweep.scheduler) or later.get(sweep.sweep.search) or ""
    print(f"Trials    {known:,}{more}{f', {left:,} left' if left < known else ''}")


def _run(rounds: "Rounds") -> None:
    from massl_ray.config import resolve
    from massl_ray.on_ray.cluster import cluster
    from massl_ray.on_ray.tune import room, run_trials
    from massl_ray.sweeping.results import Interim, write_results
    from massl_ray.sweeping.table import SweepTable
    from massl_ray.sweeping.trials import Trial, write_settings

    sweep, base = rounds.sweep, rounds.base
    with cluster(), _terminable(), SweepTable(rounds.root, rounds.trials, sweep.sweep.metric):
        fitting = room(base, sweep.sweep.workers)
        at_once = fitting if sweep.sweep.at_once == "auto" else min(fitting, sweep.sweep.at_once)
        if sweep.sweep.at_once != "auto" and sweep.sweep.at_once > fitting:
            print(f"The cluster holds {fitting} at once, not {sweep.sweep.at_once}: the others wait.")

        def begin(trial: Trial) -> None:
            write_settings(rounds.root, trial, base, sweep.sweep.workers, shared=at_once > 1)

        interim = Interim(lambda: write_results(rounds.root, sweep, base, rounds.trials))
        run_trials(rounds, begin, interim, at_once, resolve(base, rounds.dataset_size).total_images)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, which a job that is stopped gets, ends a sweep as Ctrl-C does. Ray's own handler would exit at once with a trace."""
    received: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(*received[:1]) from error  # Tune raises one of its own
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
