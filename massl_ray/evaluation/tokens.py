"""Patch tokens of any backbone: a vision transformer's tokens without class and register tokens, a conv net's last feature map."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ROWS = 32  # images at once


def patch_tokens(backbone: nn.Module, images: Tensor) -> Tensor:
    """(n, h, w, D) float32 on the CPU, for square images (n, C, side, side), normalized.

    Raises ValueError where the backbone gives no map of the image: its tokens are no square grid.
    """
    with evaluating(backbone):
        made = [backbone.forward_features(rows) for rows in images.split(ROWS)]  # type: ignore[operator]
        return torch.cat([as_map(backbone, features).float().cpu() for features in made])


def as_map(backbone: nn.Module, features: Tensor) -> Tensor:
    """What `forward_features` gave for square images, as (n, h, w, D)."""
    if features.ndim == 4:
        first, last = features.shape[1] == features.shape[2], features.shape[2] == features.shape[3]
        channels_last = first and (not last or str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC"))
        return features if channels_last else features.permute(0, 2, 3, 1)
    if features.ndim != 3:
        raise ValueError(f"its features have the shape {tuple(features.shape)}, which is no map of the image")
    tokens = features[:, prefix_tokens(backbone) :]
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1] or not side:
        raise ValueError(f"its {tokens.shape[1]} tokens are no square grid")
    return tokens.unflatten(1, (side, side))


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
