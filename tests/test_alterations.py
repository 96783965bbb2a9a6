"""Altered views: drawn for the image itself, and what they say they are."""

import numpy as np
import pytest

from massl_ray.evaluation.alterations import Corrupted, RandomCrop, described
from massl_ray.evaluation.corruptions import CORRUPTIONS
from massl_ray.evaluation.subjects import open_subject
from massl_ray.method.views import center_view


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def centred(image: np.ndarray) -> np.ndarray:
    return center_view(image, 32, 1.0)


def test_a_corrupted_view_is_the_centred_one_but_for_the_corruption(image):
    shown = Corrupted("contrast", 3).view(image, 32, centred)
    usual = centred(image) / 255
    mean = usual.mean((0, 1))
    np.testing.assert_allclose(shown / 255, (usual - mean) * CORRUPTIONS["contrast"][1][2] + mean, atol=0.5 / 255 + 1e-9)


@pytest.mark.parametrize("make", [lambda **more: Corrupted("gaussian_noise", 2, **more), RandomCrop])
def test_drawn_for_the_image_and_the_seed(make, image):
    first = make().view(image, 32, centred)
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert (make().view(image.copy(), 32, centred) == first).all()
    assert (make(seed=1).view(image, 32, centred) != first).any()
    other = image.copy()
    other[17, 23] ^= 255
    drawn = make().view(other, 32, centred).astype(int) - first
    assert np.abs(drawn).mean() > 5  # not the pixel alone: another draw


def test_random_crops_are_of_the_image_and_flipped_half_of_the_time():
    across = np.broadcast_to(np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None], (96, 128, 3)).copy()
    shares, flips = [], []
    for number in range(200):
        crop = RandomCrop(number).view(across, 32, centred).astype(float)[16, :, 0]
        flips.append(crop[0] > crop[-1])
        shares.append(abs(crop[-1] - crop[0]) / 255)
    assert 0.4 < np.mean(flips) < 0.6
    assert min(shares) > 0.2 and max(shares) > 0.9 and np.std(shares) > 0.1  # 8 % of the area and all of it
    whole = RandomCrop(3, area=(1.0, 1.0)).view(across[:, :96], 32, centred)
    assert min(np.abs(whole.astype(int) - view).max() for view in (centred(across[:, :96]), centred(across[:, 95::-1]))) <= 6


def test_a_subject_takes_the_altered_view(image):
    from dataclasses import replace

    subject = open_subject("pixels")
    altered = replace(subject, alteration=Corrupted("brightness", 5))
    assert altered.view(image).mean() > subject.view(image).mean() + 30
    assert altered.settings == subject.settings | {
        "alteration": {"is": "Corrupted", "kind": "brightness", "severity": 5, "seed": 0}
    }
    assert described(RandomCrop(2)) == {"is": "RandomCrop", "number": 2, "seed": 0, "area": (0.08, 1.0)}
