"""Timing and memory, so that two sides are compared fairly on a shared and noisy machine."""

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from massl_ray.method.products import product

STEADY_ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives large blocks back as soon as they are freed, so that a peak is what was needed and not what was kept."""


Clock = Callable[[], float]


def alternate(
    sides: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each side, `rounds` times, taking turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, call in sides.items():
            elapsed = timed(call, device, clock)
            if turn:
                seconds[name].append(elapsed)
    return seconds


def timed(call: Callable[[], Any], device: torch.device, clock: Clock = time.perf_counter) -> float:
    synchronize(device)
    started = clock()
    call()
    synchronize(device)
    return clock() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ratio(reference: list[float], ours: list[float]) -> float:
    """Median over the rounds of reference / ours: neighbours in time share the machine's mood."""
    return statistics.median(r / o for r, o in zip(reference, ours, strict=True))


def extra_peak(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `call` adds to what is there at its highest point. The libraries have to be warm; on a CPU measure once a
    process, because memory that was returned hides later peaks."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the warm-up freed goes back to the system, and does not hide a need
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to what is resident now
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 4096)


def in_fresh_process(module: str, **arguments: Any) -> dict[str, Any]:
    """Run `python -m module JSON` and return the JSON object that it prints last."""
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | STEADY_ALLOCATOR)
    if done.returncode:
        raise RuntimeError(f"{module} with {arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that the machine reaches in a large square matrix product, by the better of its libraries: medians of several."""
    side = 8192 if device.type == "cuda" else 2048
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    seconds = alternate({"torch": lambda: a @ b, "ours": lambda: product(a, b)}, device, 9)
    return 2 * side**3 / min(statistics.median(values) for values in seconds.values())


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system's /proc/self/status has no {key}")
