"""The rest between two looks of Ray Data at its tasks."""

import subprocess
import sys

import pytest

from massl_ray.on_ray import pace
from massl_ray.on_ray.pace import Pace


def test_it_rests_once_a_look(monkeypatch):
    naps: list[float] = []
    monkeypatch.setattr(pace.time, "sleep", naps.append)
    Pace().on_execution_step(None)
    assert naps == [pace.PACE_S] and 0.005 <= pace.PACE_S <= 0.05


def test_tasks_unpickle_it_without_torch():
    """Ray Data sends it to every task with its settings."""
    code = "import sys, massl_ray.on_ray.pace; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.ray
def test_datasets_have_it(ray_cluster):
    from massl_ray.on_ray.ingest import _dataset

    context = _dataset(lambda rows: rows, 4, 2, 3, 5, 2**20).context
    assert Pace in context.custom_execution_callback_classes
    assert context.execution_options.resource_limits.object_store_memory == (5 + 2 * 3 * 2) * 2**20
    assert context.target_max_block_size == 2 * 2 * 2**20
