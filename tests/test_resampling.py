"""Crops resized: as Pillow's antialiased bicubic does, from whole images and from smaller copies."""

import numpy as np
import PIL
import pytest
from PIL import Image

from massl_ray.method import resampling
from massl_ray.method.resampling import Pyramid, resized, resizer, shrinkage
from tests.helpers import photograph


def pillow(image: Image.Image, box: tuple[int, int, int, int], side: int) -> np.ndarray:
    return np.asarray(image.crop(box).resize((side, side), Image.Resampling.BICUBIC))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@pytest.mark.parametrize("width", [20, 32, 33, 40, 51, 64, 90, 127])
@pytest.mark.parametrize("height", [24, 32, 45, 100])
def test_any_shape_of_box(width, height):
    image, box = photograph(320, 240), (90, 60, 90 + width, 60 + height)
    found = Pyramid(np.asarray(image)).cut(box, 32)
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8
    assert difference(found, pillow(image, box, 32)) < 0.7
    assert difference(found, pillow(image, (92, 60, 92 + width, 60 + height), 32)) > 1.0  # two pixels beside


def test_fine_stripes_vanish_when_shrunk():
    """Without the low-pass they would come out as coarse ones."""
    stripes = np.zeros((300, 300, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(Pyramid(stripes).cut((0, 0, 300, 300), 200)[4:-4, 4:-4]) < 24


@pytest.mark.parametrize(("side", "levels"), [(24, 4), (40, 3), (70, 2), (110, 1)])
def test_boxes_much_larger_than_the_view_come_from_smaller_copies(side, levels):
    image, box = photograph(640, 425), (11, 6, 629, 421)
    pyramid = Pyramid(np.asarray(image))
    assert difference(pyramid.cut(box, side), pillow(image, box, side)) < 1.5
    assert [level.pixels.shape[:2] for level in pyramid.levels] == [(425, 640), (213, 320), (107, 160), (54, 80)][:levels]


@pytest.mark.parametrize("box", [(0, 0, 400, 300), (13, 21, 387, 298), (7, 3, 301, 290)])
@pytest.mark.parametrize("shrink", [2, 4])
def test_an_image_that_was_decoded_smaller(shrink, box):
    image = photograph(400, 300)
    small = np.asarray(image.reduce(shrink))
    expected = pillow(image, box, 36)
    assert difference(Pyramid(small, shrink).cut(box, 36), expected) < 2.5
    left, top, right, bottom = box
    beside = (left, top + 2 * shrink, right, bottom + 2 * shrink) if bottom < 290 else (left, top, right - 5 * shrink, bottom)
    assert difference(Pyramid(small, shrink).cut(beside, 36), expected) > 2.5


def test_how_much_smaller_by_hand():
    assert [shrinkage((0, 0, edge, 1000), 100) for edge in (1, 199, 399, 400, 799, 800, 1600)] == [1, 1, 1, 2, 2, 4, 4]
    assert shrinkage((0, 0, 1000, 400), 100) == 2
    assert shrinkage((0, 0, 8000, 8000), 100) == 32


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 500)])
def test_tiny_boxes(size):
    flat = np.full((*size[::-1], 3), (9, 90, 200), np.uint8)
    assert (Pyramid(flat).cut((0, 0, *size), 16) == (9, 90, 200)).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_any_number_of_channels(channels):
    image = np.random.default_rng(0).integers(0, 256, (50, 60, channels), np.uint8)
    found = Pyramid(image).cut((3, 4, 53, 44), 24)
    assert found.shape == (24, 24, channels)
    assert difference(found, resized(image, 24, (3, 4, 53, 44))) < 0.5
    pyramid = Pyramid(image)
    assert pyramid.cut((0, 0, 60, 50), 12).shape == (12, 12, channels)
    assert pyramid.levels[1].pixels.shape == (25, 30, channels)


def test_the_resizer_has_a_name(monkeypatch):
    resizer.cache_clear()
    monkeypatch.setattr(resampling, "fast", None)
    assert resizer() == f"pillow {PIL.__version__}"
    resizer.cache_clear()


def test_the_same_bits_from_any_vector_instructions():
    fast = pytest.importorskip("cykooz_resizer")
    image, found = np.asarray(photograph(160, 120)), set()
    for instructions in ("none", "sse4_1", "avx2"):
        pyramid = Pyramid(image)
        try:
            pyramid.levels[0]._resizer.cpu_extensions = fast.CpuExtensions[instructions]
        except RuntimeError:  # this processor has no such
            continue
        found.add(pyramid.cut((11, 7, 150, 115), 64).tobytes())
    assert len(found) == 1


def test_without_the_fast_resizer_pillow_resizes(monkeypatch):
    image, box = np.asarray(photograph(160, 120)), (11, 7, 150, 115)
    fast = Pyramid(image).cut(box, 64)
    monkeypatch.setattr(resampling, "fast", None)
    slow = Pyramid(image).cut(box, 64)
    assert np.array_equal(slow, resized(image, 64, box))
    assert difference(fast, slow) < 0.5
