"""Workers that talk: real gloo processes with uneven shares, against one process in float64."""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from massl_ray.config import HeadSection
from massl_ray.data.order import worker_share
from massl_ray.method.memory import Memory
from massl_ray.method.network import Encoder, Head
from massl_ray.method.optim import build_optimizer
from massl_ray.method.schedules import Schedule
from massl_ray.method.step import METRICS, Batch, MicroBatch, State, StepSettings, train_step
from massl_ray.training import exact_sums
from massl_ray.training.collectives import Distributed, Local
from massl_ray.training.exact_sums import Exact
from massl_ray.training.state import to_tensors

MICRO_BATCHES, SIZE, SIDE, DIM, SLOTS = 5, 3, 4, 6, 40
SETTINGS = StepSettings((0.4,) * 3, (0.3,) * 3, SLOTS // 2, 0.1, 0.1, 1e9, None, torch.device("cpu"), torch.float64)
SCHEDULE = Schedule(0, 1e-3, 0.04, 0.9, 0.05)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors on busy cores: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class FewColours(nn.Module):
    """A backbone of any size: channel means, then a linear layer with batch norm."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 2).to(memory_format=torch.channels_last)
        self.linear, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.convolution(x).mean((2, 3)))).tanh()


def build(collectives) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Encoder(FewColours(), Head(5, HeadSection(hidden_dim=7, dim=DIM, batch_norm=True))).double()
        for parameter in student.parameters():
            nn.init.normal_(parameter)
    teacher = copy.deepcopy(student).requires_grad_(False)
    return State(student, teacher, build_optimizer(student), Memory(SLOTS, DIM, dtype=torch.float64), collectives.wrap(student))


def batch_of(step: int, first: int, last: int) -> Batch:
    random = torch.Generator().manual_seed(step)
    global_views = torch.randint(0, 256, (MICRO_BATCHES, SIZE, 2, SIDE, SIDE, 3), dtype=torch.uint8, generator=random)
    local_views = torch.randint(0, 256, (MICRO_BATCHES, SIZE, 2, SIDE // 2, SIDE // 2, 3), dtype=torch.uint8, generator=random)
    permutation = torch.randperm(SLOTS, generator=random)
    micro_batches = [MicroBatch(global_views[i], local_views[i], None) for i in range(first, last)]
    return Batch(micro_batches, permutation, MICRO_BATCHES)


def three_steps(collectives) -> dict:
    """What a worker has after each step: gradients, metrics, state."""
    first, last = worker_share(collectives.rank, collectives.world_size, MICRO_BATCHES)
    state = build(collectives)
    seen: dict = {"gradients": [], "metrics": []}
    for step in range(3):
        seen["metrics"].append(train_step(state, batch_of(step, first, last), SCHEDULE, SETTINGS, collectives))
        seen["gradients"].append({name: value.grad.clone() for name, value in state.student.named_parameters()})
    strides = all(value.grad.stride() == value.stride() for value in state.student.parameters() if value.grad is not None)
    return seen | {"state": to_tensors(state), "strides": strides}


def numbered_rows(first: int, last: int) -> Tensor:
    return torch.arange(first * SIZE, last * SIZE, dtype=torch.float64)[:, None] * torch.tensor([1.0, 100.0])


def worker(rank: int, folder: str) -> None:
    """One process, first as one of three workers, then, but for the last, as one of two."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"  # no host name to resolve
    for world_size in (3, 2):
        if rank < world_size:
            dist.init_process_group("gloo", init_method=f"file://{folder}/group_{world_size}", rank=rank, world_size=world_size)
            torch.save(results_of(rank, world_size), f"{folder}/{world_size}_{rank}.pt")
            dist.destroy_process_group()


def results_of(rank: int, world_size: int) -> dict:
    exact_sums.BUCKET = 40  # elements, so that there are several
    collectives = Distributed(MICRO_BATCHES)
    first, last = worker_share(rank, world_size, MICRO_BATCHES)
    values = torch.tensor([[index + 1.0, 10.0**index] for index in range(first, last)], dtype=torch.float64)
    tensors = {"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    return {
        "share": (first, last),
        "gathered": collectives.start_gather(numbered_rows(first, last))(),
        "transposed": collectives.start_gather(numbered_rows(first, last).T.contiguous().T)(),
        "total": collectives.total(values),
        "exact_total": Exact(collectives, MICRO_BATCHES).total(values),
        "values": values,
        "agreed": collectives.start_agreement(rank)(),
        "shared": collectives.share(f"from {rank}"),
        "tensors": collectives.share_tensors(None if rank else tensors),
        "exact": three_steps(Exact(collectives, MICRO_BATCHES)),
        **three_steps(collectives),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=3)
    return folder


@pytest.fixture(scope="module", params=[pytest.param(n, id=f"{n} workers", marks=pytest.mark.slow) for n in (2, 3)])
def results(request, folder) -> list[dict]:
    return [torch.load(folder / f"{request.param}_{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone() -> dict:
    return three_steps(Local())


@pytest.fixture(scope="module")
def exact_alone() -> dict:
    return three_steps(Exact(Local(), MICRO_BATCHES))


def test_shares_are_uneven(results):
    counts = [last - first for first, last in (result["share"] for result in results)]
    assert sum(counts) == MICRO_BATCHES and len(set(counts)) == 2


@pytest.mark.parametrize("key", ["gathered", "transposed"])
def test_gather_is_in_batch_order_without_padding(results, key):
    for result in results:
        assert torch.equal(result[key], numbered_rows(0, MICRO_BATCHES))


def test_total_is_the_sum_and_leaves_its_argument(results):
    for result in results:
        expected = [MICRO_BATCHES * (MICRO_BATCHES + 1) / 2, int("1" * MICRO_BATCHES)]
        assert result["total"].tolist() == result["exact_total"].tolist() == expected
        assert result["values"].tolist() == [[index + 1, 10**index] for index in range(*result["share"])]


def test_the_largest_wish_counts(results):
    assert [result["agreed"] for result in results] == [len(results) - 1] * len(results)


def test_all_get_what_the_first_worker_has(results):
    for result in results:
        assert result["shared"] == "from 0"
        assert result["tensors"]["a"].tolist() == [0, 1, 2]
        assert torch.equal(result["tensors"]["b"], torch.ones(2, 2, dtype=torch.bfloat16))


def test_gradients_equal_one_process(results, alone):
    for result in results:
        for step, expected in enumerate(alone["gradients"]):
            for name, gradient in result["gradients"][step].items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=f"step {step}: {name}")


def test_first_gradient_is_the_mean_over_micro_batches(results):
    """Not through `micro_batch`: each micro-batch's gradient alone, from a state before any step."""
    gradients: dict[str, list[Tensor]] = {}
    for index in range(MICRO_BATCHES):
        batch = batch_of(0, index, index + 1)
        state = build(Local())
        train_step(state, Batch(batch.micro_batches, batch.permutation, 1), SCHEDULE, SETTINGS, Local())
        for name, value in state.student.named_parameters():
            gradients.setdefault(name, []).append(value.grad)
    for name, parts in gradients.items():
        torch.testing.assert_close(results[0]["gradients"][0][name], torch.stack(parts).mean(0), rtol=1e-9, atol=1e-12)


def test_metrics_and_state_equal_one_process(results, alone):
    for result in results:
        for step, expected in enumerate(alone["metrics"]):
            torch.testing.assert_close(result["metrics"][step], expected, rtol=1e-6, atol=1e-9, msg=str((METRICS, step)))
        assert result["state"].keys() == alone["state"].keys()
        for name, expected in alone["state"].items():
            torch.testing.assert_close(result["state"][name], expected, rtol=1e-7, atol=1e-10, msg=name)


def test_workers_agree_to_the_last_bit(results):
    for other in results[1:]:
        for name, value in results[0]["state"].items():
            assert torch.equal(value, other["state"][name]), name
        assert all(torch.equal(a, b) for a, b in zip(results[0]["metrics"], other["metrics"], strict=True))


def test_exact_is_the_same_to_the_last_bit_at_any_number_of_workers(results, exact_alone):
    for result in results:
        for name, value in exact_alone["state"].items():
            assert torch.equal(value, result["exact"]["state"][name]), name
        assert all(torch.equal(a, b) for a, b in zip(exact_alone["metrics"], result["exact"]["metrics"], strict=True))
        for expected, gradients in zip(exact_alone["gradients"], result["exact"]["gradients"], strict=True):
            assert all(torch.equal(value, gradients[name]) for name, value in expected.items())


def test_exact_equals_plain_within_rounding(alone, exact_alone):
    for name, value in alone["state"].items():
        torch.testing.assert_close(exact_alone["state"][name], value, rtol=1e-7, atol=1e-10, msg=name)


def test_exact_keeps_the_layout_of_parameters(results):
    """The fused optimizer walks memory: a gradient laid out unlike its parameter would silently be another one."""
    for result in results:
        assert result["exact"]["strides"]


def test_one_worker_keeps_what_it_has():
    collectives, rows, module = Local(), torch.ones(3, 2), nn.Linear(1, 1)
    assert collectives.start_gather(rows)() is rows and collectives.wrap(module) is module
    assert collectives.total(rows).tolist() == [3, 3] and collectives.share(7) == 7 and collectives.start_agreement(2)() == 2
    with collectives.micro_batch(module, last=False):
        module(torch.ones(1, 1)).backward()
    assert module.weight.grad.item() == 1.0
    assert (collectives.rank, collectives.world_size) == (0, 1)
