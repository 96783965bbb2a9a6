"""Colour jitter in few passes over the pixels.

Brightness, contrast and saturation are affine maps of a pixel's colour. They are composed until one of them can leave 0..255,
because its result is cut off there before the next one sees it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue
CUT = 0.498  # Pillow and torchvision cut fractions off where OpenCV rounds; whole levels stay
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class Jitter:
    brightness: float  # factor, 1 keeps
    contrast: float  # factor, 1 keeps
    saturation: float  # factor, 1 keeps
    hue: float  # turns of the colour wheel, 0 keeps
    order: tuple[int, ...]  # in which the four are applied


class Affine(NamedTuple):
    """colour -> scale * colour + gray * luma(colour) + offset. What brightness, contrast and saturation do, and their products."""

    scale: float = 1.0
    gray: float = 0.0
    offset: float = 0.0

    def then(self, operation: int, factor: float, mean: float) -> "Affine":
        """Followed by one of the three. `mean` is the mean luma before any of it."""
        if operation == SATURATION:  # a mix with the gray image
            return Affine(factor * self.scale, self.gray + (1 - factor) * self.scale, self.offset - CUT)
        towards = (1 - factor) * ((self.scale + self.gray) * mean + self.offset) if operation == CONTRAST else 0.0
        return Affine(factor * self.scale, factor * self.gray, factor * self.offset + towards - CUT)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        if self == KEEP:
            return pixels
        keep, gray, offset = self
        if pixels.shape[2] != 3:  # never comes with gray
            levels = np.clip(np.rint(keep * np.arange(256) + offset), 0, 255)
            return cv2.LUT(pixels, levels.astype(np.uint8)).reshape(pixels.shape)
        r, g, b = gray * LUMA[0], gray * LUMA[1], gray * LUMA[2]
        matrix = [[keep + r, g, b, offset], [r, keep + g, b, offset], [r, g, keep + b, offset]]
        return cv2.transform(pixels, np.array(matrix))


KEEP = Affine()


def apply_jitter(pixels: np.ndarray, jitter: Jitter) -> np.ndarray:
    """`pixels` (h, w, channels) uint8, jittered. Saturation and hue are of red, green and blue only."""
    factors = (jitter.brightness, jitter.contrast, jitter.saturation)
    pending = KEEP
    coloured = pixels.shape[2] == 3
    for operation in jitter.order:
        if operation in (SATURATION, HUE) and not coloured:
            continue
        if operation == HUE:
            pixels, pending = _turn_hue(pending(pixels), jitter.hue), KEEP
        elif factors[operation] != 1:
            mean = _mean_luma(pixels) if operation == CONTRAST else 0.0
            pending = pending.then(operation, factors[operation], mean)
            if factors[operation] > 1:
                pixels, pending = pending(pixels), KEEP
    return pending(pixels)


def to_gray(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) to (h, w)."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _mean_luma(pixels: np.ndarray) -> float:
    if pixels.shape[2] != 3:
        return float(pixels.mean())
    return sum(weight * level for weight, level in zip(LUMA, cv2.mean(pixels), strict=False))


def _turn_hue(pixels: np.ndarray, turns: float) -> np.ndarray:
    shift = math.floor(turns * 255) % 256  # rounded down it is nearest to torchvision's
    if not shift:
        return pixels
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    row = np.zeros(hsv.shape[1:], np.uint8)
    row[:, 0] = shift
    flat = hsv.reshape(len(hsv), -1)  # whole rows: adding to every third number takes four times as long
    flat += row.ravel()  # wraps, as hues do
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
