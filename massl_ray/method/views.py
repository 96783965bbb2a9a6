"""Multi-crop views: parameters drawn from keyed randomness, then applied. Drawing and applying are apart, so that another
device can apply the same draws.

Order of operations (paper): crop and resize, flip, colour jitter, gray, blur, solarize.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import cv2
import numpy as np
from numpy.typing import ArrayLike

from massl_ray.config import ViewsSection
from massl_ray.keyed import Stream, generator
from massl_ray.method.colour import Jitter, apply_jitter, to_gray
from massl_ray.method.resampling import Box, Pyramid, resized, shrinkage

ORDERS = tuple(permutations(range(4)))
TRIES = 10  # at a box that fits the image
NUM_DRAWS = 11 + 4 * TRIES  # of a view, whether or not it needs them all: a draw never moves another's place


@dataclass(frozen=True)
class ViewParameters:
    side: int  # pixels of the view
    box: Box  # left, top, right, bottom in pixels of the image
    flip: bool
    jitter: Jitter | None
    gray: bool
    blur_sigma: float  # pixels of the view; 0 for none
    solarize: bool


def draw_view(config: ViewsSection, width: int, height: int, *, seed: int, epoch: int, sample: int, view: int) -> ViewParameters:
    """Draw one view of an image of `width` x `height` pixels: a pure function of (seed, epoch, sample, view)."""
    return _parameters(config, width, height, view, _draws(seed, epoch, sample, view + 1)[view])


def draw_views(config: ViewsSection, width: int, height: int, *, seed: int, epoch: int, sample: int) -> list[ViewParameters]:
    """All views of an image: the two global ones, then the local ones."""
    rows = _draws(seed, epoch, sample, 2 + config.num_local)
    return [_parameters(config, width, height, view, row) for view, row in enumerate(rows)]


def smallest_shrinkage(drawn: list[ViewParameters]) -> int:
    """The power of two by which the image may be smaller and every view still be cut from it without visible loss."""
    return min(shrinkage(view.box, view.side) for view in drawn)


def apply_view(image: Pyramid, view: ViewParameters) -> np.ndarray:
    """Cut and augment: (side, side, channels) uint8. What is of colours happens to red, green and blue only."""
    pixels = image.cut(view.box, view.side)
    shape, gray = pixels.shape, view.gray and image.channels == 3
    if view.flip:
        pixels = cv2.flip(pixels, 1).reshape(shape)
    if view.jitter:
        pixels = apply_jitter(pixels, view.jitter)
    if gray:
        pixels = to_gray(pixels)  # one channel until the end
    if view.blur_sigma:
        pixels = _blur(pixels, view.blur_sigma)
    if view.solarize:
        pixels = np.minimum(pixels, 255 - pixels)  # inverts what is 128 or more
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB) if gray else pixels.reshape(shape)


def apply_views(image: Pyramid, drawn: list[ViewParameters], config: ViewsSection) -> tuple[np.ndarray, np.ndarray]:
    """All views of one image, uint8: global (2, H, W, channels) and local (num_local, h, w, channels)."""
    global_views = np.stack([apply_view(image, view) for view in drawn[:2]])
    if not config.num_local:
        return global_views, np.empty((0, config.local_size, config.local_size, image.channels), np.uint8)
    return global_views, np.stack([apply_view(image, view) for view in drawn[2:]])


def make_views(image: ArrayLike, config: ViewsSection, *, seed: int, epoch: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw and apply all views of one decoded image, (h, w, channels) uint8 or a Pillow image in mode RGB."""
    pixels = np.asarray(image)
    drawn = draw_views(config, pixels.shape[1], pixels.shape[0], seed=seed, epoch=epoch, sample=sample)
    return apply_views(Pyramid(pixels), drawn, config)


def center_view(image: ArrayLike, side: int, share: float) -> np.ndarray:
    """The view for evaluation, (side, side, channels) uint8, of (h, w, channels): the centred square over `share` of the shorter
    side, resized."""
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    cut = min(width, height) * share
    left, top = (width - cut) / 2, (height - cut) / 2
    return resized(pixels, side, (left, top, left + cut, top + cut))


def _draws(seed: int, epoch: int, sample: int, views: int) -> list[list[float]]:
    """A row of uniform draws for each view; more views leave the rows before them as they are."""
    return generator(Stream.VIEWS, seed, epoch, sample).random((views, NUM_DRAWS)).tolist()


def _parameters(config: ViewsSection, width: int, height: int, view: int, draws: list[float]) -> ViewParameters:
    flip, jittered, brightness, contrast, saturation, hue, order, gray, blurred, sigma, solarize = draws[:11]
    kind = min(view, 2)  # first global, second global, local
    jitter = None
    if jittered < config.jitter:
        jitter = Jitter(
            brightness=_between(1 - config.brightness, 1 + config.brightness, brightness),
            contrast=_between(1 - config.contrast, 1 + config.contrast, contrast),
            saturation=_between(1 - config.saturation, 1 + config.saturation, saturation),
            hue=_between(-config.hue, config.hue, hue),
            order=ORDERS[int(order * len(ORDERS))],
        )
    return ViewParameters(
        side=config.global_size if kind < 2 else config.local_size,
        box=_box(draws[11:], width, height, config.global_area if kind < 2 else config.local_area),
        flip=flip < config.flip,
        jitter=jitter,
        gray=gray < config.gray,
        blur_sigma=_between(*config.blur_sigma, sigma) if blurred < config.blur[kind] else 0.0,
        solarize=solarize < config.solarize and kind == 1,
    )


def _box(draws: list[float], width: int, height: int, area: tuple[float, float]) -> Box:
    """Random resized crop: area share uniform, aspect ratio log-uniform in 3/4..4/3; after ten misses the largest centred crop.
    Four draws a try."""
    for n in range(0, 4 * TRIES, 4):
        pixels = width * height * _between(*area, draws[n])
        aspect = math.exp(_between(math.log(3 / 4), math.log(4 / 3), draws[n + 1]))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws[n + 2] * (width - w + 1)), int(draws[n + 3] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw


def _blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur. Taps are multiples of 1/256 that sum to one: OpenCV then computes in whole numbers, without a shift in
    brightness."""
    kernel = _gaussian(round(128 * sigma) / 128)
    return cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


@lru_cache(256)
def _gaussian(sigma: float) -> np.ndarray:
    """Taps (n,) to two and a half standard deviations."""
    reach = math.ceil(2.5 * sigma)
    weights = [math.exp(-0.5 * (place / sigma) ** 2) for place in range(-reach, reach + 1)]
    taps = [round(256 * weight / sum(weights)) for weight in weights]
    taps[reach] += 256 - sum(taps)
    return np.array(taps, dtype=np.float32) / 256
