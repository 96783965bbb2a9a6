"""A trial is a run directory: what it is to run, how it went, what came out. All of a sweep's state lies in files, so a sweep that
was ended goes on from them."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

from massl_ray.config import Config, load, to_toml
from massl_ray.config.space import Point, at
from massl_ray.reporting.summary import read_knn, read_metrics, read_verdict
from massl_ray.reporting.yardstick import gain, knn_summary
from massl_ray.training.checkpoint import list_checkpoints
from massl_ray.training.run import write_atomically, write_json

OUTCOME, TRIALS = "trial.json", "trials.json"
HIGHER = {"knn": True, "effective_rank": True, "loss": False}
"""Whether more of a metric is better."""


def shown(metric: str, value: float) -> str:
    """For people."""
    if math.isnan(value):
        return "-"
    if metric == "gain":
        return f"{value:+.1f} points"
    return f"{value:.1%}" if metric == "knn" else f"{value:.3f}"


@dataclass(frozen=True)
class Trial:
    """One run of a point. `name` is that of its directory."""

    name: str
    point: Point
    seed: int
    parent: str = ""  # the trial whose last checkpoint this one goes on from
    generation: int = 0  # of a population
    stop_at: int | None = None  # step


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: finished, stopped early by the scheduler, failed, or out of memory."""

    status: str
    seconds: float
    cause: str = ""
    micro_batch_size: int | None = None  # where it had to be smaller than the settings say


@dataclass(frozen=True)
class Row:
    """A trial in the table of results."""

    trial: Trial
    status: str  # as of Outcome, or waiting
    cause: str
    seconds: float
    micro_batch_size: int | None
    images_seen: int
    knn: float  # share of right answers; nan where there are no classes
    knn_step: int
    steps: int
    effective_rank: float
    loss: float
    gain: float = math.nan  # of knn, in percentage points over the untrained backbone
    verdict: str = ""  # of massl_ray.training.verdict; empty before the first step

    def metric(self, name: str) -> float:
        return getattr(self, name)

    def measured_at(self, name: str) -> int:
        """Images seen when that metric was measured last."""
        return self.images_seen * self.knn_step // max(1, self.steps) if name == "knn" else self.images_seen


def trials_of(points: Sequence[Point], seeds: Sequence[int], *, first: int = 0, of: int = 0) -> list[Trial]:
    """One for each point and seed. `first`: the number of the first point among the `of` that there will be."""
    width = len(str(max(of, len(points)) - 1))
    return [
        Trial(f"{number:0{width}d}-seed-{seed}", point, seed) for seed in seeds for number, point in enumerate(points, first)
    ]  # seed by seed: ended early, a sweep has seen every point as often as any other


def write_trials(root: Path, trials: Sequence[Trial]) -> None:
    write_json(root / TRIALS, [asdict(trial) for trial in trials])


def read_trials(root: Path) -> list[Trial]:
    """All that were drawn so far; none where the sweep has not begun."""
    path = root / TRIALS
    return [Trial(**values) for values in json.loads(path.read_text())] if path.exists() else []


def folder_of(root: Path, trial: Trial) -> Path:
    return root / "trials" / trial.name


def settings_of(root: Path, trial: Trial) -> Path:
    """The file that `massl-ray train --config` runs the trial from."""
    return root / "settings" / f"{trial.name}.toml"


def write_settings(root: Path, trial: Trial, base: Config, workers: int, *, shared: bool) -> None:
    """Where other trials run at the same time, views are made by one task for each worker unless base says otherwise. A child has
    its parent's settings but for its own point; a trial that was out of memory keeps the micro-batch that it has come to."""
    if trial.parent:
        base = load(["--config", str(root / "trials" / trial.parent / "config.toml")])
    own = {"run.seed": trial.seed, "run.dir": str(folder_of(root, trial)), "train.stop_at": trial.stop_at}
    own |= {"elastic.min_workers": 1, "elastic.max_workers": workers}
    if settings_of(root, trial).exists():  # by an earlier command
        own["train.micro_batch_size"] = micro_batch_of(root, trial)
    if shared and base.elastic.view_tasks == "auto":
        own["elastic.view_tasks"] = 1
    _write(settings_of(root, trial), at(base, trial.point | own))


def micro_batch_of(root: Path, trial: Trial) -> int | Literal["auto"]:
    """As its settings say, in images."""
    return load(["--config", str(settings_of(root, trial))]).train.micro_batch_size


