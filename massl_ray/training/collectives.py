"""What workers say to each other, as the step's `Collectives` protocol: alone, or over torch.distributed."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from massl_ray.data.order import worker_share


class Local:
    """One worker."""

    rank = 0
    world_size = 1

    def wrap(self, student: nn.Module) -> nn.Module:
        return student

    def start_gather(self, rows: Tensor) -> Callable[[], Tensor]:
        return lambda: rows

    def total(self, values: Tensor) -> Tensor:
        return values

    def accumulate(self, replica: nn.Module, last: bool) -> AbstractContextManager:
        return nullcontext()


class Distributed:
    """The default process group of torch.distributed, workers sharing `num_micro_batches` of `micro_batch_size` images."""

    def __init__(self, num_micro_batches: int, micro_batch_size: int):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        shares = [worker_share(rank, self.world_size, num_micro_batches) for rank in range(self.world_size)]
        self.counts = [(last - first) * micro_batch_size for first, last in shares]

    def wrap(self, student: nn.Module) -> nn.Module:
        return DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)

    def start_gather(self, rows: Tensor) -> Callable[[], Tensor]:
        """Shares differ by at most one micro-batch: all send the largest share's rows, and the padding is cut off again."""
        longest = max(self.counts)
        sent = rows.contiguous() if len(rows) == longest else torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
        received = rows.new_empty(self.world_size * longest, rows.shape[1])
        work = dist.all_gather_into_tensor(received, sent, async_op=True)

        def wait() -> Tensor:
            work.wait()  # type: ignore[union-attr]
            return _without_padding(received, self.counts)

        return wait

    def total(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    def accumulate(self, replica: nn.Module, last: bool) -> AbstractContextManager:
        return nullcontext() if last else replica.no_sync()  # type: ignore[operator]


def _without_padding(received: Tensor, counts: Sequence[int]) -> Tensor:
    longest = max(counts)
    if all(count == longest for count in counts):
        return received
    return torch.cat([received[rank * longest : rank * longest + count] for rank, count in enumerate(counts)])
