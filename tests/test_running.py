"""Running statistics: the mean over micro-batches, whoever computed them and in whatever order."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from massl_ray.method.running import RunningStatistics

MICRO_BATCHES = 5


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors on busy cores: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 2), nn.BatchNorm1d(2)).double()
        module(torch.randn(9, 3, dtype=torch.float64))  # statistics that are not the initial ones
    return module


def micro_batches() -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, dtype=torch.float64, generator=random) + i for i in range(MICRO_BATCHES)]


def step(shares: list[list[int]], module: nn.Module) -> list[nn.Module]:
    """One step of workers with these micro-batches; a copy of the module each."""
    data = micro_batches()
    workers = [copy.deepcopy(module) for _ in shares]
    running = [RunningStatistics(worker) for worker in workers]
    for worker, statistics, share in zip(workers, running, shares, strict=True):
        for index in share:
            worker(data[index])
            statistics.after_micro_batch()
    sent: list[Tensor] = []

    def listen(values: Tensor) -> Tensor:
        sent.append(values)
        return values.sum(0)

    for worker, statistics in zip(workers, running, strict=True):  # what each would send ...
        before = [buffer.clone() for buffer in worker.buffers()]
        statistics.finish(MICRO_BATCHES, listen)
        for buffer, value in zip(worker.buffers(), before, strict=True):
            buffer.copy_(value)
    for statistics in running:  # ... and what each makes of the total
        statistics.finish(MICRO_BATCHES, lambda _: torch.cat(sent).sum(0))
    return workers


def test_equals_the_mean_over_micro_batches_by_hand():
    module, expected = network(), network().state_dict()
    outputs = []
    for data in micro_batches():
        hidden = data @ module[0].weight.T + module[0].bias
        outputs.append(0.9 * expected["1.running_mean"] + 0.1 * hidden.mean(0))
    (worker,) = step([list(range(MICRO_BATCHES))], module)
    torch.testing.assert_close(worker[1].running_mean, torch.stack(outputs).mean(0), rtol=1e-13, atol=1e-15)
    variances = [(data @ module[0].weight.T).var(0, unbiased=True) for data in micro_batches()]
    by_hand = 0.9 * expected["1.running_var"] + 0.1 * torch.stack(variances).mean(0)
    torch.testing.assert_close(worker[1].running_var, by_hand, rtol=1e-13, atol=1e-15)


def test_equals_the_mean_over_separate_modules():
    module = network()
    became = []
    for data in micro_batches():
        alone = copy.deepcopy(module)
        alone(data)
        became.append(alone.state_dict())
    (worker,) = step([list(range(MICRO_BATCHES))], module)
    for name, value in worker.state_dict().items():
        if "running" in name:
            expected = torch.stack([state[name] for state in became]).mean(0)
            torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-15)
            assert not torch.allclose(value, became[0][name])


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(MICRO_BATCHES)), st.lists(st.integers(1, MICRO_BATCHES - 1), max_size=3, unique=True).map(sorted))
def test_any_split_over_workers_gives_the_same(order, cuts):
    shares = [list(order[first:last]) for first, last in zip([0, *cuts], [*cuts, MICRO_BATCHES], strict=True)]
    (alone,) = step([list(range(MICRO_BATCHES))], network())
    for worker in step(shares, network()):
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(worker.state_dict()[name], value, rtol=1e-13, atol=1e-15, msg=f"{name} {shares}")


@pytest.mark.parametrize("shares", [[[0, 1, 2, 3, 4]], [[0], [1, 2], [3, 4]]])
def test_a_step_counts_as_one_batch_at_any_number_of_workers(shares):
    for worker in step(shares, network()):
        assert worker[1].num_batches_tracked.item() == worker[4].num_batches_tracked.item() == 2  # one from network()


def test_each_micro_batch_starts_from_the_values_before_the_step():
    module = network()
    before = copy.deepcopy(module.state_dict())
    statistics = RunningStatistics(module)
    module(micro_batches()[0])
    assert not torch.equal(module[1].running_mean, before["1.running_mean"])
    statistics.after_micro_batch()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_module_without_statistics_sends_nothing():
    statistics = RunningStatistics(nn.Linear(2, 2))
    sent: list[Tensor] = []
    statistics.after_micro_batch()
    statistics.finish(3, lambda values: (sent.append(values), values)[1])
    assert sent == []
