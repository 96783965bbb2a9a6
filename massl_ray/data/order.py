"""Which sample comes when: a pure function of (seed, position), at any size, without ever holding a permutation.

Position p of the run (counted over all steps and epochs) belongs to epoch p // n and is that epoch's permutation at p % n.
The permutation is a Feistel network on the smallest power of four that holds n, walked until it lands inside: a bijection
for every n, so an epoch takes every sample once, and any position is found in a microsecond at a hundred million images.

`Windows` shuffle shards, and then images within a few shards at a time, for data of which no machine holds all.
"""

from dataclasses import dataclass

import numpy as np

from massl_ray.keyed import Stream, generator

ROUNDS = 6


@dataclass(frozen=True)
class Windows:
    """An epoch visits the shards in an order of its own, `width` of them at a time, and shuffles the images of these."""

    starts: np.ndarray  # (shards + 1,) int64, samples that shards begin with, and the number of samples
    width: int  # shards

    def samples(self, offsets: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Sample numbers (n,) of places (n,) in an epoch."""
        shards = len(self.starts) - 1
        order = _permute(np.arange(shards), shards, generator(Stream.ORDER, seed, epoch, 1))
        begins = np.concatenate([[0], np.cumsum(np.diff(self.starts)[order])])  # places at which the shards, so ordered, begin
        edges = np.append(begins[: -1 : self.width], begins[-1])
        windows = np.searchsorted(edges, offsets, "right") - 1
        samples = np.empty_like(offsets)
        for window in np.unique(windows):
            chosen, first = windows == window, edges[window]
            key = generator(Stream.ORDER, seed, epoch, 2, int(window))
            places = first + _permute(offsets[chosen] - first, int(edges[window + 1] - first), key)
            shard = np.searchsorted(begins, places, "right") - 1
            samples[chosen] = self.starts[order[shard]] + places - begins[shard]
        return samples


def samples_at(positions: np.ndarray, size: int, seed: int, windows: Windows | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and sample numbers, both (n,) int64, of run positions (n,) in a data set of `size` images."""
    positions = np.asarray(positions, dtype=np.int64)
    epochs, offsets = np.divmod(positions, size)
    samples = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        if windows:
            samples[chosen] = windows.samples(offsets[chosen], seed, int(epoch))
        else:
            samples[chosen] = _permute(offsets[chosen], size, generator(Stream.ORDER, seed, int(epoch)))
    return epochs, samples


def step_positions(step: int, batch_size: int, first: int, last: int) -> np.ndarray:
    """Run positions of places [first, last) of step `step`'s batch."""
    return np.arange(step * batch_size + first, step * batch_size + last, dtype=np.int64)


def worker_share(rank: int, world_size: int, num_micro_batches: int) -> tuple[int, int]:
    """The run of micro-batches [first, last) that one of `world_size` workers computes; shares differ by at most one."""
    return rank * num_micro_batches // world_size, (rank + 1) * num_micro_batches // world_size


def _permute(values: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = random.integers(0, 2**64, size=ROUNDS, dtype=np.uint64)
    walked = _feistel(values.astype(np.uint64), keys, half_bits)
    while (outside := walked >= size).any():
        walked[outside] = _feistel(walked[outside], keys, half_bits)
    return walked.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> np.uint64(half_bits), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << np.uint64(half_bits)) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
