"""The ring: against golden vectors, and against a list that forgets its oldest rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_ray.keyed import Stream, generator
from massl_ray.method.memory import Memory, block_permutation, joined_slots, memory_slots

GOLDEN = Path(__file__).parent / "golden"


def ring(size: int, pointer: int = 0) -> Memory:
    memory = Memory(size, 2)
    memory.pointer = pointer
    return memory


def numbered(first: int, count: int) -> torch.Tensor:
    """Rows that can be told apart."""
    values = torch.arange(first, first + count, dtype=torch.float32)
    return torch.stack([values, -values], dim=1)


@pytest.mark.parametrize("name", ["small", "two_views", "paper_views", "remainder"])
def test_golden_write(name):
    golden = np.load(GOLDEN / f"readout_{name}.npz")
    memory = Memory(*golden["memory_before"].shape, dtype=torch.float64)
    memory.rows.copy_(torch.from_numpy(golden["memory_before"]))
    memory.pointer = int(golden["pointer_before"])
    memory.write(torch.from_numpy(golden["teacher"][int(golden["batch_size"]) :]))  # the second global view's
    assert (memory.rows.numpy() == golden["memory_after"]).all()
    assert memory.pointer == int(golden["pointer_after"])


@pytest.mark.parametrize("parts", [(12,), (6, 6), (4, 4, 4), (1, 11)])
@pytest.mark.parametrize("pointer", [0, 3, 13])
def test_write_in_parts_wraps_to_the_same_ring(parts, pointer):
    memory = ring(14, pointer)
    expected, first = memory.rows.clone(), 0
    for i in range(12):
        expected[(pointer + i) % 14] = torch.tensor([100.0 + i, -100.0 - i])
    for count in parts:
        memory.write(numbered(100 + first, count))
        first += count
    assert torch.equal(memory.rows, expected)
    assert memory.pointer == (pointer + 12) % 14


def test_more_rows_than_slots_leaves_the_last_ones():
    memory = ring(5, pointer=2)
    memory.write(numbered(0, 13))
    assert memory.pointer == 0  # (2 + 13) % 5
    assert memory.rows[:, 0].tolist() == [8, 9, 10, 11, 12]


def test_write_of_nothing_changes_nothing():
    memory = ring(5, pointer=4)
    before = memory.rows.clone()
    memory.write(torch.empty(0, 2))
    assert torch.equal(memory.rows, before) and memory.pointer == 4


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 8), st.lists(st.integers(0, 25), max_size=6))
def test_ring_is_a_list_of_slots(size, start, counts):
    memory = ring(size, start % size)
    slots, pointer, written = memory.rows[:, 0].tolist(), start % size, 10
    for count in counts:
        memory.write(numbered(written, count))
        for value in range(written, written + count):
            slots[pointer] = value
            pointer = (pointer + 1) % size
        written += count
    assert memory.rows[:, 0].tolist() == slots and memory.pointer == pointer


def test_start_rows_are_keyed_unit_directions():
    memory = Memory(50, 7, seed=4, dtype=torch.float64)
    gaussian = generator(Stream.MEMORY, 4).standard_normal((50, 7))
    expected = gaussian / np.sqrt((gaussian**2).sum(1, keepdims=True))
    np.testing.assert_allclose(memory.rows.numpy(), expected, rtol=1e-14)
    np.testing.assert_allclose(memory.rows.norm(dim=1).numpy(), 1.0, rtol=1e-14)
    assert memory.pointer == 0
    assert not np.isclose(Memory(50, 7, seed=5, dtype=torch.float64).rows.numpy(), expected).any(axis=1).all()


def test_start_rows_leave_torchs_generator_alone():
    before = torch.random.get_rng_state()
    Memory(8, 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_rows_of_another_precision_are_rounded_to_the_memorys():
    memory = ring(4)
    memory.write(torch.full((1, 2), 1 / 3, dtype=torch.float64))
    assert memory.rows[0].tolist() == [float(np.float32(1 / 3))] * 2


@pytest.mark.parametrize(("size", "block_size", "used"), [(205, 20, 200), (64, 16, 64), (7, 7, 7), (9, 5, 5)])
def test_block_permutation_is_the_keyed_permutation_without_its_remainder(size, block_size, used):
    slots = block_permutation(3, 11, size, block_size)
    assert slots.tolist() == generator(Stream.BLOCKS, 3, 11).permutation(size)[:used].tolist()
    assert len(slots) == len(set(slots.tolist())) == used and 0 <= int(slots.min()) and int(slots.max()) < size
    assert slots.dtype == torch.int64


def test_block_permutation_changes_with_seed_and_step_and_leaves_out_other_slots():
    drawn = {tuple(block_permutation(seed, step, 9, 5).tolist()) for seed in (0, 1) for step in range(10)}
    assert len(drawn) == 20
    assert set().union(*drawn) == set(range(9))  # nobody is left out for good


def test_the_batch_joins_every_block():
    """Each block holds its own slots of the memory, in their order, and then every row of the batch."""
    memory, permutation, batch = ring(7), torch.tensor([4, 0, 6, 2, 1, 5]), numbered(100, 4)
    slots = joined_slots(memory, permutation, 3, batch)
    assert slots.block_size == 3 + 4
    for block, places in enumerate(((4, 0, 6), (2, 1, 5))):
        rows = slots.rows[slots.order.view(2, 7)[block]]
        assert torch.equal(rows, torch.cat([memory.rows[list(places)], batch]))
    alone = memory_slots(memory, permutation, 3)
    assert alone.rows is memory.rows and alone.order is permutation and alone.block_size == 3


def test_the_batch_joins_in_the_precision_of_the_memory():
    memory = Memory(4, 2, dtype=torch.bfloat16)
    slots = joined_slots(memory, torch.arange(4), 2, torch.tensor([[0.1, 0.2]]))
    assert slots.rows.dtype == torch.bfloat16 and torch.equal(slots.rows[4:], torch.tensor([[0.1, 0.2]]).bfloat16())
