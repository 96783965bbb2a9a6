"""Corruptions: keyed, stronger by severity, and each does what it says."""

import cv2
import numpy as np
import pytest

from massl_ray.errors import UserError
from massl_ray.evaluation.corruptions import CORRUPTIONS, corrupt


def picture(side: int = 96, channels: int = 3) -> np.ndarray:
    """Smooth ramps and sharp bars."""
    across = np.linspace(20, 220, side)
    image = np.stack([across[:, None] + 0 * across, across[None] + 0 * across[:, None], 240 - across[:, None] + 0 * across], axis=2)
    image[side // 4 : side // 2, :: side // 8] = 250
    return np.resize(image, (side, side, 3))[..., :channels].astype(np.uint8)


IMAGE = picture()


def distance(image: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(((image.astype(float) - other) ** 2).mean()))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_keyed_and_stronger_by_severity(name):
    before = IMAGE.copy()
    found = [corrupt(IMAGE, name, severity) for severity in range(1, 6)]
    assert (IMAGE == before).all()
    assert all(image.shape == IMAGE.shape and image.dtype == np.uint8 for image in found)
    strengths = [distance(IMAGE, image) for image in found]
    assert strengths[0] > 1 and strengths[4] > strengths[0]
    if name not in ("fog", "pixelate"):  # fog has more thickness or finer clouds, blocks fall anyhow on bars
        assert (np.diff(strengths) > 0).all(), strengths
    assert (corrupt(IMAGE, name, 3) == found[2]).all()
    drawn = name in ("gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog")
    for changed in ({"seed": 1}, {"sample": 1}):
        assert (corrupt(IMAGE, name, 3, **changed) != found[2]).any() == drawn


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_number_of_channels_and_any_size(name):
    for channels in (1, 3, 5):
        image = np.resize(IMAGE, (40, 61, channels))
        assert corrupt(image, name, 5).shape == (40, 61, channels)
    black = np.zeros((20, 20, 3), np.uint8)
    assert corrupt(black, name, 1).shape == black.shape


def test_noise_has_its_spread():
    gray = np.full((200, 200, 3), 128, np.uint8)
    assert distance(corrupt(gray, "gaussian_noise", 1), 128) == pytest.approx(0.08 * 255, rel=0.02)
    assert distance(corrupt(gray, "shot_noise", 1), 128) == pytest.approx(np.sqrt(128 / 255 / 60) * 255, rel=0.02)
    noisy = corrupt(gray, "impulse_noise", 4)
    assert (noisy == 0).mean() == pytest.approx(0.085, abs=0.004) and (noisy == 255).mean() == pytest.approx(0.085, abs=0.004)


def test_blurs_keep_the_mean_and_spread_a_point():
    point = np.zeros((224, 224, 1), np.uint8)
    point[108:117, 108:117] = 255
    for name in ("defocus_blur", "motion_blur"):
        blurred = corrupt(point, name, 3)
        assert blurred.mean() == pytest.approx(point.mean(), rel=0.05)
        assert (blurred > 2).sum() > (point > 2).sum() * 1.5
    far = np.argwhere(corrupt(point, "defocus_blur", 2) > 0)
    assert np.abs(far[:, :2] - 112).max() == pytest.approx(4 + 4, abs=1)  # half the square and the radius


def test_contrast_and_brightness_by_hand():
    half = np.zeros((10, 10, 3), np.uint8)
    half[:5] = [100, 50, 0]
    lighter = corrupt(half, "brightness", 2)  # value + 0.2: 100 becomes 151, the others in proportion
    assert lighter[0, 0].tolist() == [151, 76, 0] and lighter[9, 9].tolist() == [51, 51, 51]
    paler = corrupt(half, "contrast", 3)
    assert paler[0, 0].tolist() == [60, 30, 0] and paler[9, 9].tolist() == [40, 20, 0]  # means 50, 25, 0, a fifth kept


def test_pixels_are_those_of_a_smaller_image():
    small = cv2.resize(IMAGE, (24, 24), interpolation=cv2.INTER_AREA)
    assert np.abs(corrupt(IMAGE, "pixelate", 5).astype(int) - small.repeat(4, 0).repeat(4, 1)).max() <= 1


def test_unknown_ones_are_refused():
    with pytest.raises(UserError, match="got snow at 1"):
        corrupt(IMAGE, "snow", 1)
    with pytest.raises(UserError, match="got fog at 6"):
        corrupt(IMAGE, "fog", 6)
