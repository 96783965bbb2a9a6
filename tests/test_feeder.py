"""Feeders: blocks by step, in order, from a chain of data sets; one after the other, whatever became of the one before."""

import subprocess
import sys

import numpy as np
import pytest
import ray

from massl_ray.on_ray import feeder as module
from massl_ray.on_ray.feeder import Feed, blocks_of, start_feeder
from massl_ray.on_ray.layout import DataTasks

TASKS = DataTasks(2, 0.25)


class Numbers:
    """Makes rows of their own numbers, counted from the first row of all."""

    def __init__(self, start: int = 0, share: int = 4):
        self.start, self.share = start, share

    def later(self, steps: int) -> "Numbers":
        return Numbers(self.start + steps, self.share)

    def __call__(self, rows):
        if self.start == 99:
            raise ValueError("no such step")
        return {"number": rows["id"] + self.start * self.share}


def feed(steps: int, start: int = 0, share: int = 4) -> Feed:
    return Feed(Numbers(start, share), share, steps, TASKS, 2**10)  # type: ignore[arg-type]


def rows(blocks) -> list[int]:
    return [int(number) for block in ray.get(blocks) for number in block["number"].to_pylist()]


@pytest.fixture
def started(ray_cluster):
    feeder = start_feeder()
    yield feeder
    ray.kill(feeder)


def test_it_starts_without_torch():
    code = "import sys, massl_ray.on_ray.feeder; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.ray
@pytest.mark.parametrize(("share", "rows_at_once"), [(4, 64), (6, 2), (3, 2)])
def test_a_long_run_is_a_chain_of_datasets(ray_cluster, monkeypatch, share, rows_at_once):
    """Steps end where blocks do, whether a task makes a step's rows or fewer."""
    for name, value in (("TASKS", 3), ("STEPS", 3), ("LEAD", 2), ("ROWS", rows_at_once)):
        monkeypatch.setattr(module, name, value)
    made = [rows(blocks) for blocks in blocks_of(feed(8, start=2, share=share))]
    assert made == np.arange(2 * share, 10 * share).reshape(8, share).tolist()
    assert list(blocks_of(feed(0))) == []


@pytest.mark.ray
def test_one_after_the_other(started):
    """The second is asked for before the first has ended, as after a change of the number of workers."""
    assert ray.get(started.next.remote()) is None
    started.open.remote(feed(20))
    calls = [started.next.remote() for _ in range(3)]
    assert rows(ray.get(calls[0])) == [0, 1, 2, 3]
    started.open.remote(feed(2, start=7))
    again = [started.next.remote() for _ in range(3)]
    assert [rows(blocks) if blocks else None for blocks in ray.get(again)] == [[28, 29, 30, 31], [32, 33, 34, 35], None]
    assert rows(ray.get(calls[2])) == [8, 9, 10, 11]  # what was handed out stays
    started.open.remote(feed(20))
    started.close.remote()
    assert ray.get(started.next.remote()) is None


@pytest.mark.ray
def test_what_a_task_says_comes_through(started):
    started.open.remote(feed(2, start=99))
    with pytest.raises(ValueError, match="no such step"):
        ray.get(started.next.remote())
    started.open.remote(feed(1))
    assert rows(ray.get(started.next.remote())) == [0, 1, 2, 3]
