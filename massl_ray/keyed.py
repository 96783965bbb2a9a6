"""Keyed randomness: every draw is a pure function of what it is for, never of who asks or when.

There is no global generator anywhere in this package. A draw names its stream (what it is for), the run's seed and up to
three counters (step, epoch, sample, view, ...); Philox turns these into the same numbers on every machine.
"""

from enum import IntEnum, unique

import numpy as np


@unique
class Stream(IntEnum):
    """What a draw is for. Values are part of the exactness contract: append, never renumber."""

    WEIGHTS = 1
    MEMORY = 2
    ORDER = 3
    VIEWS = 4
    DROP_PATH = 5
    BLOCKS = 6
    HOLD_OUT = 7
    SWEEP = 8
    MAP = 9
    EVALUATION = 10


def generator(stream: Stream, seed: int, *counters: int) -> np.random.Generator:
    """A generator for one draw. At most three counters, each in [0, 2**64).

    Philox has a 128-bit key (seed, stream) and a 256-bit counter; its lowest word advances as numbers are drawn, so streams
    with different counters stay apart for 2**64 draws each.
    """
    if len(counters) > 3:
        raise ValueError(f"a keyed draw takes at most three counters, got {len(counters)}")
    words = [0, *counters, *([0] * (3 - len(counters)))]
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array(words, dtype=np.uint64)))


def seed_for(stream: Stream, seed: int, *counters: int) -> int:
    """A 63-bit seed for a library that takes only an integer (torch.Generator, scikit-learn)."""
    return int(generator(stream, seed, *counters).integers(0, 2**63, dtype=np.int64))
