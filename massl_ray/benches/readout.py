"""`bench readout`: loss and gradient against the memory, ours beside the plain formulation."""

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from massl_ray.benches.measure import alternate, extra_peak, in_fresh_process, machine, matmul_rate, median_ratio
from massl_ray.benches.plain import plain_readout
from massl_ray.method.readout import readout_loss
from massl_ray.planning.work import readout_flops

VIEWS, DIM, SIZE, BLOCK = 12, 256, 131072, 16384
TEMPERATURES = {"student_temp": 0.1, "teacher_temp": 0.04}
GROWTH = (16384, 32768, 65536, 131072, 262144)  # memory sizes, one to sixteen blocks


def run(device: torch.device, rounds: int = 7) -> dict[str, Any]:
    """Time and extra peak memory at the paper's memory, and how both grow with it."""
    batch, dtype = (64, torch.bfloat16) if device.type == "cuda" else (32, torch.float32)
    plain, ours = calls(device, dtype, batch, SIZE)
    seconds = alternate({"plain": plain, "ours": ours}, device, rounds)
    difference = (plain() - ours()).abs().item()
    del plain, ours
    peaks = {side: _peak(device, dtype, batch, SIZE, side) for side in ("plain", "ours")}
    growth = _growth(device, dtype, batch, rounds)
    flops = readout_flops(VIEWS, batch, SIZE, DIM)
    rate = matmul_rate(device, dtype)
    ours_s = statistics.median(seconds["ours"])
    return {
        "name": "readout",
        "work": f"V={VIEWS} B={batch} D={DIM} K={SIZE} S={BLOCK} {str(dtype).removeprefix('torch.')}, loss and gradient",
        **machine(device),
        "reference_s": statistics.median(seconds["plain"]),
        "ours_s": ours_s,
        "ratio": median_ratio(seconds["plain"], seconds["ours"]),
        "time_ratio": median_ratio(seconds["plain"], seconds["ours"]),
        "reference_peak_bytes": peaks["plain"],
        "ours_peak_bytes": peaks["ours"],
        "memory_ratio": peaks["plain"] / peaks["ours"],
        "growth": growth,
        "flops": flops,
        "matmul_flops_per_s": rate,
        "matmul_share": flops / ours_s / rate,
        "loss_difference": difference,
    }


def calls(
    device: torch.device, dtype: torch.dtype, batch: int, size: int, block: int | None = None
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(plain, ours): evaluate loss and gradient on one fixed problem and return the loss."""
    generator = torch.Generator().manual_seed(0)
    student = normalize(torch.randn(VIEWS * batch, DIM, generator=generator), dim=1).to(device, dtype).requires_grad_()
    teacher = normalize(torch.randn(2 * batch, DIM, generator=generator), dim=1).to(device, dtype)
    memory = normalize(torch.randn(size, DIM, generator=generator), dim=1).to(device)
    permutation = torch.randperm(size, generator=generator).to(device)
    options = {"num_views": VIEWS, "block_size": block or BLOCK, **TEMPERATURES}

    def plain() -> Tensor:
        loss = plain_readout(student, teacher, memory.to(dtype), permutation, **options)
        torch.autograd.grad(loss, student)
        return loss.detach()

    def ours() -> Tensor:
        loss = readout_loss(student, teacher, memory, permutation, **options).loss
        torch.autograd.grad(loss, student)
        return loss.detach()

    return plain, ours


def _growth(device: torch.device, dtype: torch.dtype, batch: int, rounds: int) -> dict[str, Any]:
    """Ours at each size: seconds a slot against those at the largest, and peak bytes against those at the smallest."""
    sides = {str(size): calls(device, dtype, batch, size)[1] for size in GROWTH}
    seconds = alternate(sides, device, rounds)
    largest = [value / GROWTH[-1] for value in seconds[str(GROWTH[-1])]]
    per_slot = {
        size: statistics.median(value / int(size) / reference for value, reference in zip(values, largest, strict=True))
        for size, values in seconds.items()
    }
    peaks = {str(size): _peak(device, dtype, batch, size, "ours") for size in GROWTH}
    return {
        "seconds": {size: statistics.median(values) for size, values in seconds.items()},
        "time_from_linear": max(abs(value - 1) for value in per_slot.values()),
        "peak_bytes": peaks,
        "memory_growth": max(peaks.values()) / min(peaks.values()) - 1,
    }


def _peak(device: torch.device, dtype: torch.dtype, batch: int, size: int, side: str) -> int:
    """In a process of its own; on a CPU the least of four, because its allocator's moods only add."""
    arguments = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "batch": batch, "size": size, "side": side}
    return min(in_fresh_process(__spec__.name, **arguments)["bytes"] for _ in range(1 if device.type == "cuda" else 4))


def _peak_here(device: str, dtype: str, batch: int, size: int, side: str) -> int:
    target = torch.device(device)
    number = ("plain", "ours").index(side)
    calls(target, getattr(torch, dtype), batch, 2048, block=1024)[number]()  # libraries loaded, kernels generated
    return extra_peak(calls(target, getattr(torch, dtype), batch, size)[number], target)


if __name__ == "__main__":
    print(json.dumps({"bytes": _peak_here(**json.loads(sys.argv[1]))}))
