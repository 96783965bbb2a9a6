"""Standard corruptions of images at five severities.

Kinds and strengths are those of Hendrycks and Dietterich, ICLR 2019 (ImageNet-C, defined for 224 px); the code is our own and
simpler, so figures compare models with each other and not with published ones. Lengths in pixels grow with the image's side.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from math import cos, radians, sin
from typing import Any

import cv2
import numpy as np
from PIL import Image

from massl_ray.errors import UserError
from massl_ray.evaluation.draws import Purpose, keyed

Random = np.random.Generator
SIDE = 224  # px, what lengths are meant for


def _gaussian_noise(x: np.ndarray, spread: float, random: Random) -> np.ndarray:
    return x + random.normal(scale=spread, size=x.shape)


def _shot_noise(x: np.ndarray, photons: float, random: Random) -> np.ndarray:
    return random.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, share: float, random: Random) -> np.ndarray:
    """Salt and pepper, as much of each, in each channel for itself."""
    draws = random.random(x.shape)
    return np.where(draws < share / 2, 0.0, np.where(draws < share, 1.0, x))


def _blurred(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return cv2.filter2D(x, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101).reshape(x.shape)


def _defocus_blur(x: np.ndarray, radius: float, random: Random) -> np.ndarray:
    """By a disk with soft edges."""
    radius *= max(x.shape[:2]) / SIDE
    reach = int(np.ceil(radius)) + 1
    across = np.arange(-reach, reach + 1)
    return _blurred(x, np.clip(radius + 0.5 - np.hypot(across[:, None], across), 0, 1))


def _motion_blur(x: np.ndarray, strength: tuple[float, float], random: Random) -> np.ndarray:
    """Along a line of (length, spread) px from each pixel on, at an angle between -45 and 45 degrees, weighted by a Gaussian."""
    length, spread = (number * max(x.shape[:2]) / SIDE for number in strength)
    angle = radians(random.uniform(-45, 45))
    reach = int(np.ceil(length)) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for step in np.arange(0, length + 1e-9, 0.5):
        column, row = reach + step * cos(angle), reach + step * sin(angle)
        kernel[round(row), round(column)] += np.exp(-(step**2) / (2 * max(spread, 1e-6) ** 2))
    return _blurred(x, kernel)


def _fog(x: np.ndarray, strength: tuple[float, float], random: Random) -> np.ndarray:
    """Clouds of (thickness, decay) over the image: noise of doubling fineness, each octave weaker by the decay."""
    thickness, decay = strength
    h, w = x.shape[:2]
    clouds, weight, cells = np.zeros((h, w)), 1.0, 2
    while cells <= max(h, w):
        clouds += weight * cv2.resize(random.random((cells, cells)), (w, h), interpolation=cv2.INTER_CUBIC)
        weight, cells = weight / decay, cells * 2
    clouds = (clouds - clouds.min()) / max(float(np.ptp(clouds)), 1e-9)
    brightest = float(x.max())
    return (x + thickness * clouds[..., None]) * brightest / max(brightest + thickness, 1e-9)


def _brightness(x: np.ndarray, more: float, random: Random) -> np.ndarray:
    """The largest channel, HSV's value, raised by `more` with hue and saturation kept."""
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + more, 1)
    return np.where(value > 0, x * raised / np.maximum(value, 1e-9), raised)


def _contrast(x: np.ndarray, kept: float, random: Random) -> np.ndarray:
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * kept + mean


def _pixelate(x: np.ndarray, share: float, random: Random) -> np.ndarray:
    h, w = x.shape[:2]
    size = max(1, int(w * share)), max(1, int(h * share))
    small = [cv2.resize(channel, size, interpolation=cv2.INTER_AREA) for channel in np.moveaxis(x, 2, 0)]
    return np.stack([cv2.resize(channel, (w, h), interpolation=cv2.INTER_NEAREST) for channel in small], axis=2)


def _jpeg(x: np.ndarray, quality: int, random: Random) -> np.ndarray:
    """Each channel for itself unless there are three."""
    pixels = _bytes(x)
    if x.shape[2] != 3:
        return np.stack([_jpeg_of(pixels[..., channel], quality) for channel in range(x.shape[2])], axis=2)
    return _jpeg_of(pixels, quality)


def _jpeg_of(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255.0


Corruption = tuple[Callable[[np.ndarray, Any, Random], np.ndarray], Sequence[Any]]
CORRUPTIONS: Mapping[str, Corruption] = {  # values of severity 1 to 5
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (_defocus_blur, (3, 4, 6, 8, 10)),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "fog": (_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg, (25, 18, 15, 10, 7)),
}
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(image: np.ndarray, name: str, severity: int, *, seed: int = 0, sample: int = 0) -> np.ndarray:
    """(h, w, c) uint8 -> the same shape. Noise, angle and clouds are drawn for (seed, sample, kind): not anew for each severity,
    so that severities differ in strength alone. Raises UserError for a kind or severity that there is not."""
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise UserError(f"corruptions are {', '.join(CORRUPTIONS)} at severities 1 to 5, got {name} at {severity}")
    apply, strengths = CORRUPTIONS[name]
    random = keyed(Purpose.CORRUPTION, seed, list(CORRUPTIONS).index(name), sample)
    return _bytes(apply(image / 255.0, strengths[severity - 1], random))


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
