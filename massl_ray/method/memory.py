"""The non-parametric memory: a ring of past teacher embeddings, first in, first out."""

import torch
from torch import Tensor

from massl_ray.keyed import Stream, generator


class Memory:
    """K unit rows of width D, starting as random Gaussian directions.

    Attributes:
        rows: (K, D) tensor, written in place.
        pointer: slot of the next write, in [0, K).
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        start = torch.from_numpy(generator(Stream.MEMORY, seed).standard_normal((size, dim)))
        self.rows = torch.nn.functional.normalize(start, dim=1).to(device=device, dtype=dtype)
        self.pointer = 0

    def write(self, embeddings: Tensor) -> None:
        """Write (n, D) rows over the oldest ones, in order, wrapping as a ring; of more than K rows the last K stay."""
        size, count = len(self.rows), len(embeddings)
        kept = embeddings[-size:].to(self.rows.dtype)
        slots = torch.arange(count - len(kept), count, device=self.rows.device).add_(self.pointer).remainder_(size)
        self.rows.index_copy_(0, slots, kept)
        self.pointer = (self.pointer + count) % size


def block_permutation(seed: int, step: int, size: int, block_size: int) -> Tensor:
    """The step's random cut of the memory into blocks: (K // S * S,) int64 slots in block order; a remainder is left out."""
    slots = generator(Stream.BLOCKS, seed, step).permutation(size)
    return torch.from_numpy(slots[: size // block_size * block_size])
