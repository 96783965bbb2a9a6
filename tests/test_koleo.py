"""KoLeo: against loops in float64 and numbers worked out by hand."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from massl_ray.method.koleo import koleo_loss


def unit_rows(rows: int, dim: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


def by_loops(embeddings: torch.Tensor) -> float:
    rows = embeddings.tolist()
    total = 0.0
    for i, row in enumerate(rows):
        total -= math.log(min(math.dist(row, other) for j, other in enumerate(rows) if j != i))
    return total / len(rows)


@pytest.mark.parametrize(("rows", "dim"), [(2, 3), (5, 2), (17, 8), (64, 16)])
def test_equals_loops(rows, dim):
    embeddings = unit_rows(rows, dim, seed=rows)
    before = embeddings.clone()
    assert koleo_loss(embeddings).item() == pytest.approx(by_loops(embeddings), rel=1e-6)
    assert torch.equal(embeddings, before)


def test_by_hand():
    """A square's corners are each sqrt(2) from the next; adding a corner's twin brings two of five rows to a distance near 0.1."""
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    assert koleo_loss(square).item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-6)
    twin = torch.tensor([[math.cos(0.1), math.sin(0.1)]], dtype=torch.float64)
    chord, side = 2 * math.sin(0.05), 2 * math.sin((math.pi / 2 - 0.1) / 2)
    expected = -(2 * math.log(chord) + math.log(side) + 2 * math.log(math.sqrt(2))) / 5
    assert koleo_loss(torch.cat([square, twin])).item() == pytest.approx(expected, rel=1e-6)


def test_gradient_equals_finite_differences():
    embeddings = unit_rows(6, 4, seed=1)
    assert torch.autograd.gradcheck(koleo_loss, embeddings.requires_grad_(), eps=1e-7, atol=1e-6)


def test_a_step_against_the_gradient_pushes_nearest_rows_apart():
    embeddings = normalize(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]]), dim=1).requires_grad_()
    before = koleo_loss(embeddings)
    before.backward()
    moved = normalize(embeddings.detach() - 0.01 * embeddings.grad, dim=1)
    assert torch.dist(moved[0], moved[1]) > torch.dist(embeddings[0], embeddings[1])
    assert koleo_loss(moved) < before


def test_equal_rows_stay_finite():
    embeddings = torch.ones(3, 4).div(2).requires_grad_()
    loss = koleo_loss(embeddings)
    loss.backward()
    assert loss.isfinite() and loss > 10 and embeddings.grad.isfinite().all()
