"""Gradients in flat memory, of one worker: against the tree written down plainly. Several workers: tests/test_collectives.py."""

import pytest
import torch
from torch import Tensor, nn

from massl_ray.training import exact_sums
from massl_ray.training.collectives import Local
from massl_ray.training.exact_sums import ALIGNMENT, Bucket, Exact
from massl_ray.training.pairwise import fold
from tests.test_pairwise import by_recursion

MICRO_BATCHES = 7


class TwoWays(nn.Module):
    """Only micro-batches with positive sums use the second layer."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last), nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.always(x).mean((2, 3)) * self.frozen
        return self.sometimes(rows).square().sum() if x.sum() > 0 else rows.sin().sum()


def module_and_batches() -> tuple[nn.Module, list[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TwoWays(), [torch.randn(4, 2, 5, 5) * 10 ** (i % 4) for i in range(MICRO_BATCHES)]


def plain_gradients(module: nn.Module, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    gradients: dict[str, list[Tensor]] = {}
    for batch in batches:
        module.zero_grad()
        module(batch).backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                gradients.setdefault(name, []).append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    module.zero_grad()
    return gradients


@pytest.mark.parametrize("elements", [1, 10, 1 << 20], ids=lambda n: f"buckets of {n}")
def test_two_steps_are_the_tree_sum_of_the_micro_batches(monkeypatch, elements):
    monkeypatch.setattr(exact_sums, "BUCKET", elements)
    module, batches = module_and_batches()
    assert {bool(batch.sum() > 0) for batch in batches} == {True, False}
    collectives = Exact(Local(), MICRO_BATCHES)
    replica = collectives.wrap(module)
    assert len(collectives.buckets) == {1: 4, 10: 2, 1 << 20: 1}[elements]
    for order in (1, -1):
        expected = plain_gradients(module, batches[::order])
        for i, batch in enumerate(batches[::order]):
            with collectives.micro_batch(replica, last=i == MICRO_BATCHES - 1):
                replica(batch).backward()
            assert all(parameter.grad is None for parameter in module.parameters())
        collectives.finish_gradients(module)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter.grad, by_recursion(expected[name])), name
                assert parameter.grad.stride() == parameter.stride()
        assert module.frozen.grad is None


def test_nothing_listens_once_a_micro_batch_is_over():
    module, batches = module_and_batches()
    collectives = Exact(Local(), MICRO_BATCHES)
    with pytest.raises(RuntimeError, match="lost"), collectives.micro_batch(collectives.wrap(module), last=False):
        raise RuntimeError("lost")
    module(batches[0]).backward()
    assert module.always.weight.grad is not None


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_parameters_start_alike_at_any_number_of_workers(world_size):
    parameters = [nn.Parameter(torch.ones(n)) for n in (3, 17, 1, 40)]
    folds = [fold([(0, rank)], world_size) for rank in range(world_size)]
    bucket = Bucket(parameters, 0, folds)
    assert bucket.rows.shape[1] == world_size and bucket.rows.shape[2] % ALIGNMENT == 0
    starts = [places[0].storage_offset() for places in bucket.places.values()]
    assert starts == [0, 16, 48, 64]
    assert bucket.rows[0].numel() >= 64 + 40
