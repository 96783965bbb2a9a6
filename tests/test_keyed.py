"""Keyed draws: against Philox4x64-10 written out in plain Python, and pinned numbers that no release may change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_ray.keyed import Stream, generator, seed_for

WORD = 2**64
counters = st.lists(st.integers(0, WORD - 1), max_size=3)
few = settings(max_examples=25, deadline=None)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 of Salmon et al., SC 2011: one block of four words."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * a, WORD)
        high1, low1 = divmod(0xCA5A826395121157 * c, WORD)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
    return [a, b, c, d]


@few
@given(st.sampled_from(Stream), st.integers(0, 2**63 - 1), counters)
def test_words_are_philox_of_seed_stream_and_counters(stream, seed, given_counters):
    padded = [*given_counters, 0, 0, 0][:3]
    expected = [word for block in (1, 2) for word in philox([block, *padded], [seed, int(stream)])]
    assert generator(stream, seed, *given_counters).bit_generator.random_raw(8).tolist() == expected


def test_stream_numbers_are_the_contract():
    pinned = {"WEIGHTS": 1, "MEMORY": 2, "ORDER": 3, "VIEWS": 4, "DROP_PATH": 5, "BLOCKS": 6, "HOLD_OUT": 7}
    assert {name: int(Stream[name]) for name in pinned} == pinned


def test_pinned_seeds():
    assert seed_for(Stream.WEIGHTS, 0) == 7501867102099269819
    assert seed_for(Stream.VIEWS, 2**63 - 1, 1, 2, 2**64 - 1) == 4598326857174487037


@few
@given(st.integers(0, 2**63 - 1), counters)
def test_seed_is_the_top_63_bits_of_a_fresh_generator(seed, given_counters):
    word = int(generator(Stream.ORDER, seed, *given_counters).bit_generator.random_raw())
    assert (
        seed_for(Stream.ORDER, seed, *given_counters) == word >> 1 or seed_for(Stream.ORDER, seed, *given_counters) == word % 2**63
    )


def test_draws_do_not_depend_on_history():
    first = generator(Stream.VIEWS, 3, 1, 2, 0).random(5)
    np.random.seed(1)
    generator(Stream.VIEWS, 3, 1, 2, 1).random(1000)
    assert (generator(Stream.VIEWS, 3, 1, 2, 0).random(5) == first).all()


def test_each_part_of_the_key_matters():
    keys = [
        (Stream.VIEWS, 0, 0, 0, 0),
        (Stream.ORDER, 0, 0, 0, 0),
        (Stream.VIEWS, 1, 0, 0, 0),
        (Stream.VIEWS, 0, 1, 0, 0),
        (Stream.VIEWS, 0, 0, 1, 0),
        (Stream.VIEWS, 0, 0, 0, 1),
    ]
    assert len({seed_for(*key) for key in keys}) == len(keys)


def test_refuses_a_fourth_counter():
    with pytest.raises(ValueError, match="at most three counters, got 4"):
        generator(Stream.VIEWS, 0, 1, 2, 3, 4)
