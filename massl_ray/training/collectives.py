"""What workers say to each other, as the step's `Collectives` protocol: alone or over torch.distributed."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

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

    def total(self, rows: Tensor) -> Tensor:
        return rows.sum(0)

    @contextmanager
    def micro_batch(self, replica: nn.Module, last: bool) -> Iterator[None]:
        yield

    def finish_gradients(self, student: nn.Module) -> None: ...

    def start_agreement(self, wish: int) -> Callable[[], int]:
        """Start finding the largest wish of all workers; the result waits and returns it."""
        return lambda: wish

    def share(self, value: Any) -> Any:
        """The first worker's value, on every worker."""
        return value

    def share_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """The first worker's tensors, on every worker. The others give None."""
        assert tensors is not None
        return tensors


class Distributed(Local):
    """The default process group of torch.distributed, whose workers share `num_micro_batches`; gradients are summed by
    DistributedDataParallel while the last backward pass still runs, in an order that depends on the world size.

    `timeout`: of waiting for a worker that says nothing any more; it ends this one.
    """

    def __init__(self, num_micro_batches: int, timeout: timedelta = timedelta(minutes=30)):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        shares = [worker_share(rank, self.world_size, num_micro_batches) for rank in range(self.world_size)]
        self.counts = [last - first for first, last in shares]
        # On the CPU, so that no step waits for a device.
        self.cpu_group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]

    def wrap(self, student: nn.Module) -> nn.Module:
        with warnings.catch_warnings():  # torch 2.15 has a new name, which synchronizes once more than the old one
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            replica = DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)
        replica.register_comm_hook(None, _sum_bucket)
        return replica

    def start_gather(self, rows: Tensor) -> Callable[[], Tensor]:
        """Shares differ by at most one micro-batch: all send as many rows as the largest has, and the padding is cut off."""
        each = len(rows) // self.counts[self.rank]
        longest = max(self.counts) * each
        sent = rows.contiguous() if len(rows) == longest else torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
        received = rows.new_empty(self.world_size * longest, rows.shape[1])
        work = dist.all_gather_into_tensor(received, sent, async_op=True)

        def wait() -> Tensor:
            work.wait()  # type: ignore[union-attr]
            if min(self.counts) == max(self.counts):
                return received
            shares = [received[rank * longest : rank * longest + count * each] for rank, count in enumerate(self.counts)]
            return torch.cat(shares)

        return wait

    def total(self, rows: Tensor) -> Tensor:
        values = rows.sum(0)
        dist.all_reduce(values)
        return values

    @contextmanager
    def micro_batch(self, replica: nn.Module, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with replica.no_sync():  # type: ignore[operator]
                yield

    def start_agreement(self, wish: int) -> Callable[[], int]:
        wishes = torch.tensor([wish])
        work = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self.cpu_group, async_op=True)

        def wait() -> int:
            work.wait()  # type: ignore[union-attr]
            return int(wishes)

        return wait

    def share(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.cpu_group)
        return values[0]

    def share_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        forms = self.share(tensors and [(name, value.shape, value.dtype) for name, value in tensors.items()])
        shared = tensors or {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in forms}
        for name, _, _ in forms:
            dist.broadcast(shared[name], src=0, group=self.cpu_group)
        return shared


def _sum_bucket(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel would average; shares may differ, and the loss is weighed by the micro-batches of all workers."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])  # type: ignore[union-attr]
