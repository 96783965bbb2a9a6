"""Quality without labels: cases with known figures."""

import math

import numpy as np
import pytest
from scipy.stats import skew

from massl_ray.errors import UserError
from massl_ray.evaluation.alterations import RandomCrop
from massl_ray.evaluation.quality import quality, ranks
from massl_ray.evaluation.results import Split


def figures(vectors: np.ndarray, **options) -> dict[str, float]:
    split = Split(np.asarray(vectors, dtype=np.float32), None)
    return {name: figure.value for name, figure in quality(split, split, **options).figures.items()}


def normal(n: int, dims: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dims))


def test_ranks_of_known_spectra():
    turned = np.linalg.qr(normal(6, 6))[0]
    spectrum = np.array([4.0, 2.0, 1.0, 1.0, 0.0, 0.0])
    points = np.concatenate([np.eye(6), -np.eye(6)]) * np.sqrt(np.tile(spectrum, 2))[:, None] @ turned
    shares = spectrum[:4] / 8
    expected = 64 / 22, math.exp(-sum(share * math.log(share) for share in shares))
    assert ranks(points) == pytest.approx(expected)
    assert ranks(points + 100) == pytest.approx(expected)  # the mean is no direction
    assert ranks(points[:, :, None].repeat(9, 2).reshape(12, -1)) == pytest.approx(expected)  # fewer images than dims
    assert ranks(np.ones((5, 3))) == (1, 1)


def test_an_even_sphere():
    found = figures(normal(1000, 8))
    assert found["effective_rank"] == pytest.approx(8, abs=0.1) and found["entropy_rank"] == pytest.approx(8, abs=0.1)
    # E exp(4 cos - 4) on the 7-sphere by its density (1 - c^2)^((8 - 3) / 2)
    grid = np.linspace(-1, 1, 20001)
    density = (1 - grid**2) ** 2.5
    assert found["uniformity"] == pytest.approx(math.log((np.exp(4 * grid - 4) * density).sum() / density.sum()), abs=0.02)


def test_one_point_is_the_worst():
    found = figures(np.ones((50, 8)))
    assert (found["effective_rank"], found["entropy_rank"]) == (1, 1)
    assert found["uniformity"] == pytest.approx(0, abs=1e-5)


def test_uniformity_and_hubness_agree_with_a_loop():
    vectors = normal(40, 5)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    kernel = [math.exp(-2 * ((a - b) ** 2).sum()) for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
    counts = [0] * 40
    for i, a in enumerate(unit):
        nearest = sorted((j for j in range(40) if j != i), key=lambda j, a=a: -float(unit[j] @ a))[:3]
        for j in nearest:
            counts[j] += 1
    found = figures(vectors, neighbours=3)
    assert found["uniformity"] == pytest.approx(math.log(np.mean(kernel)), abs=1e-5)
    assert found["hubness"] == pytest.approx(skew(counts))


def other(vectors: np.ndarray):
    """Features of a random crop of each test image."""

    def views_of(side, alteration):
        assert side == "test" and alteration == RandomCrop(area=(0.32, 1.0))
        return Split(vectors.astype(np.float32), None)

    return views_of


def test_alignment():
    vectors = normal(30, 5)
    assert figures(vectors, views_of=other(vectors * 7))["alignment"] == pytest.approx(0, abs=1e-9)
    assert figures(vectors, views_of=other(-vectors))["alignment"] == pytest.approx(4)
    turned = np.stack([vectors[:, 1], -vectors[:, 0], *[0 * vectors[:, 0]] * 3], axis=1)
    flat = np.concatenate([vectors[:, :2], np.zeros((30, 3))], axis=1)
    assert figures(flat, views_of=other(turned))["alignment"] == pytest.approx(2)  # right angles
    assert "alignment" not in figures(vectors)


def test_intervals_hold_and_large_sets_are_sampled():
    vectors = normal(300, 6).astype(np.float32)
    split = Split(vectors, None)
    result = quality(split, split, most=100)
    assert result.parameters["images_in_pairs"] == 100
    assert all(figure.low < figure.value < figure.high for figure in result.figures.values())
    assert result == quality(split, split, most=100) != quality(split, split, most=100, seed=1)


def test_refused():
    split = Split(normal(10, 4).astype(np.float32), None)
    with pytest.raises(UserError, match="3 images or more"):
        quality(split, Split(split.vectors[:2], None))
