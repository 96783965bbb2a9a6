"""The non-parametric memory: a ring of past teacher embeddings, first in, first out."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Slots:
    """The rows that a step's views are compared with, cut into blocks.

    Letters: K memory slots, S slots of the memory a block, B images of the batch, D embedding width.
    """

    rows: Tensor  # (K, D), or (K + 2B, D) where the batch's own rows join them
    order: Tensor  # (num_blocks * block_size,) int64, places in `rows` in block order
    block_size: int  # S, or S + 2B


def memory_slots(memory: Memory, permutation: Tensor, block_size: int) -> Slots:
    """The memory alone, as the paper compares: `permutation` (num_blocks * S,) of its slots, S = `block_size`."""
    return Slots(memory.rows, permutation, block_size)


def joined_slots(memory: Memory, permutation: Tensor, block_size: int, batch: Tensor) -> Slots:
    """The memory's slots, and in every block also the rows `batch` (2B, D): the teacher's embeddings of this step's images.

    A view is then compared with its own image's other view beside what the memory holds of other images, so that no image can
    look like all others without a loss that says so (docs/method.md has the measurements).
    """
    rows = torch.cat([memory.rows, batch.to(memory.rows.dtype)])
    own = torch.arange(len(memory.rows), len(rows), device=permutation.device)
    blocks = permutation.view(-1, block_size)
    order = torch.cat([blocks, own.expand(len(blocks), -1)], dim=1)
    return Slots(rows, order.flatten(), order.shape[1])
