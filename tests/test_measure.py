"""The measuring itself: turns, ratios, and peaks of known size."""

import json
import subprocess
import sys

import pytest
import torch

from massl_ray.benches.measure import alternate, in_fresh_process, machine, matmul_rate, median_ratio

CPU = torch.device("cpu")


def test_sides_take_turns_and_the_first_round_does_not_count():
    order: list[str] = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, rounds=3)
    assert order == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_is_taken_round_by_round():
    """A machine that is ten times slower in one round changes neither side's standing."""
    assert median_ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == 2.0


def test_peak_of_a_known_size():
    """64 MiB that live for a moment show as 64 MiB, in a process of their own."""
    code = """
import json, torch
from massl_ray.benches.measure import extra_peak
torch.ones(10).sum()
print(json.dumps(extra_peak(lambda: torch.ones(16 * 2**20).sum(), torch.device("cpu"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == pytest.approx(64 * 2**20, rel=0.05)


def test_a_failing_process_says_why():
    with pytest.raises(RuntimeError, match="unexpected keyword argument 'nonsense'"):
        in_fresh_process("massl_ray.benches.readout", nonsense=1)


def test_machine_and_its_rate():
    assert machine(CPU)["torch"] == torch.__version__
    assert 1e8 < matmul_rate(CPU, torch.float32) < 1e14
