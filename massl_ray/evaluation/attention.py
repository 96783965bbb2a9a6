"""Self-attention of a vision transformer's last block, by head: what the vector that stands for the image is gathered from."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from massl_ray.evaluation.tokens import ROWS, evaluating, prefix_tokens

MASS = 0.6  # of the attention that a thresholded map keeps (Caron et al., ICCV 2021, figure 3)
CLASS, MEAN = "class token", "mean over the patches"


class NoAttention(Exception):
    """A sentence for people: the backbone has no self-attention from one token to all patches."""


@dataclass(frozen=True)
class Attention:
    """Rows of softmax: `patches` and `prefix` of a head sum to 1 together."""

    patches: Tensor  # (n, heads, h, w) float32: what goes to each patch
    prefix: Tensor  # (n, heads, class and register tokens): the rest
    query: str  # who attends: CLASS, or MEAN where no class token makes the pooled features


def self_attention(backbone: nn.Module, images: Tensor) -> Attention:
    """For square images (n, C, side, side), normalized.

    The last block's attention is computed without the fused kernel, by timm's own code, and read on its way; so rotary positions,
    normalized queries and relative biases are in it.

    Raises NoAttention.
    """
    block = _last_attention(backbone)
    parts: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        parts.append(inputs[0].float().cpu())

    handle = block.attn_drop.register_forward_pre_hook(keep)  # type: ignore[operator,union-attr]
    try:
        with evaluating(backbone), _not_fused(block):
            for rows in images.split(ROWS):
                backbone.forward_features(rows)  # type: ignore[operator]
    finally:
        handle.remove()
    weights = torch.cat(parts)  # (n, heads, tokens, tokens)
    first = prefix_tokens(backbone)
    side = math.isqrt(weights.shape[-1] - first)
    if weights.ndim != 4 or weights.shape[-1] != weights.shape[-2] or side * side + first != weights.shape[-1] or not side:
        raise NoAttention(f"Its last block attends within windows or in another form ({tuple(weights.shape)}): nothing to show.")
    by_class = _pools_class_token(backbone)
    row = weights[:, :, 0] if by_class else weights[:, :, first:].mean(2)
    return Attention(row[..., first:].unflatten(-1, (side, side)), row[..., :first], CLASS if by_class else MEAN)


def mass_mask(maps: np.ndarray, mass: float = MASS) -> np.ndarray:
    """The fewest patches of each map (..., h, w) that hold at least `mass` of its sum: bool of the same shape. Of equal ones the
    first count."""
    flat = maps.reshape(-1, maps.shape[-2] * maps.shape[-1]).astype(np.float64)
    order = np.argsort(-flat, axis=1, kind="stable")
    held = np.cumsum(np.take_along_axis(flat, order, 1), 1)
    kept = (held < mass * held[:, -1:]).sum(1) + 1
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, order, np.arange(flat.shape[1]) < kept[:, None], 1)
    return mask.reshape(maps.shape)


def peaks(maps: np.ndarray) -> np.ndarray:
    """How many times as much as even attention the strongest patch of each map (..., h, w) gets: 1 shows nothing."""
    means = maps.mean((-2, -1))
    return np.divide(maps.max((-2, -1)), means, out=np.ones(means.shape), where=means > 0)


def _last_attention(backbone: nn.Module) -> nn.Module:
    name = type(backbone).__name__
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not hasattr(backbone, "num_prefix_tokens"):
        raise NoAttention(f"{name} has no token that attends to all patches, as vision transformers have.")
    found = [module for module in blocks.modules() if isinstance(getattr(module, "attn_drop", None), nn.Module)]
    if not found:
        raise NoAttention(f"The blocks of {name} have no attention that can be read.")
    return found[-1]


def _pools_class_token(backbone: nn.Module) -> bool:
    return getattr(backbone, "cls_token", None) is not None and getattr(backbone, "global_pool", "token") == "token"


@contextmanager
def _not_fused(block: nn.Module) -> Iterator[None]:
    fused = getattr(block, "fused_attn", None)
    if fused is not None:
        block.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        if fused is not None:
            block.fused_attn = fused
