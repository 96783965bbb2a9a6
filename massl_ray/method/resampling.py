"""Crops resized by the antialiased bicubic filter of Pillow and torchvision, at a fraction of Pillow's time.

Crops that shrink a lot are taken from a smaller copy of the image.
"""

import math
from functools import cache
from importlib.metadata import version

import cv2
import numpy as np
from PIL import Image

try:
    import cykooz_resizer as fast
except ImportError:  # there is no wheel for Linux on ARM: there Pillow does it, more slowly and a tenth of a level off
    fast = None

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
        self.levels, self.shrink, self.channels = [Level(pixels)], shrink, pixels.shape[2]

    def cut(self, box: Box, side: int) -> np.ndarray:
        """`box` (left, top, right, bottom) of the image, resized to (side, side, channels)."""
        halvings = int(math.log2(max(1, shrinkage(box, side) // self.shrink)))
        while len(self.levels) <= halvings:
            self.levels.append(Level(_half(self.levels[-1].pixels)))
        left, top, right, bottom = (edge / (self.shrink * 2**halvings) for edge in box)
        return self.levels[halvings].resized(side, (left, top, right, bottom))


class Level:
    """Pixels (h, w, channels) uint8 that are handed to the resizer once, for any number of boxes."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        if fast:
            height, width, channels = pixels.shape
            self._kind = fast.PixelType.U8x3 if channels == 3 else fast.PixelType.U8
            self._planes = [fast.ImageData(width, height, self._kind, plane.tobytes()) for plane in _planes(pixels)]
            self._resizer = fast.Resizer()  # not one for all: it keeps what it works on, and threads would meet in it

    def resized(self, side: int, box: Box) -> np.ndarray:
        """As the function `resized`. It works in whole numbers: the same bits from any processor's vector instructions."""
        if not fast:
            return resized(self.pixels, side, box)
        left, top, right, bottom = box
        bicubic = fast.ResizeAlg.convolution(fast.FilterType.catmull_rom)  # the one of a = -1/2, as Pillow's
        options = fast.ResizeOptions(bicubic, crop_box=fast.CropBox(left, top, right - left, bottom - top))
        made = []
        for plane in self._planes:
            target = fast.ImageData(side, side, self._kind)
            self._resizer.resize(plane, target, options)
            made.append(np.frombuffer(target.get_buffer(), np.uint8).reshape(side, side, -1))
        return made[0] if len(made) == 1 else np.concatenate(made, axis=2)


def shrinkage(box: Box, side: int) -> int:
    """The power of two by which the image may be smaller and `box` still be cut to `side` pixels without visible loss."""
    shortest = min(box[2] - box[0], box[3] - box[1])
    return 2 ** max(0, math.floor(math.log2(max(shortest, 1) / (KEPT * side))))


def resized(pixels: np.ndarray, side: int, box: Box | None = None) -> np.ndarray:
    """All or a box of (h, w, channels), resized to (side, side, channels) by Pillow's antialiased bicubic filter: for evaluation,
    which is compared with that of others."""
    made = [np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC, box=box)) for plane in _planes(pixels)]
    return made[0] if pixels.shape[2] == 3 else np.stack(made, axis=2)


@cache
def resizer() -> str:
    """Name and version of what resizes here; the pixels of views depend on it."""
    name = "cykooz-resizer" if fast else "pillow"
    return f"{name} {version(name)}"


def _planes(pixels: np.ndarray) -> list[np.ndarray]:
    """Three channels together, any others one by one."""
    return [pixels] if pixels.shape[2] == 3 else list(np.moveaxis(pixels, 2, 0))


def _half(pixels: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels; an odd edge is repeated."""
    height, width = pixels.shape[:2]
    even = cv2.copyMakeBorder(pixels, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE) if height % 2 or width % 2 else pixels
    half = cv2.resize(even, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return half.reshape(*half.shape[:2], -1)  # OpenCV drops the axis of a single channel
