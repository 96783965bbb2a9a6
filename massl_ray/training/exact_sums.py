"""Sums with the same bits at any world size: what is summed over micro-batches is summed in one order, whoever computed it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from massl_ray.data.order import worker_share
from massl_ray.training.collectives import Distributed, Local
from massl_ray.training.pairwise import Fold, fold

BUCKET = 4 << 20
"""Elements, about, of gradients that travel together."""
ALIGNMENT = 16
"""Elements: every parameter's place starts at a multiple at any world size, so that kernels find it alike."""


class Exact(Local):
    """Gradients are summed in the tree of `massl_ray.training.pairwise`, whose leaves are the micro-batches of all workers.

    A worker sums what its run of micro-batches allows and sends each other worker that one's slice of its sums, while its last
    backward pass still runs; every worker finishes the tree for its slice and hands it to all. Where shares are whole subtrees
    that is the traffic of an ordinary ring all-reduce. Gradients lie in `Bucket`s from one step to the next.
    """

    def __init__(self, workers: Local | Distributed, num_micro_batches: int):
        self.rank, self.world_size = workers.rank, workers.world_size
        self.start_gather, self.start_agreement = workers.start_gather, workers.start_agreement
        self.share, self.share_tensors = workers.share, workers.share_tensors
        shares = [worker_share(rank, self.world_size, num_micro_batches) for rank in range(self.world_size)]
        self.folds = [fold([(0, leaf) for leaf in range(*share)], num_micro_batches) for share in shares]
        self.finish = fold(chain.from_iterable(each.left for each in self.folds), num_micro_batches)
        self.buckets: list[Bucket] = []
        self.done = self.waiting = 0  # micro-batches of this step, and sums of them that wait for the next

    def wrap(self, student: nn.Module) -> nn.Module:
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        groups = _cut(trained[::-1])  # a backward pass comes to the last ones first
        self.buckets = [Bucket(group, self.rank, self.folds) for group in groups]
        return student

    def total(self, rows: Tensor) -> Tensor:
        return self.start_gather(rows)().sum(0)

    @contextmanager
    def micro_batch(self, replica: nn.Module, last: bool) -> Iterator[None]:
        """Takes each gradient away as soon as it is known."""
        merges = self.folds[self.rank].merges[self.done]
        awaited = {parameter: bucket for bucket in self.buckets for parameter in bucket.places}
        missing = {bucket: len(bucket.places) for bucket in self.buckets}
        complete = [] if last and self.world_size > 1 else None

        def take(parameter: Tensor) -> None:
            bucket = awaited.pop(parameter)
            bucket.add(parameter, self.waiting, merges)
            missing[bucket] -= 1
            if complete is not None:
                for each in self.buckets[len(complete) :]:  # in one order everywhere
                    if missing[each]:
                        break
                    complete.append(each)
                    each.send()

        hooks = [parameter.register_post_accumulate_grad_hook(take) for parameter in awaited]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for parameter in list(awaited):  # that this micro-batch did not use
            parameter.grad = torch.zeros_like(parameter)
            take(parameter)
        self.done, self.waiting = self.done + 1, self.waiting + 1 - merges

    def finish_gradients(self, student: nn.Module) -> None:
        if self.world_size > 1:
            for gathered in [bucket.finish(self.finish) for bucket in self.buckets]:
                gathered.wait()
        for bucket in self.buckets:
            for parameter, (root, *_) in bucket.places.items():
                parameter.grad = root
        self.done = self.waiting = 0


class Bucket:
    """Sums of some parameters' gradients, which travel together.

    Attributes:
        rows: (depth, world_size, slice), this worker's sums that wait, from left to right; in the end the first is the whole sum.
        places: each parameter's part of each row, laid out like the parameter: the fused optimizer walks memory in order.
        slices: (sums, slice) of each worker: the sums that it ends with, cut to the slice that this worker finishes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rank: int, folds: Sequence[Fold]):
        *starts, size = accumulate((_aligned(parameter.numel()) for parameter in parameters), initial=0)
        self.rank, world_size = rank, len(folds)
        self.rows = parameters[0].new_zeros(folds[rank].depth, world_size, _aligned(-(-size // world_size)), requires_grad=False)
        self.places: dict[Tensor, list[Tensor]] = {
            parameter: [row.as_strided(parameter.shape, parameter.stride(), row.storage_offset() + start) for row in self.rows]
            for parameter, start in zip(parameters, starts, strict=True)
        }
        self.slices = [self.rows.new_empty(len(each.left), self.rows.shape[2]) for each in folds]
        self.slices[rank] = self.rows[: len(folds[rank].left), rank]
        self.works: list[dist.Work] = []

    def add(self, parameter: Tensor, waiting: int, merges: int) -> None:
        """Take away the gradient of a micro-batch, onto the `waiting` sums, and merge as `Fold` says."""
        rows = self.places[parameter]
        if merges:
            rows[waiting - 1].add_(parameter.grad)  # type: ignore[arg-type]
        else:
            rows[waiting].copy_(parameter.grad)  # type: ignore[arg-type]
        for row in range(waiting - 2, waiting - 1 - merges, -1):
            rows[row].add_(rows[row + 1])
        parameter.grad = None

    def send(self) -> None:
        """Start to give every other worker its slice of this worker's sums, and to receive its own."""
        operations = []
        for other, slices in enumerate(self.slices):
            if other != self.rank:
                own = self.rows[: len(self.slices[self.rank]), other]
                operations += [dist.P2POp(dist.isend, row, other) for row in own]
                operations += [dist.P2POp(dist.irecv, row, other) for row in slices]
        self.works = dist.batch_isend_irecv(operations)

    def finish(self, plan: Fold) -> dist.Work:
        """Sum this worker's slice and start to hand it to all."""
        for work in self.works:
            work.wait()
        stack: list[Tensor] = []
        for row, merges in zip(chain.from_iterable(self.slices), plan.merges, strict=True):
            stack.append(row)
            for _ in range(merges):
                top = stack.pop()
                stack[-1].add_(top)
        (root,) = stack
        return dist.all_gather_into_tensor(self.rows[0].view(-1), root, async_op=True)  # type: ignore[return-value]


def _cut(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Runs of parameters of BUCKET elements or a little more."""
    groups: list[list[nn.Parameter]] = [[]]
    for parameter in parameters:
        if sum(each.numel() for each in groups[-1]) >= BUCKET:
            groups.append([])
        groups[-1].append(parameter)
    return groups


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT
