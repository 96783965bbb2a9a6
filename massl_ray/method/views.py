"""Multi-crop views: parameters drawn from keyed randomness, then applied. Drawing and applying are apart, so that another
device can apply the same draws.

Order of operations (paper): crop and resize, flip, colour jitter, gray, blur, solarize.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from massl_ray.config import ViewsSection
from massl_ray.keyed import Stream, generator


@dataclass(frozen=True)
class Jitter:
    brightness: float  # factor, 1 keeps
    contrast: float  # factor, 1 keeps
    saturation: float  # factor, 1 keeps
    hue: float  # turns of the colour wheel, 0 keeps
    order: tuple[int, ...]  # in which the four are applied


@dataclass(frozen=True)
class ViewParameters:
    side: int  # pixels of the view
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image
    flip: bool
    jitter: Jitter | None
    gray: bool
    blur_sigma: float  # pixels of the view; 0 for none
    solarize: bool


def draw_view(config: ViewsSection, width: int, height: int, *, seed: int, epoch: int, sample: int, view: int) -> ViewParameters:
    """Draw one view of an image of `width` x `height` pixels: a pure function of (seed, epoch, sample, view)."""
    random = generator(Stream.VIEWS, seed, epoch, sample, view)
    kind = min(view, 2)  # first global, second global, local
    jitter = None
    box = _draw_box(random, width, height, config.global_area if kind < 2 else config.local_area)
    flip = random.random() < config.flip
    if random.random() < config.jitter:
        jitter = Jitter(
            brightness=_factor(random, config.brightness),
            contrast=_factor(random, config.contrast),
            saturation=_factor(random, config.saturation),
            hue=random.uniform(-config.hue, config.hue),
            order=tuple(random.permutation(4).tolist()),
        )
    gray = random.random() < config.gray
    blurred = random.random() < config.blur[kind]
    sigma = random.uniform(*config.blur_sigma)
    solarize = random.random() < config.solarize and kind == 1
    side = config.global_size if kind < 2 else config.local_size
    return ViewParameters(side, box, flip, jitter, gray, sigma if blurred else 0.0, solarize)


def apply_view(image: Image.Image, view: ViewParameters) -> np.ndarray:
    """Cut and augment: (side, side, 3) uint8, RGB. `image` is in mode RGB."""
    crop = image.resize((view.side, view.side), Image.Resampling.BICUBIC, box=view.box)
    if view.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view.jitter:
        crop = _apply_jitter(crop, view.jitter)
    if view.gray:
        crop = crop.convert("L").convert("RGB")
    if view.blur_sigma:
        crop = crop.filter(ImageFilter.GaussianBlur(view.blur_sigma))
    if view.solarize:
        crop = ImageOps.solarize(crop)
    return np.asarray(crop)


def make_views(image: Image.Image, config: ViewsSection, *, seed: int, epoch: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """All views of one image, uint8: global (2, H, W, 3) and local (num_local, h, w, 3)."""
    drawn = [
        draw_view(config, *image.size, seed=seed, epoch=epoch, sample=sample, view=view) for view in range(2 + config.num_local)
    ]
    global_views = np.stack([apply_view(image, view) for view in drawn[:2]])
    if not config.num_local:
        return global_views, np.empty((0, config.local_size, config.local_size, 3), np.uint8)
    return global_views, np.stack([apply_view(image, view) for view in drawn[2:]])


def center_view(image: Image.Image, side: int, share: float) -> np.ndarray:
    """The view for evaluation, (side, side, 3) uint8: the centred square over `share` of the shorter side, resized."""
    width, height = image.size
    cut = min(width, height) * share
    left, top = (width - cut) / 2, (height - cut) / 2
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + cut, top + cut)))


def _draw_box(random: np.random.Generator, width: int, height: int, area: tuple[float, float]) -> tuple[float, float, float, float]:
    """Random resized crop: area share uniform, aspect ratio log-uniform in 3/4..4/3; after ten misses the largest centred crop."""
    for _ in range(10):
        pixels = width * height * random.uniform(*area)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _factor(random: np.random.Generator, strength: float) -> float:
    return random.uniform(1 - strength, 1 + strength)


def _apply_jitter(image: Image.Image, jitter: Jitter) -> Image.Image:
    for operation in jitter.order:
        if operation == 0:
            image = ImageEnhance.Brightness(image).enhance(jitter.brightness)
        elif operation == 1:
            image = ImageEnhance.Contrast(image).enhance(jitter.contrast)
        elif operation == 2:
            image = ImageEnhance.Color(image).enhance(jitter.saturation)
        else:
            hue, saturation, value = image.convert("HSV").split()
            shift = round(jitter.hue * 255)
            hue = hue.point([(level + shift) % 256 for level in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image
