"""The map as a picture: what stands for a place, and which colours classes have."""

import io

import numpy as np
from matplotlib import colormaps
from PIL import Image

from massl_ray.reporting.plane import CELLS, GRAY, draw_map, representatives


def test_the_point_nearest_to_the_middle_stands_for_its_cell_whatever_the_order():
    points = np.array([[0.1, 0.1], [0.45, 0.6], [0.9, 0.5], [3.2, 7.9], [CELLS, CELLS]])
    assert representatives(points) == {(0, 0): 1, (3, 7): 3, (CELLS - 1, CELLS - 1): 4}
    order = np.array([1, 4, 3, 0, 2])
    assert {cell: order[index] for cell, index in representatives(points[order]).items()} == representatives(points)


def colours_of(png: bytes) -> dict[tuple[int, int, int], int]:
    """How many pixels each has."""
    pixels, counts = np.unique(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3), axis=0, return_counts=True)
    return {(int(r), int(g), int(b)): int(n) for (r, g, b), n in zip(pixels, counts, strict=True)}


def shade(index: int) -> tuple[int, int, int]:
    red, green, blue, _ = colormaps["tab20"](index, bytes=True)
    return int(red), int(green), int(blue)


def test_the_largest_classes_have_the_strong_shades():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), [5] * 11 + [200])
    found = colours_of(draw_map(random.normal(size=(255, 2)), labels, [f"class {n}" for n in range(12)]))
    assert found[shade(0)] > 5 * found[shade(2)] > 0  # of the last class, the largest
    assert found[shade(1)] > 0 and shade(5) not in found  # of the eleventh; twelve classes have no thirteenth shade


def test_classes_beyond_those_named_are_small_and_gray():
    labels = np.repeat(np.arange(30), 4)
    found = colours_of(draw_map(np.random.default_rng(0).normal(size=(120, 2)), labels, [f"class {n}" for n in range(30)]))
    gray = tuple(int(GRAY[at : at + 2], 16) for at in (1, 3, 5))
    assert 0 < found[gray] < 44 * found[shade(0)] / 4 / 2  # 44 points, each less than half as large as one of the 4 of a class
    assert shade(19) not in found  # 19 have a shade of their own
