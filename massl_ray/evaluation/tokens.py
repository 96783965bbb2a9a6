"""Patch tokens of any backbone: a vision transformer's tokens without class and register tokens, a conv net's last feature map."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ROWS = 32  # images at once


def patch_tokens(backbone: nn.Module, images: Tensor) -> Tensor:
    """(n, h, w, D) float32 on the CPU, for images (n, C, H, W), normalized.

    Raises ValueError where the backbone gives no map of the image: its tokens are no grid of its proportions.
    """
    height, width = images.shape[2:]
    with evaluating(backbone):
        made = [backbone.forward_features(rows) for rows in images.split(ROWS)]  # type: ignore[operator]
        return torch.cat([as_map(backbone, features, (height, width)).float().cpu() for features in made])


def as_map(backbone: nn.Module, features: Tensor, size: tuple[int, int] = (1, 1)) -> Tensor:
    """What `forward_features` gave for images of `size` (H, W), of which only the proportions matter, as (n, h, w, D). Sides are
    equal, or whole numbers of patches."""
    height, width = size
    if features.ndim == 4:
        first, last = (features.shape[axis] * width == features.shape[axis + 1] * height for axis in (1, 2))
        channels_last = first and (not last or str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC"))
        return features if channels_last else features.permute(0, 2, 3, 1)
    if features.ndim != 3:
        raise ValueError(f"its features have the shape {tuple(features.shape)}, which is no map of the image")
    tokens = features[:, prefix_tokens(backbone) :]
    count = tokens.shape[1]
    h, w = round(math.sqrt(count * height / width)), round(math.sqrt(count * width / height))
    if h * w != count or not count:
        grid = "square grid" if height == width else f"grid of the proportions {height} x {width}"
        raise ValueError(f"its {count} tokens are no {grid}")
    return tokens.unflatten(1, (h, w))


def stride(backbone: nn.Module) -> int:
    """Pixels from one place of the map to the next, as far as the backbone says; else 1."""
    stages = getattr(backbone, "feature_info", None)  # timm's
    if isinstance(stages, list) and stages and "reduction" in stages[-1]:
        return int(stages[-1]["reduction"])
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    return int(patch[0] if isinstance(patch, tuple) else patch)


def prefix_tokens(backbone: nn.Module) -> int:
    """Class and register tokens, which come before those of patches."""
    return int(getattr(backbone, "num_prefix_tokens", 0) or 0)


@contextmanager
def evaluating(backbone: nn.Module) -> Iterator[None]:
    """In evaluation mode without gradients, and as it was afterwards."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        backbone.train(was_training)
