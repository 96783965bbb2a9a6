"""The order of samples: every epoch a permutation, the same however it is asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from massl_ray.data.order import ROUNDS, Windows, samples_at, step_positions, worker_share
from massl_ray.keyed import Stream, generator

WORD = 2**64 - 1


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    return samples_at(np.arange(size) + epoch * size, size, seed)[1].tolist()


def reference(position: int, size: int, seed: int) -> tuple[int, int]:
    """The same in Python's unbounded integers, one position at a time."""
    epoch, value = divmod(position, size)
    keys = [int(key) for key in generator(Stream.ORDER, seed, epoch).integers(0, 2**64, size=ROUNDS, dtype=np.uint64)]
    domain = 4
    while domain < size:
        domain *= 4
    half = round(domain**0.5)
    while True:
        left, right = divmod(value, half)
        for key in keys:
            x = right ^ key
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
            x ^= x >> 31
            left, right = right, left ^ (x % half)
        value = left * half + right
        if value < size:
            return epoch, value


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4096, 4097, 60_000])
def test_every_epoch_takes_every_sample_once(size):
    for epoch in (0, 1, 7):
        assert sorted(epoch_order(size, 3, epoch)) == list(range(size))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**9))
def test_is_a_bijection_at_any_size(size, seed, epoch):
    epochs, samples = samples_at(np.arange(size) + epoch * size, size, seed)
    assert np.array_equal(np.sort(samples), np.arange(size))
    assert (epochs == epoch).all()


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 10**9), seed=st.integers(0, 2**63 - 1), position=st.integers(0, 10**12))
def test_agrees_with_unbounded_integers(size, seed, position):
    epochs, samples = samples_at(np.array([position]), size, seed)
    assert (int(epochs[0]), int(samples[0])) == reference(position, size, seed)


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 200), cuts=st.lists(st.integers(0, 300), max_size=8), data=st.data())
def test_same_however_it_is_sliced(size, cuts, data):
    whole = samples_at(np.arange(300), size, 5)
    edges = [0, *sorted(cuts), 300]
    parts = [samples_at(np.arange(first, last), size, 5) for first, last in zip(edges, edges[1:], strict=False)]
    assert np.array_equal(np.concatenate([part[0] for part in parts]), whole[0])
    assert np.array_equal(np.concatenate([part[1] for part in parts]), whole[1])
    asked = np.array(data.draw(st.permutations(range(300))))
    assert np.array_equal(samples_at(asked, size, 5)[1], whole[1][asked])


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_order(500, seed, epoch)) for seed in (0, 1, 2**40) for epoch in (0, 1, 2)]
    assert len(set(orders)) == len(orders)
    matches = np.mean([np.mean(np.equal(orders[0], other)) for other in orders[1:]])
    assert matches < 5 / 500  # a random pair of permutations agrees in one place on average


@pytest.mark.parametrize("size", [2, 3, 5, 6, 16])
def test_every_sample_is_equally_likely_at_every_place(size):
    epochs = 2000
    samples = samples_at(np.arange(size * epochs), size, 11)[1].reshape(epochs, size)
    for place in range(size):
        counts = np.bincount(samples[:, place], minlength=size)
        assert chisquare(counts).pvalue > 1e-4, (place, counts)


def test_neighbours_in_the_listing_do_not_travel_together():
    order = np.array(epoch_order(10_000, 2, 0))
    place = np.argsort(order)
    assert np.mean(np.abs(np.diff(place)) == 1) < 10 / 10_000
    assert np.mean(np.abs(np.diff(place))) == pytest.approx(10_000 / 3, rel=0.03)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.03


def test_a_hundred_million_images_are_found_without_a_table():
    epochs, samples = samples_at(np.array([0, 99_999_999, 100_000_000, 10**15]), 100_000_000, 1)
    assert epochs.tolist() == [0, 0, 1, 10**7]
    assert ((samples >= 0) & (samples < 10**8)).all()
    assert samples.dtype == np.int64


def test_step_positions_by_hand():
    assert step_positions(3, 8, 2, 5).tolist() == [26, 27, 28]
    assert step_positions(0, 8, 0, 8).tolist() == list(range(8))
    assert step_positions(2, 8, 4, 4).tolist() == []


@settings(deadline=None, max_examples=100)
@given(world_size=st.integers(1, 40), micro_batches=st.integers(1, 300))
def test_shares_partition_the_batch_evenly(world_size, micro_batches):
    shares = [worker_share(rank, world_size, micro_batches) for rank in range(world_size)]
    assert [place for first, last in shares for place in range(first, last)] == list(range(micro_batches))
    sizes = [last - first for first, last in shares]
    assert max(sizes) - min(sizes) <= 1


# ---- windows ---------------------------------------------------------------------------------------------------------

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


def windows_of(sizes: list[int], width: int) -> Windows:
    return Windows(np.cumsum([0, *sizes]), width)


@settings(deadline=None, max_examples=100)
@given(sizes=shard_sizes, width=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_in_windows_too_every_epoch_takes_every_sample_once(sizes, width, seed, epoch):
    size = sum(sizes)
    epochs, samples = samples_at(np.arange(size) + epoch * size, size, seed, windows_of(sizes, width))
    assert np.array_equal(np.sort(samples), np.arange(size)) and (epochs == epoch).all()


@settings(deadline=None, max_examples=100)
@given(sizes=shard_sizes, width=st.integers(1, 40), seed=st.integers(0, 1000))
def test_a_window_is_whole_shards_and_no_more_than_its_width(sizes, width, seed):
    windows = windows_of(sizes, width)
    samples = samples_at(np.arange(sum(sizes)), sum(sizes), seed, windows)[1]
    shards = np.searchsorted(windows.starts, samples, "right") - 1
    seen, place = [], 0
    while place < len(samples):  # take shards until they are used up: never more than `width` that have something left
        held: list[int] = []
        left = 0
        while place < len(samples) and (left or not held):
            shard = int(shards[place])
            if shard not in held:
                held.append(shard)
                left += sizes[shard]
            left -= 1
            place += 1
        assert len(held) <= width
        seen += held
    assert sorted(seen) == [shard for shard, size in enumerate(sizes) if size]


@settings(deadline=None, max_examples=50)
@given(sizes=shard_sizes, width=st.integers(1, 8), data=st.data())
def test_in_windows_it_is_the_same_however_it_is_sliced(sizes, width, data):
    size, windows = sum(sizes), windows_of(sizes, width)
    whole = samples_at(np.arange(3 * size), size, 5, windows)
    asked = np.array(data.draw(st.lists(st.integers(0, 3 * size - 1), min_size=1, max_size=50)))
    for before, now in zip(whole, samples_at(asked, size, 5, windows), strict=True):
        assert np.array_equal(before[asked], now)


def test_windows_differ_by_epoch_and_seed_and_inside():
    windows = windows_of([50] * 20, 4)
    orders = [samples_at(np.arange(1000) + epoch * 1000, 1000, seed, windows)[1] for seed in (0, 1) for epoch in (0, 1)]
    for first in range(4):
        for second in range(first):
            assert np.mean(orders[first] == orders[second]) < 0.02
            assert set(orders[first][:200] // 50) != set(orders[second][:200] // 50)
    for order in orders:  # within a window images of a shard do not stay together, and no two windows are shuffled alike
        assert np.mean(np.diff(order[:200] // 50) == 0) == pytest.approx(0.25, abs=0.12)
    ranks = [np.argsort(np.argsort(orders[0][first : first + 200])) for first in range(0, 1000, 200)]
    assert all(np.mean(ranks[a] == ranks[b]) < 0.1 for a in range(5) for b in range(a))
