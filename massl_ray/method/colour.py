"""Colour jitter in few passes over the pixels.

Brightness, contrast and saturation are affine maps of a pixel's colour. They are composed as long as nothing can leave
0..255, because there a step's result is cut off before the next one sees it.
"""

from dataclasses import dataclass

import cv2
import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class Jitter:
    brightness: float  # factor, 1 keeps
    contrast: float  # factor, 1 keeps
    saturation: float  # factor, 1 keeps
    hue: float  # turns of the colour wheel, 0 keeps
    order: tuple[int, ...]  # in which the four are applied


def apply_jitter(pixels: np.ndarray, jitter: Jitter) -> np.ndarray:
    """`pixels` (h, w, 3) uint8 RGB, jittered."""
    factors = {BRIGHTNESS: jitter.brightness, CONTRAST: jitter.contrast, SATURATION: jitter.saturation}
    pending, offset = np.eye(3), np.zeros(3)  # colour -> pending @ colour + offset, not yet applied
    for operation in jitter.order:
        if operation != HUE:
            factor = factors[operation]
            if operation == CONTRAST:  # towards the mean of the gray image; it is affine, too
                mean = LUMA @ (pending @ cv2.mean(pixels)[:3] + offset)
                offset = factor * offset + (1 - factor) * mean
                pending = factor * pending
            else:
                step = factor * np.eye(3) + ((1 - factor) * LUMA if operation == SATURATION else 0)
                pending, offset = step @ pending, step @ offset
        if operation == HUE or factors[operation] > 1:
            pixels = _affine(pixels, pending, offset)
            pending, offset = np.eye(3), np.zeros(3)
        if operation == HUE:
            pixels = _turn_hue(pixels, jitter.hue)
    return _affine(pixels, pending, offset)


def to_gray(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) to (h, w)."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _affine(pixels: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    if (matrix == np.eye(3)).all() and not offset.any():
        return pixels
    return cv2.transform(pixels, np.column_stack([matrix, offset]))


def _turn_hue(pixels: np.ndarray, turns: float) -> np.ndarray:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turns * 256) % 256)  # wraps, as hues do
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
