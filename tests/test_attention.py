"""Reads of the memory: the tiled way against softmax and log-sum-exp in float64, the fused way against the tiled one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from massl_ray.method import attention
from massl_ray.method.attention import read_blocks, read_fused, read_tiled


def problem(rows: int, size: int, dim: int, blocks: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    queries = normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)
    memory = normalize(torch.randn(size, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)
    slots = torch.randperm(size, generator=generator)[: size // blocks * blocks].view(blocks, -1)
    return queries, memory, slots


def by_definition(queries, temperature, memory, blocks):
    log_sum, read = torch.zeros(len(queries), dtype=queries.dtype), torch.zeros_like(queries)
    for block in blocks:
        logits = queries @ memory[block].T / temperature
        log_sum += logits.logsumexp(1)
        read += logits.softmax(1) @ memory[block]
    return log_sum, read


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), block=st.integers(1, 60), blocks=st.integers(1, 5), dim=st.integers(1, 20), step=st.integers(1, 70))
def test_both_ways_are_the_definition(rows, block, blocks, dim, step):
    """Any sizes, tiles and chunks; widths that a kernel would have to pad."""
    queries, memory, slots = problem(rows, block * blocks + 3, dim, blocks)
    expected = by_definition(queries, 0.05, memory, slots)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TILE", "CHUNK", "GROUP"):
            patch.setattr(attention, name, step)
        for result in (read_tiled(queries / 0.05, memory, slots), read_fused(queries, 0.05, memory, slots)):
            torch.testing.assert_close(result[0], expected[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(result[1], expected[1], rtol=1e-10, atol=1e-10)


def test_groups_of_queries_keep_their_temperatures():
    queries, memory, slots = problem(6, 64, 16, 4)
    (first, second) = read_blocks([(queries[:2], 0.1), (queries[2:], 0.04)], memory, slots)
    torch.testing.assert_close(first, by_definition(queries[:2], 0.1, memory, slots))
    torch.testing.assert_close(second, by_definition(queries[2:], 0.04, memory, slots))


@pytest.mark.parametrize("temperature", [0.02, 0.07])
def test_fused_in_fp32_is_as_close_to_float64_as_tiled(temperature):
    queries, memory, slots = problem(16, 4096, 64, 2)
    expected = by_definition(queries, temperature, memory, slots)[1]
    errors = [
        (result.double() - expected).norm() / expected.norm()
        for result in (
            read_tiled(queries.float() / temperature, memory.float(), slots)[1],
            read_fused(queries.float(), temperature, memory.float(), slots)[1],
        )
    ]
    assert max(errors) < 5e-6


def test_what_fp16_rows_cost():
    """The CUDA way rounds unit vectors to fp16: what that alone does at the sharpest temperature, in float64 arithmetic."""
    queries, memory, slots = problem(64, 8192, 256, 2)
    expected = by_definition(queries, 0.02, memory, slots)
    rounded = by_definition(queries.half().double(), 0.02, memory.half().double(), slots)
    assert (rounded[1] - expected[1]).norm() / expected[1].norm() < 2e-3
    assert (rounded[0] - expected[0]).abs().max() < 5e-3


def test_bfloat16_memory_is_read_in_full_precision():
    queries, memory, slots = problem(5, 64, 16, 2, dtype=torch.float32)
    result = read_tiled(queries / 0.1, memory.bfloat16(), slots)
    expected = by_definition(queries.double(), 0.1, memory.bfloat16().double(), slots)
    assert result[1].dtype == torch.float32
    torch.testing.assert_close(result[1].double(), expected[1], rtol=1e-5, atol=1e-6)
