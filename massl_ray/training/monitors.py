"""Is this run still worth its electricity? Judged from metrics that are the same on every worker, so all decide alike."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from massl_ray.config import MonitorSection


@dataclass(frozen=True)
class Verdict:
    status: str  # "non_finite" or "collapsed"
    message: str


class HealthMonitor:
    """Names a non-finite loss at once, and a collapse after `patience` steps in a row below `min_spread`."""

    def __init__(self, config: MonitorSection, block_size: int):
        self.config = config
        self.uniform_loss = math.log(block_size)
        self.narrow_steps = 0

    def judge(self, step: int, metrics: Mapping[str, float]) -> Verdict | None:
        """Look at one step's metrics; call once a step, in order."""
        broken = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
        if broken:
            return Verdict(
                "non_finite",
                f"Step {step}: {broken[0]} is {metrics[broken[0]]}. All workers stopped; the last checkpoint is from "
                "before this step. "
                "Lower optim.lr, or use --train.precision fp32.",
            )
        self.narrow_steps = self.narrow_steps + 1 if metrics["embedding_std"] < self.config.min_spread else 0
        if self.narrow_steps >= self.config.patience:
            return Verdict(
                "collapsed",
                f"Step {step}: the embeddings have collapsed. Their spread has been under {self.config.min_spread:g} "
                f"for {self.narrow_steps} steps "
                f"(now {metrics['embedding_std']:.3g}; 1 is evenly spread), the loss is {metrics['loss']:.3f} and ln "
                "S, which learns nothing, "
                f"is {self.uniform_loss:.3f}. All workers stopped. Enlarge memory.size, lower loss.teacher_temp, "
                "use --head.batch_norm true, or lower optim.lr.",
            )
        return None
