"""The table of a sweep while it runs: one that moves on a terminal, a line for each trial that has ended elsewhere."""

import threading
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from massl_ray.config.space import words
from massl_ray.shown import in_a_line
from massl_ray.sweeping.trials import Row, Trial, read_outcome, row_of, shown

LOOK_S = 1.0  # between looks at the trials' files


class SweepTable:
    """Of these trials, read off their files while this lasts."""

    def __init__(self, root: Path, trials: Sequence[Trial], metric: str):
        self.root, self.trials, self.metric = root, trials, metric
        self.console = Console(highlight=False, emoji=False)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.told = {trial.name for trial in trials if read_outcome(root, trial)}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="table", daemon=True)

    def __enter__(self) -> None:
        if self.live:
            self.live.start()
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self._show()
        if self.live:
            self.live.stop()

    def _watch(self) -> None:
        while not self.over.wait(LOOK_S):
            self._show()

    def _show(self) -> None:
        rows = [row_of(self.root, trial) for trial in self.trials]
        if self.live:
            self.live.update(self._table(rows), refresh=True)
            return
        for row in rows:
            if row.status != "waiting" and row.trial.name not in self.told:
                self.told.add(row.trial.name)
                cause = f" ({row.cause})" if row.cause else ""
                value = shown(self.metric, row.metric(self.metric))
                told = f"{row.trial.name}  {_state(row)}, {row.verdict or 'no verdict'}, {value}: {words(row.trial.point)}{cause}"
                self.console.print(in_a_line(told), markup=False, soft_wrap=True)

    def _table(self, rows: Sequence[Row]) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("trial", "settings", "state", "images", self.metric.replace("_", " "), "verdict"):
            table.add_column(name, justify="right" if name == "images" else "left")
        for row in rows:
            figure = shown(self.metric, row.metric(self.metric))
            cells = (row.trial.name, words(row.trial.point), _state(row), f"{row.images_seen:,}", figure, row.verdict)
            table.add_row(*(Text(in_a_line(cell)) for cell in cells))
        return table


def _state(row: Row) -> str:
    if row.status == "waiting":
        return "running" if row.images_seen else "waiting"
    return f"{row.status} in {row.seconds:.0f} s"
