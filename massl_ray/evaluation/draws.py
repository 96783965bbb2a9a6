"""Keyed draws of evaluation: the same seed gives the same held-out part, subsets, resamples and noise anywhere."""

from enum import IntEnum

import numpy as np

from massl_ray.keyed import Stream, generator, seed_for


class Purpose(IntEnum):
    """What a draw of evaluation is for. Append, never renumber: figures of a seed depend on it."""

    BOOTSTRAP = 1
    JACKKNIFE = 2
    HOLD_OUT = 3
    EPOCH = 4
    SUBSET = 5
    KMEANS = 6
    SAMPLE = 7
    CORRUPTION = 8


def keyed(purpose: Purpose, seed: int, first: int = 0, second: int = 0) -> np.random.Generator:
    return generator(Stream.EVALUATION, seed, purpose, first, second)


def random_state(purpose: Purpose, seed: int, first: int = 0) -> int:
    """A 32-bit seed, for scikit-learn."""
    return seed_for(Stream.EVALUATION, seed, purpose, first) % 2**32


def some_of_each(labels: np.ndarray, counts: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Places in `labels` (n,), ascending: of class c any counts[c] images, fewer where it has fewer."""
    order = random.permutation(len(labels))
    chosen = [order[labels[order] == label][:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
