"""Views made on the training device: the same draws as in `massl_ray.method.views`, applied to a batch by torch.

Cropping, resizing, flipping and blurring are products with a matrix on either side of an image, so that every view of the batch
can have a box and a blur of its own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from massl_ray.method.colour import BRIGHTNESS, CONTRAST, CUT, HUE, LUMA, SATURATION, Jitter
from massl_ray.method.views import ViewParameters

KEEP = Jitter(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, order=(BRIGHTNESS, CONTRAST, SATURATION, HUE))


def device_views(pixels: Tensor, shrunk: Sequence[int], drawn: Sequence[Sequence[ViewParameters]]) -> Tensor:
    """Views of one side, (B, V, side, side, C) uint8, on the device of the images.

    Args:
        pixels: images (B, C, H, W), as `padded` makes them.
        shrunk: how many times smaller each is than the image that its boxes refer to.
        drawn: V parameters for each image, all of one side.
    """
    views = [view for row in drawn for view in row]
    boxes = [[edge / scale for edge in view.box] for row, scale in zip(drawn, shrunk, strict=True) for view in row]
    cut = _cut(pixels, torch.tensor(boxes, device=pixels.device), views[0].side)
    made = _augment(cut.flatten(0, 1), views)
    return made.to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, (len(pixels), -1)).contiguous()


def padded(images: Sequence[Tensor], device: torch.device) -> Tensor:
    """One (B, C, H, W) float32 of (h, w, C) uint8 images of any sizes, with zeros right and below."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    pixels = torch.zeros(len(images), images[0].shape[2], height, width, device=device)
    for image, row in zip(images, pixels, strict=True):
        row[:, : image.shape[0], : image.shape[1]] = image.to(device, non_blocking=True).permute(2, 0, 1)
    return pixels


def _cut(pixels: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Boxes (B*V, 4) of images (B, C, H, W), V of each, resized to (B, V, C, side, side) levels."""
    batch, _, height, width = pixels.shape
    across = _bicubic(boxes[:, 0], boxes[:, 2], side, width).view(batch, -1, 1, side, width)
    down = _bicubic(boxes[:, 1], boxes[:, 3], side, height).view(batch, 1, -1, height)
    rows = (down @ pixels).unflatten(2, (-1, side)).transpose(1, 2)  # (B, V, C, side, W)
    return (rows @ across.mT).round().clamp(0, 255)


def _bicubic(low: Tensor, high: Tensor, side: int, length: int) -> Tensor:
    """Matrices (n, side, length) that resize the pixels from `low` to `high`, each (n,), by the antialiased bicubic kernel."""
    step = ((high - low) / side).view(-1, 1, 1)
    place = torch.arange(length, device=low.device) + 0.5
    center = low.view(-1, 1, 1) + (torch.arange(side, device=low.device).view(-1, 1) + 0.5) * step
    x = ((place - center) / step.clamp_min(1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    inside = (place + 0.5 > low.view(-1, 1, 1)) & (place - 0.5 < high.view(-1, 1, 1))
    weights = weights * inside
    return weights / weights.sum(-1, keepdim=True)


def _augment(pixels: Tensor, views: Sequence[ViewParameters]) -> Tensor:
    """Levels (n, C, side, side), 0..255, in and out; one of `views` for each."""

    def chosen(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=pixels.device).view(-1, 1, 1, 1)

    pixels = torch.where(chosen([view.flip for view in views]), pixels.flip(-1), pixels)
    pixels = _jitter(pixels, [view.jitter or KEEP for view in views])
    if pixels.shape[1] == 3:
        pixels = torch.where(chosen([view.gray for view in views]), _luma(pixels).round(), pixels)
    blur = _gaussian(chosen([view.blur_sigma for view in views]), pixels.shape[-1])
    pixels = (blur @ pixels @ blur.mT).round()
    return torch.where(chosen([view.solarize for view in views]) & (pixels >= 128), 255 - pixels, pixels)


def _jitter(pixels: Tensor, jitters: Sequence[Jitter]) -> Tensor:
    steps: dict[int, tuple[Callable[[Tensor, Tensor], Tensor], list[float]]] = {
        BRIGHTNESS: (lambda x, factor: _levels(x * factor), [jitter.brightness for jitter in jitters]),
        CONTRAST: (_contrast, [jitter.contrast for jitter in jitters]),
        SATURATION: (lambda x, factor: _levels(x * factor + _luma(x) * (1 - factor)), [jitter.saturation for jitter in jitters]),
        HUE: (_turn_hue, [jitter.hue for jitter in jitters]),
    }
    if pixels.shape[1] != 3:  # the others are of red, green and blue
        del steps[SATURATION], steps[HUE]
    for turn in range(4):
        for operation, (step, factors) in steps.items():
            rows = [row for row, jitter in enumerate(jitters) if jitter.order[turn] == operation]
            if rows:
                chosen = torch.tensor(rows, device=pixels.device)
                factor = torch.tensor([factors[row] for row in rows], device=pixels.device).view(-1, 1, 1, 1)
                pixels[chosen] = step(pixels[chosen], factor)
    return pixels


def _levels(pixels: Tensor) -> Tensor:
    return (pixels - CUT).round().clamp(0, 255)


def _luma(pixels: Tensor) -> Tensor:
    """(n, 1, h, w) of (n, C, h, w): the mean where the channels are no colours."""
    if pixels.shape[1] != 3:
        return pixels.mean(1, keepdim=True)
    return (pixels * torch.tensor(LUMA, device=pixels.device).view(-1, 1, 1)).sum(1, keepdim=True)


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    return _levels(pixels * factor + _luma(pixels).mean((2, 3), keepdim=True) * (1 - factor))


def _turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Add to the hue of (n, 3, h, w), keeping each pixel's largest and smallest level."""
    high, low = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    span = high - low
    red, green, blue = pixels.split(1, 1)
    safe = span.clamp_min(1e-6)
    sixth = torch.where(
        high == red, (green - blue) / safe, torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    place = sixth + 6 * turns + torch.tensor([5.0, 3.0, 1.0], device=pixels.device).view(-1, 1, 1)
    place = place.remainder(6)
    return (high - span * torch.minimum(place, 4 - place).clamp(0, 1)).round()


def _gaussian(sigma: Tensor, side: int) -> Tensor:
    """Matrices (n, 1, side, side) that blur one axis by `sigma` (n, 1, 1, 1), 0 for not at all; edges reflect."""
    place = torch.arange(side, device=sigma.device)
    source = place.view(-1, 1)

    def weight(distance: Tensor) -> Tensor:
        distance = distance.abs()
        bell = torch.exp(-0.5 * (distance / sigma.clamp_min(1e-3)) ** 2)
        return torch.where(distance <= (2.5 * sigma).ceil(), bell, 0.0)

    mirrored = weight(source + place) * (place > 0) + weight(2 * (side - 1) - source - place) * (place < side - 1)
    weights = weight(source - place) + mirrored
    return weights / weights.sum(-1, keepdim=True)
