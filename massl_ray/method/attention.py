"""Attention reads of the memory, block by block: log-sum-exp of the similarities, and the rows' mean under their softmax.

Two ways, one interface, chosen by device: tiles of matrix products with an online softmax (any device, any precision; the
oracle of the other), and a fused attention kernel that returns its log-sum-exp (CUDA).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from massl_ray.method.products import product

TILE = 1024  # memory rows that the tiled way reads at once: the R x TILE logits stay in cache (measured: docs/log.md)
CHUNK = 2048  # memory rows a fused kernel call treats as one sequence, so that few queries still fill a large device
GROUP = 65536  # memory rows gathered at once for fused calls: bounds their workspace


def read_blocks(queries: Sequence[tuple[Tensor, float]], memory: Tensor, blocks: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Read the memory with several groups of queries, each at its own temperature.

    Args:
        queries: groups (R_i, D) in fp32 or float64 with their temperatures.
        memory: (K, D) rows, not copied whole.
        blocks: (num_blocks, S) int64 slots.

    Returns:
        For each group the log-sum-exp (R_i,) and the read-out (R_i, D), both summed over blocks, in the queries' precision.
    """
    if memory.is_cuda and memory.shape[1] <= 256:
        return [read_fused(rows, temperature, memory, blocks) for rows, temperature in queries]
    scaled = torch.cat([rows / temperature for rows, temperature in queries])
    log_sum, read = read_tiled(scaled, memory, blocks)
    sizes = [len(rows) for rows, _ in queries]
    return list(zip(log_sum.split(sizes), read.split(sizes), strict=True))


def read_tiled(queries: Tensor, memory: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Read with `queries` (R, D) that are already divided by their temperature.

    Softmax is computed online, tile by tile (Milakov and Gimelshein, 2018), in the precision of `queries`; beside the results
    there are only R x TILE logits and TILE x D keys at a time.
    """
    log_sum, read = queries.new_zeros(len(queries)), torch.zeros_like(queries)
    top, total, weighted = queries.new_empty(len(queries), 1), queries.new_empty(len(queries), 1), torch.empty_like(queries)
    for block in blocks:
        top.fill_(-torch.inf)
        total.zero_()
        weighted.zero_()
        for slots in block.split(TILE):
            keys = memory.index_select(0, slots).to(queries.dtype)
            scores = product(queries, keys)
            new_top = torch.maximum(top, scores.amax(1, keepdim=True))
            decay = top.sub_(new_top).exp_()
            weights = scores.sub_(new_top).exp_()
            total.mul_(decay).add_(weights.sum(1, keepdim=True))
            weighted.mul_(decay).add_(product(weights, keys.T))
            top = new_top
        log_sum += (top + total.log()).squeeze(1)
        read += weighted.div_(total)
    return log_sum, read


def read_fused(queries: Tensor, temperature: float, memory: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Read with `queries` (R, D) by a flash attention kernel: each chunk of a block is a sequence of its own, and the chunks of a
    block are put together by their log-sum-exps. The division by `temperature` happens inside, in fp32.

    On CUDA queries and rows are rounded to fp16: they are at most 1, so it is finer than bf16, and products and sums are fp32.
    The kernels are torch's own, compiled beforehand: another batch size compiles nothing.
    """
    rows, dim = queries.shape
    size = blocks.shape[1]
    chunk = next(length for length in range(min(CHUNK, size), 0, -1) if size % length == 0)
    at_once = max(1, GROUP // size)
    log_sum, read = queries.new_zeros(rows), torch.zeros_like(queries)
    for group in blocks.split(at_once):
        keys = _for_kernel(memory.index_select(0, group.flatten()), queries.dtype).view(-1, 1, chunk, _padded(dim))
        asked = _for_kernel(queries, queries.dtype).expand(len(keys), 1, rows, _padded(dim))
        means, log_sums = _flash(asked, keys, 1.0 / temperature)
        means = means.view(len(group), -1, rows, _padded(dim))[..., :dim]
        log_sums = log_sums.view(len(group), -1, rows).to(queries.dtype)
        block_log_sums = log_sums.logsumexp(1)
        shares = torch.exp(log_sums - block_log_sums.unsqueeze(1))
        log_sum += block_log_sums.sum(0)
        read += torch.einsum("gcr,gcrd->rd", shares, means.to(queries.dtype))
    return log_sum, read


def _flash(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(means (n, 1, R, D), log-sum-exps (n, 1, R) in fp32 or finer) of softmax(scale * queries keys') keys."""
    if queries.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, keys, 0.0, False, scale=scale)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, keys, 0.0, False, scale=scale)


def _for_kernel(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """In a precision that the device's kernel takes, and as wide."""
    rows = rows.to(torch.float16 if rows.is_cuda else dtype)
    return torch.nn.functional.pad(rows, (0, _padded(rows.shape[1]) - rows.shape[1]))


def _padded(dim: int) -> int:
    return -(-dim // 8) * 8
