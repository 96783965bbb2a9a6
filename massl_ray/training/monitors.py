"""Is this run still worth its electricity? Judged from metrics that are the same on every worker, so all decide alike."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

from massl_ray.config import MonitorSection
from massl_ray.training.verdict import ADVICE, Verdict, informed, is_dead, not_finite

RISING = 1.25
"""A run whose `kl` has grown by more than this factor over the steps that count towards a death is on its way out of it."""


@dataclass(frozen=True)
class Ending:
    """Why a run is not to go on: the status of its Outcome, "non_finite", "collapsed" or "dead", and a sentence for people."""

    status: str
    message: str


class HealthMonitor:
    """Names a figure that is not finite at once, and after `patience` steps in a row a collapse or a death.

    Args:
        config: the bounds.
        block_size: S, slots of a block of the memory.
        warmup_epochs: while the rate rises no step counts towards a death: embeddings of a net that has not moved yet may all be
            alike.
    """

    def __init__(self, config: MonitorSection, block_size: int, warmup_epochs: float = 0.0):
        self.config = config
        self.block_size, self.warmup_epochs = block_size, warmup_epochs
        self.narrow_steps = 0
        self.dead_kl: deque[float] = deque(maxlen=config.patience)  # of the last steps, all of which were dead

    def judge(self, step: int, metrics: Mapping[str, float]) -> Ending | None:
        """Look at one step's metrics; call once a step, in order."""
        if broken := not_finite(metrics):
            return Ending(
                "non_finite",
                f"Step {step}: {broken} is {metrics[broken]}. All workers stopped; the last checkpoint is from "
                f"before this step. {ADVICE[Verdict.UNSTABLE]}",
            )
        return self._collapsed(step, metrics) or self._dead(step, metrics)

    def _collapsed(self, step: int, metrics: Mapping[str, float]) -> Ending | None:
        self.narrow_steps = self.narrow_steps + 1 if metrics["embedding_std"] < self.config.min_spread else 0
        if self.narrow_steps < self.config.patience:
            return None
        return Ending(
            "collapsed",
            f"Step {step}: the embeddings have collapsed. Their spread has been under {self.config.min_spread:g} "
            f"for {self.narrow_steps} steps (now {metrics['embedding_std']:.3g}; 1 is evenly spread), the loss is "
            f"{metrics['loss']:.3f} and ln S, which learns nothing, is {math.log(self.block_size):.3f}. All workers stopped. "
            f"{ADVICE[Verdict.SHRINKING]}",
        )

    def _dead(self, step: int, metrics: Mapping[str, float]) -> Ending | None:
        if metrics["epoch"] <= self.warmup_epochs or not is_dead(metrics, self.block_size, self.config.min_kl):
            self.dead_kl.clear()
            return None
        self.dead_kl.append(metrics["kl"])
        if len(self.dead_kl) < self.config.patience or self._recovers():
            return None
        return Ending(
            "dead",
            f"Step {step}: the run is dead. For {len(self.dead_kl)} steps the student has had less than "
            f"{self.config.min_kl:g} nats to learn (kl, now {metrics['kl']:.3f}) from a teacher to whom all images are alike: "
            f"it tells {informed(metrics, self.block_size):.2f} of {math.log(self.block_size):.2f} nats, the spread is "
            f"{metrics['embedding_std']:.2f}. All workers stopped. {ADVICE[Verdict.DEAD]}",
        )

    def _recovers(self) -> bool:
        kls = list(self.dead_kl)
        half = len(kls) // 2
        return half > 0 and mean(kls[half:]) > RISING * mean(kls[:half])
