"""What workers say to each other, as the step's `Collectives` protocol: alone or over torch.distributed, plain or exact."""

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
from massl_ray.training.pairwise import PairwiseSum, nodes_of


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


class Exact(Local):
    """The same bits at any world size: whatever is summed over micro-batches is summed in one order, whoever computed them.

    Gradients go through `PairwiseSum`: a worker sums what its run of micro-batches allows, every worker gets a slice of all
    partial sums, finishes the tree for it and hands the slice to all. Where shares are whole subtrees that is the traffic of an
    ordinary ring all-reduce.
    """

    def __init__(self, workers: Local | Distributed, num_micro_batches: int):
        self.workers, self.num_micro_batches = workers, num_micro_batches
        self.rank, self.world_size = workers.rank, workers.world_size
        self.first = worker_share(self.rank, self.world_size, num_micro_batches)[0]
        self.start_gather, self.start_agreement = workers.start_gather, workers.start_agreement
        self.share, self.share_tensors = workers.share, workers.share_tensors
        self._restart()

    def _restart(self) -> None:
        self.sum, self.next = PairwiseSum(self.num_micro_batches), self.first

    def total(self, rows: Tensor) -> Tensor:
        return self.start_gather(rows)().sum(0)

    @contextmanager
    def micro_batch(self, replica: nn.Module, last: bool) -> Iterator[None]:
        yield
        self.sum.add(0, self.next, [parameter.grad for parameter in _with_gradient(replica)])  # type: ignore[misc]
        self.next += 1
        for parameter in replica.parameters():
            parameter.grad = None

    def finish_gradients(self, student: nn.Module) -> None:
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        nodes, _ = self.sum.nodes, self._restart()
        if self.world_size == 1:
            ((_, root),) = nodes.items()
        else:
            flat = _finish_tree(nodes, self.num_micro_batches, self.rank, self.world_size)
            pieces = flat.split([parameter.numel() for parameter in parameters])
            root = [torch.empty_like(p).copy_(piece.view(p.shape)) for p, piece in zip(parameters, pieces, strict=True)]
        for parameter, gradient in zip(parameters, root, strict=True):
            parameter.grad = gradient


def _with_gradient(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that are trained; one that this micro-batch did not use has a gradient of zeros."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            yield parameter


def _finish_tree(nodes: dict[tuple[int, int], list[Tensor]], num_leaves: int, rank: int, world_size: int) -> Tensor:
    """From each worker's partial sums to the whole one, flat and the same on every worker."""
    own = torch.stack([torch.cat([tensor.reshape(-1) for tensor in nodes[key]]) for key in sorted(nodes)])  # (n, P)
    size = own.shape[1]
    slice_size = -(-size // world_size)
    own = torch.nn.functional.pad(own, (0, slice_size * world_size - size))
    sent = own.view(len(own), world_size, slice_size).transpose(0, 1).contiguous()  # to worker w: all nodes' slice w
    keys = [sorted(nodes_of(*worker_share(other, world_size, num_leaves), num_leaves)) for other in range(world_size)]
    counts = [len(each) for each in keys]
    received = own.new_empty(sum(counts), slice_size)
    dist.all_to_all_single(received, sent.view(-1, slice_size), counts, [len(own)] * world_size)
    tree = PairwiseSum(num_leaves)
    for (level, index), row in zip([key for each in keys for key in each], received, strict=True):
        tree.add(level, index, [row])
    ((_, (slice_sum,)),) = tree.nodes.items()
    whole = own.new_empty(world_size * slice_size)
    dist.all_gather_into_tensor(whole, slice_sum)
    return whole[:size]


def _sum_bucket(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel would average; shares may differ, and the loss is weighed by the micro-batches of all workers."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])  # type: ignore[union-attr]
