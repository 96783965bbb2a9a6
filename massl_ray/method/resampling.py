"""Crops resized as Pillow's antialiased bicubic filter does, at a fraction of its time.

A crop that shrinks is low-passed by the bicubic kernel stretched to the new pixel distance, then sampled by bicubic
interpolation: two passes of vector code. Crops that shrink a lot are taken from a smaller copy of the image.
"""

import math
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]

KEPT = 2
"""Pixels a side that smaller copies keep for each pixel of a view. With fewer, aliases of the copy show in the view."""


class Pyramid:
    """An image and halves of it, each made when it is first asked for.

    Args:
        pixels: (h, w, channels) uint8.
        shrink: how many times smaller `pixels` is than the image that boxes refer to.
    """

    def __init__(self, pixels: np.ndarray, shrink: int = 1):
        self.levels, self.shrink, self.channels = [pixels], shrink, pixels.shape[2]

    def cut(self, box: Box, side: int) -> np.ndarray:
        """`box` (left, top, right, bottom) of the image, resized to (side, side, channels)."""
        halvings = int(math.log2(max(1, shrinkage(box, side) // self.shrink)))
        while len(self.levels) <= halvings:
            self.levels.append(_half(self.levels[-1]))
        scale = self.shrink * 2**halvings
        cut = _resize(self.levels[halvings], tuple(edge / scale for edge in box), side)  # type: ignore[arg-type]
        return cut.reshape(side, side, self.channels)  # OpenCV drops the axis of a single one


def shrinkage(box: Box, side: int) -> int:
    """The power of two by which the image may be smaller and `box` still be cut to `side` pixels without visible loss."""
    shortest = min(box[2] - box[0], box[3] - box[1])
    return 2 ** max(0, math.floor(math.log2(max(shortest, 1) / (KEPT * side))))


def resized(pixels: np.ndarray, side: int, box: Box | None = None) -> np.ndarray:
    """All or a box of (h, w, channels), resized to (side, side, channels) by Pillow's antialiased bicubic filter."""
    planes = [pixels] if pixels.shape[2] == 3 else np.moveaxis(pixels, 2, 0)
    made = [np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC, box=box)) for plane in planes]
    return made[0] if pixels.shape[2] == 3 else np.stack(made, axis=2)


def _resize(pixels: np.ndarray, box: Box, side: int) -> np.ndarray:
    left, top, right, bottom = box
    x, y = int(left), int(top)
    crop = pixels[y : math.ceil(bottom), x : math.ceil(right)]
    step_x, step_y = (right - left) / side, (bottom - top) / side
    if step_x > 1 or step_y > 1 or x < left or y < top:
        across, down = _bicubic(_stretch(step_x), left - x), _bicubic(_stretch(step_y), top - y)
        crop = cv2.sepFilter2D(crop, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    resized = cv2.resize(crop, None, fx=1 / step_x, fy=1 / step_y, interpolation=cv2.INTER_CUBIC)
    return resized[:side, :side]  # more where the box ends within a pixel


def _stretch(step: float) -> float:
    """The kernel is stretched, never squeezed; in steps too small to see, so that kernels are met again."""
    return round(64 * max(step, 1)) / 64


@lru_cache(4096)
def _bicubic(stretch: float, offset: float) -> np.ndarray:
    """Taps (n,) of the bicubic kernel (a = -1/2) stretched to a pixel distance of `stretch`, and shifted by `offset` pixels, so
    that the filtered image begins where a box does."""
    reach = math.ceil(1.75 * stretch + offset) - 1  # beyond are its last, tiny quarters
    taps = [_cubic(abs(place - offset) / stretch) for place in range(-reach, reach + 1)]
    total = sum(taps)
    return np.array([tap / total for tap in taps], dtype=np.float32)


def _cubic(x: float) -> float:
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _half(pixels: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels; an odd edge is repeated."""
    height, width = pixels.shape[:2]
    even = cv2.copyMakeBorder(pixels, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE) if height % 2 or width % 2 else pixels
    return cv2.resize(even, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
