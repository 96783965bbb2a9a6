"""Running statistics (batch norm's) that do not depend on how micro-batches are shared out or in which order they ran."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class RunningStatistics:
    """Every micro-batch of a step starts from the values before the step; the step ends with the mean of what they became."""

    def __init__(self, module: nn.Module):
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self.buffers: list[Tensor] = [buffer for buffer in buffers if buffer.numel()]
        self.before = [buffer.clone() for buffer in self.buffers]
        self.after: list[Tensor] = []  # a row (n,) a micro-batch
        named = [(name, buffer) for name, buffer in module.named_buffers() if not buffer.is_floating_point()]
        self.counters = [buffer for name, buffer in named if name.endswith("num_batches_tracked")]
        self.counts = [buffer.clone() for buffer in self.counters]

    @torch.no_grad()
    def after_micro_batch(self) -> None:
        if self.buffers:
            self.after.append(torch.cat([buffer.flatten() for buffer in self.buffers]))
            torch._foreach_copy_(self.buffers, self.before)
        if self.counters:
            torch._foreach_copy_(self.counters, self.counts)

    @torch.no_grad()
    def finish(self, num_micro_batches: int, total: Callable[[Tensor], Tensor]) -> None:
        """`total` sums rows, one a micro-batch, over all workers; `num_micro_batches` counts those of all workers."""
        if self.counters:
            torch._foreach_add_(self.counters, 1)  # a step counts as one batch, however many micro-batches a worker had
        if not self.buffers:
            return
        flat = total(torch.stack(self.after)) / num_micro_batches
        pieces = flat.split([buffer.numel() for buffer in self.buffers])
        torch._foreach_copy_(self.buffers, [piece.view_as(buffer) for piece, buffer in zip(pieces, self.buffers, strict=True)])
