"""What a sweep leaves: results.csv and results.parquet, a line a trial; best.toml for `massl-ray train --config`; report.html;
tensorboard/."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from massl_ray.config import Config, to_toml
from massl_ray.config.space import Sweep, at
from massl_ray.sweeping.board import write_board
from massl_ray.sweeping.page import write_page
from massl_ray.sweeping.trials import Row, Score, Trial, row_of, scores
from massl_ray.training.run import write_atomically

FIGURES = ("status", "cause", "seconds", "images_seen", "knn", "gain", "effective_rank", "loss", "verdict")


def write_results(root: Path, sweep: Sweep, base: Config, trials: Sequence[Trial]) -> list[Score]:
    """Write all of them anew from the trials' directories; returns the points, best first."""
    rows = [row_of(root, trial) for trial in trials]
    table = to_table(rows)
    _aside(root / "results.csv", lambda path: pyarrow.csv.write_csv(table, path))
    _aside(root / "results.parquet", lambda path: pyarrow.parquet.write_table(table, path))
    found = scores(rows, sweep.sweep.metric)
    if found:
        write_atomically(root / "best.toml", to_toml(_best(root, base, rows, found[0])))
    write_page(root, sweep, rows, found)
    write_board(root, rows)
    return found


class Interim:
    """Results while a sweep runs: written anew when called, but for a twentieth of the time at most."""

    def __init__(self, write: Callable[[], object]):
        self.write = write
        self.next = -math.inf  # by time.monotonic

    def __call__(self) -> None:
        begun = time.monotonic()
        if begun >= self.next:
            self.write()
            now = time.monotonic()
            self.next = now + 19 * (now - begun)


def _best(root: Path, base: Config, rows: Sequence[Row], best: Score) -> Config:
    point = best.point | {"run.dir": str(root / "best")}
    fitting = [row.micro_batch_size for row in rows if row.trial.point == best.point and row.micro_batch_size]
    return at(base, point | {"train.micro_batch_size": min(fitting)} if fitting else point)


def to_table(rows: Sequence[Row]) -> pa.Table:
    """A column for each setting of the space, then the figures; parents and smaller micro-batches where there are any."""
    columns: dict[str, list] = {"trial": [row.trial.name for row in rows]}
    columns |= {key: [row.trial.point[key] for row in rows] for key in rows[0].trial.point}
    columns["run.seed"] = [row.trial.seed for row in rows]
    columns |= {name: [getattr(row, name) for row in rows] for name in FIGURES}
    if any(row.trial.parent for row in rows):
        columns["parent"] = [row.trial.parent for row in rows]
    if any(row.micro_batch_size for row in rows):
        columns["train.micro_batch_size"] = [row.micro_batch_size for row in rows]
    return pa.table({name: _column(values) for name, values in columns.items()})


def _column(values: Sequence[Any]) -> pa.Array:
    """Numbers, words and truth values as they are, everything else in words; nan is null."""
    kinds = {type(value) for value in values if value is not None}
    return pa.array(values if kinds <= {int, float} or kinds in ({str}, {bool}) else list(map(str, values)), from_pandas=True)


def _aside(path: Path, write: Callable[[Path], object]) -> None:
    aside = path.with_name(f".{path.name}")
    write(aside)
    aside.replace(path)
