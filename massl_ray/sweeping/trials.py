"""A trial is a run directory: what it is to run, how it went, what came out. All of a sweep's state lies in files, so a sweep that
was ended goes on from them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from massl_ray.config import Config, to_toml, validate
from massl_ray.config.space import Plan, Point, at
from massl_ray.reporting.summary import read_knn, read_metrics
from massl_ray.training.run import write_atomically, write_json

OUTCOME = "trial.json"
HIGHER = {"knn": True, "effective_rank": True, "loss": False}
"""Whether more of a metric is better."""


def shown(metric: str, value: float) -> str:
    """For people."""
    if math.isnan(value):
        return "-"
    return f"{value:.1%}" if metric == "knn" else f"{value:.3f}"


@dataclass(frozen=True)
class Trial:
    """One run of a point. `name` is that of its directory."""

    name: str
    point: Point
    seed: int


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: finished, stopped early by the scheduler, failed, or out of memory."""

    status: str
    seconds: float
    cause: str = ""


@dataclass(frozen=True)
class Row:
    """A trial in the table of results."""

    trial: Trial
    status: str  # as of Outcome, or waiting
    cause: str
    seconds: float
    images_seen: int
    knn: float  # share of right answers; nan where there are no classes
    knn_step: int
    steps: int
    effective_rank: float
    loss: float

    def metric(self, name: str) -> float:
        return getattr(self, name)

    def measured_at(self, name: str) -> int:
        """Images seen when that metric was measured last."""
        return self.images_seen * self.knn_step // max(1, self.steps) if name == "knn" else self.images_seen


def trials_of(plan: Plan, seeds: Sequence[int]) -> list[Trial]:
    width = len(str(len(plan.points) - 1))
    return [
        Trial(f"{number:0{width}d}-seed-{seed}", point, seed) for seed in seeds for number, point in enumerate(plan.points)
    ]  # seed by seed: ended early, a sweep has seen every point as often as any other


def folder_of(root: Path, trial: Trial) -> Path:
    return root / "trials" / trial.name


def write_settings(root: Path, trial: Trial, base: Config, workers: int, *, shared: bool) -> Path:
    """The file that `massl-ray train --config` runs the trial from. Where others run at the same time, views are made by one task
    for each worker unless base says otherwise."""
    config = at(base, trial.point | {"run.seed": trial.seed, "run.dir": str(folder_of(root, trial))})
    values = config.model_dump()
    values["elastic"] |= {"min_workers": 1, "max_workers": workers}
    if shared and base.elastic.view_tasks == "auto":
        values["elastic"]["view_tasks"] = 1
    path = root / "settings" / f"{trial.name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_toml(validate(values)))
    return path


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
    trained = [record for record in read_knn(folder) if record["features"] not in ("pixels", "untrained")]
    return Row(
        trial,
        outcome.status if outcome else "waiting",
        outcome.cause if outcome else "",
        outcome.seconds if outcome else math.nan,
        int(last.get("images_seen", 0)),
        trained[-1]["top1"] if trained else math.nan,
        trained[-1]["step"] if trained else 0,
        last.get("step", 0),
        float(last.get("effective_rank", math.nan)),
        float(last.get("loss", math.nan)),
    )


@dataclass(frozen=True)
class Score:
    """A point over its seeds."""

    point: Point
    mean: float
    spread: float  # standard deviation over seeds; nan of one
    seeds: int


def scores(rows: Sequence[Row], metric: str) -> list[Score]:
    """Points with a finished trial at least, the best first; those with fewer seeds than others after all of them."""
    by_point: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "finished" and not math.isnan(row.metric(metric)):
            by_point.setdefault(json.dumps(row.trial.point), []).append(row)
    found = []
    for group in by_point.values():
        values = [row.metric(metric) for row in group]
        spread = stdev(values) if len(values) > 1 else math.nan
        found.append(Score(group[0].trial.point, mean(values), spread, len(values)))
    sign = -1 if HIGHER[metric] else 1
    return sorted(found, key=lambda score: (-score.seeds, sign * score.mean))
