"""The rest between two looks of Ray Data at its tasks."""

import subprocess
import sys

import pytest

from massl_ray.on_ray import pace
from massl_ray.on_ray.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    """Time that only naps, and whoever sets it, let pass."""

    class Clock:
        now, naps = 1000.0, ()

        def sleep(self, seconds: float) -> None:
            self.now, self.naps = self.now + seconds, (*self.naps, seconds)

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def test_looks_are_apart(clock):
    """A look that took its time is followed by the next one at once."""
    rest = Pace()
    rest.on_execution_step(None)
    clock.now += 0.03
    rest.on_execution_step(None)
    clock.now += 0.15
    rest.on_execution_step(None)
    clock.now += 0.06
    rest.on_execution_step(None)
    assert clock.naps == pytest.approx((0, pace.LOOK_S - 0.03, 0, pace.LOOK_S - 0.06))


def test_tasks_unpickle_it_without_torch():
    """Ray Data sends it to every task with its settings."""
    code = "import sys, massl_ray.on_ray.pace; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.ray
def test_datasets_have_it(ray_cluster):
    from massl_ray.on_ray.feeder import dataset
    from massl_ray.on_ray.layout import DataTasks

    context = dataset(lambda rows: rows, 4, 2, DataTasks(3, 0.5), 5, 2**20).context
    assert Pace in context.custom_execution_callback_classes
    assert context.execution_options.resource_limits.object_store_memory == (5 + 2 * 6 * 2) * 2**20
    assert context.execution_options.resource_limits.cpu - context.execution_options.exclude_resources.cpu == 3.0  # three wait
    assert context.target_max_block_size == 2 * 2 * 2**20
