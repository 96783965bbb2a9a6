"""Signs of collapse: against loops in float64, and where the answer is known."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from massl_ray.method import collapse
from massl_ray.method.collapse import alignment, embedding_spread, memory_usage, signs_of_collapse, uniformity

DOUBLE = {"atol": 1e-12, "rtol": 1e-12}


def unit_rows(rows: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = np.random.default_rng(seed).standard_normal((rows, dim))
    return torch.from_numpy(drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).to(dtype)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def square_distance(x: Tensor, y: Tensor) -> float:
    return sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True))


# ---- against loops ---------------------------------------------------------------------------------------------------


def alignment_by_loop(first: Tensor, second: Tensor) -> float:
    return sum(square_distance(x, y) for x, y in zip(first, second, strict=True)) / len(first)


def uniformity_by_loop(rows: Tensor) -> float:
    near = [math.exp(-2 * square_distance(x, y)) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
    return math.log(sum(near) / len(near))


def usage_by_loop(rows: Tensor, block: Tensor) -> float:
    nearest = Counter(min(range(len(block)), key=lambda slot: square_distance(row, block[slot])) for row in rows)
    shares = [count / len(rows) for count in nearest.values()]
    return -sum(share * math.log(share) for share in shares) / math.log(min(len(block), len(rows)))


@pytest.mark.parametrize(("rows", "slots"), [(7, 12), (30, 5), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_are_those_of_loops(monkeypatch, rows, slots, dtype):
    monkeypatch.setattr(collapse, "AT_ONCE", 4)  # several parts, the last one shorter
    x, y, block = unit_rows(rows, 6, 0, dtype), unit_rows(rows, 6, 1, dtype), unit_rows(slots, 6, 2, dtype)
    tolerance = DOUBLE if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(alignment(x, y).double(), scalar(alignment_by_loop(x, y)), **tolerance)
    torch.testing.assert_close(uniformity(x).double(), scalar(uniformity_by_loop(x)), **tolerance)
    torch.testing.assert_close(memory_usage(x, block).double(), scalar(usage_by_loop(x, block)), **tolerance)
    signs = signs_of_collapse(x, block)
    assert signs.dtype == dtype and signs.shape == (4,)
    assert torch.equal(signs, torch.stack([*embedding_spread(x), uniformity(x), memory_usage(x, block)]))


# ---- where the answer is known ---------------------------------------------------------------------------------------


def test_embedding_spread():
    point = torch.ones(6, 4, dtype=torch.float64) / 2
    torch.testing.assert_close(embedding_spread(point)[0], torch.zeros((), dtype=torch.float64), atol=1e-6, rtol=0)
    both_ways = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    torch.testing.assert_close(embedding_spread(both_ways), torch.tensor([1.0, 4.0], dtype=torch.float64))
    wide = torch.cat([torch.eye(40)[:3], -torch.eye(40)[:3]]).double()  # fewer rows than dimensions
    torch.testing.assert_close(embedding_spread(wide), torch.tensor([1.0, 3.0], dtype=torch.float64))


def test_alignment():
    axes = torch.eye(5, dtype=torch.float64)
    assert [alignment(axes, other).item() for other in (axes, axes.roll(1, 0), -axes)] == [0, 2, 4]


def test_uniformity():
    axes = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(uniformity(axes[:1].expand(7, 5)), scalar(0.0), **DOUBLE)
    torch.testing.assert_close(uniformity(axes), scalar(-4.0), **DOUBLE)  # |x - y|^2 = 2
    torch.testing.assert_close(uniformity(torch.stack([axes[0], -axes[0]])), scalar(-8.0), **DOUBLE)
    assert uniformity(unit_rows(500, 128)).item() == pytest.approx(-4, abs=0.1)


def test_memory_usage():
    block, rows = torch.eye(8, dtype=torch.float64), torch.arange(8)
    torch.testing.assert_close(memory_usage(block, block), scalar(1.0), **DOUBLE)  # each another row
    torch.testing.assert_close(memory_usage(block[rows % 2], block), scalar(1 / 3), **DOUBLE)  # two of eight
    torch.testing.assert_close(memory_usage(block[rows % 2], block[:2]), scalar(1.0), **DOUBLE)  # both of two
    assert memory_usage(block[:1].expand(8, 8), block).item() == 0
    assert memory_usage(block, block.bfloat16()).item() == pytest.approx(1)  # memory.dtype


def test_one_row_or_one_slot_is_no_error():
    rows = unit_rows(3, 4)
    assert uniformity(rows[:1]).item() == memory_usage(rows[:1], rows).item() == memory_usage(rows, rows[:1]).item() == 0
    assert signs_of_collapse(rows[:1], rows).isfinite().all()


def test_nearly_one_point_keeps_its_digits():
    """fp32, as in training: exp(-2 |x - y|^2) is near 1, and the mean must leave out the rows themselves."""
    rows = torch.nn.functional.normalize(unit_rows(1, 16).expand(64, 16) + 0.05 * unit_rows(64, 16, 1), dim=1)
    assert uniformity(rows.float()).item() == pytest.approx(uniformity_by_loop(rows), abs=1e-6)
