"""The trials of a sweep, a round after the other: nobody draws from a round before all of the one before it is over."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from massl_ray.config import Config
from massl_ray.config.space import Plan, Sweep
from massl_ray.sweeping.search import next_trials, stop_of
from massl_ray.sweeping.trials import Trial, forget_outcome, is_over, read_trials, row_of, trials_of, write_trials


class Rounds:
    """What was drawn stands in trials.json, so a sweep that was ended goes on with the trials it had.

    Attributes:
        trials: all that were drawn so far, also those of earlier commands.
    """

    def __init__(self, root: Path, sweep: Sweep, base: Config, dataset_size: int, plan: Plan):
        self.root, self.sweep, self.base, self.dataset_size = root, sweep, base, dataset_size
        self.trials: list[Trial] = read_trials(root)
        self.running: set[str] = set()
        self.waiting: deque[Trial] = deque()
        if self.trials:
            last = self.trials[-1].generation
            self.waiting.extend(trial for trial in self.trials if not is_over(root, trial) and trial.generation == last)
            for trial in self.waiting:
                forget_outcome(root, trial)
            self._go_on()
        else:
            of = sweep.sweep.points if sweep.sweep.search == "optuna" else 0
            stop_at = stop_of(sweep, base, dataset_size, generation=0)
            first = trials_of(plan.points, sweep.sweep.seeds, of=of)
            if stop_at:
                first = [replace(trial, name=f"{trial.name}-gen-0", stop_at=stop_at) for trial in first]
            self._draw(first)

    @property
    def left(self) -> Sequence[Trial]:
        """Those that wait, of the trials drawn so far."""
        return tuple(self.waiting)

    @property
    def over(self) -> bool:
        """Whether no trial waits, runs, or will be drawn."""
        return not self.waiting and not self.running

    def take(self) -> Trial | None:
        """The next one to run; None while those that run must be over before it is known, and when all are."""
        if not self.waiting:
            return None
        trial = self.waiting.popleft()
        self.running.add(trial.name)
        return trial

    def done(self, trial: Trial) -> None:
        """Its outcome is written. After the last one of a round the next round is drawn."""
        self.running.discard(trial.name)
        self._go_on()

    def _go_on(self) -> None:
        if self.over:
            rows = [row_of(self.root, trial) for trial in self.trials]
            self._draw(next_trials(self.sweep, self.base, self.dataset_size, rows))

    def _draw(self, trials: Sequence[Trial]) -> None:
        if trials:
            self.trials += trials
            self.waiting.extend(trials)
            write_trials(self.root, self.trials)