def shrink(root: Path, trial: Trial) -> bool:
    """After a trial was out of memory: half the micro-batch, in its settings, and nothing left of the run. Returns whether there
    was anything to halve."""
    folder = folder_of(root, trial)
    if not (folder / "config.toml").exists():
        return False
    config = load(["--config", str(folder / "config.toml")])
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    assert micro != "auto"  # a run's own settings are filled in
    smaller = max((size for size in range(1, micro // 2 + 1) if batch % size == 0), default=None)
    if smaller:
        _write(settings_of(root, trial), at(load(["--config", str(settings_of(root, trial))]), {"train.micro_batch_size": smaller}))
        shutil.rmtree(folder)
    return smaller is not None


def hand_over(root: Path, trial: Trial) -> None:
    """Lay a child's run directory out, where it is not there yet, with its parent's last checkpoint to go on from."""
    folder = folder_of(root, trial)
    if not trial.parent or (folder / "config.toml").exists():
        return
    aside = folder.with_name(f".{trial.name}")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    *_, last = list_checkpoints(root / "trials" / trial.parent / "checkpoints")
    shutil.copytree(Path(str(last)), aside / "checkpoints" / last.name)
    shutil.copy(settings_of(root, trial), aside / "config.toml")
    aside.rename(folder)


def _write(path: Path, config: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_toml(config))


def write_outcome(root: Path, trial: Trial, outcome: Outcome) -> None:
    folder_of(root, trial).mkdir(parents=True, exist_ok=True)
    write_json(folder_of(root, trial) / OUTCOME, asdict(outcome))


def read_outcome(root: Path, trial: Trial) -> Outcome | None:
    """None while it has not ended."""
    path = folder_of(root, trial) / OUTCOME
    return Outcome(**json.loads(path.read_text())) if path.exists() else None


def is_over(root: Path, trial: Trial) -> bool:
    """Whether nothing is left to do. Trials that failed are tried again when a sweep goes on: the cause may be mended."""
    outcome = read_outcome(root, trial)
    return outcome is not None and outcome.status in ("finished", "stopped early")


def forget_outcome(root: Path, trial: Trial) -> None:
    """Of an earlier try, which would be taken for that of the next one."""
    (folder_of(root, trial) / OUTCOME).unlink(missing_ok=True)


def row_of(root: Path, trial: Trial) -> Row:
    folder, outcome = folder_of(root, trial), read_outcome(root, trial)
    lines = read_metrics(folder)
    last = lines[-1] if lines else {}
    records = read_knn(folder)
    trained = [record for record in records if record["features"] not in ("pixels", "untrained")]
    points = gain(knn_summary(records, trained[-1]["step"] if trained else None))
    finding = read_verdict(folder, lines) if lines else None
    return Row(
        trial,
        outcome.status if outcome else "waiting",
        outcome.cause if outcome else "",
        outcome.seconds if outcome else math.nan,
        outcome.micro_batch_size if outcome else None,
        int(last.get("images_seen", 0)),
        trained[-1]["top1"] if trained else math.nan,
        trained[-1]["step"] if trained else 0,
        last.get("step", 0),
        float(last.get("effective_rank", math.nan)),
        float(last.get("loss", math.nan)),
        math.nan if points is None else points,
        str(finding.verdict) if finding else "",
    )


@dataclass(frozen=True)
class Score:
    """A point over its seeds."""

    point: Point
    mean: float
    spread: float  # standard deviation over seeds; nan of one
    seeds: int


def scores(rows: Sequence[Row], metric: str, *, of: Sequence[str] = ("finished",)) -> list[Score]:
    """Points with a trial that ended so, the best first; those with fewer seeds than others after all of them. Of a population the
    last generation counts."""
    known = [row for row in rows if row.status in of and not math.isnan(row.metric(metric))]
    last = max((row.trial.generation for row in known), default=0)
    by_point: dict[str, list[Row]] = {}
    for row in known:
        if row.trial.generation == last:
            by_point.setdefault(json.dumps(row.trial.point), []).append(row)
    found = []
    for group in by_point.values():
        values = [row.metric(metric) for row in group]
        spread = stdev(values) if len(values) > 1 else math.nan
        found.append(Score(group[0].trial.point, mean(values), spread, len(values)))
    sign = -1 if HIGHER[metric] else 1
    return sorted(found, key=lambda score: (-score.seeds, sign * score.mean))
