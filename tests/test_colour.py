"""Colour jitter: the composed maps against one operation after another, and where levels are cut off."""

from itertools import permutations

import numpy as np
import pytest
from torchvision.transforms import functional as reference

from massl_ray.method.colour import BRIGHTNESS, CONTRAST, HUE, KEEP, SATURATION, Affine, Jitter, apply_jitter, to_gray
from tests.helpers import photograph

ADJUST = {
    BRIGHTNESS: reference.adjust_brightness,
    CONTRAST: reference.adjust_contrast,
    SATURATION: reference.adjust_saturation,
    HUE: reference.adjust_hue,
}


def difference(one, other) -> float:
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


def test_affine_by_hand():
    pixels = np.array([[[10, 20, 30]]], np.uint8)  # luma 18.15
    assert Affine(scale=2.0, gray=1.0, offset=3.0)(pixels).tolist() == [[[41, 61, 81]]]
    assert Affine(offset=-15.0)(pixels).tolist() == [[[0, 5, 15]]]
    assert KEEP(pixels) is pixels


@pytest.mark.parametrize("factors", [(0.7, 0.6, 0.8), (1.4, 0.6, 0.8), (0.7, 1.4, 1.2), (1.4, 1.4, 1.2), (1.0, 1.3, 1.0)])
@pytest.mark.parametrize("order", list(permutations((BRIGHTNESS, CONTRAST, SATURATION))))
def test_composed_as_one_after_another(factors, order):
    """Whichever can leave 0..255 and is cut off there; without hue, which has its own rounding."""
    image = photograph(96, 64)
    expected = image
    for operation in order:
        expected = ADJUST[operation](expected, factors[operation])
    found = apply_jitter(np.asarray(image), Jitter(*factors, hue=0.0, order=(*order, HUE)))
    assert difference(found, expected) < 0.75
    assert difference(image, expected) > 3


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_every_order(order):
    image = photograph(96, 64)
    jitter = Jitter(brightness=1.3, contrast=1.3, saturation=1.15, hue=-0.08, order=order)
    expected = image
    for operation in order:
        expected = ADJUST[operation](expected, (1.3, 1.3, 1.15, -0.08)[operation])
    assert difference(apply_jitter(np.asarray(image), jitter), expected) < 1.5


def test_nothing_to_do_changes_nothing():
    pixels = np.asarray(photograph(96, 64))
    assert apply_jitter(pixels, Jitter(1.0, 1.0, 1.0, 0.0, (3, 1, 0, 2))) is pixels


def test_gray_by_hand():
    pixels = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    assert to_gray(pixels).tolist() == [[76, 150, 29, 255]]
