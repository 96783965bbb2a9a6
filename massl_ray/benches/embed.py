"""`bench embed`: images to embeddings through Ray, beside the bare backbone on views that are ready, and beside one process that
decodes and embeds in turn. The sides take turns; a stream is timed between its first batches and some before its end.

Beside seconds it counts what all processes of a side take of the CPUs, which says more on a machine that others use, too.
"""

import os
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from massl_ray.benches.measure import machine, median_ratio, synchronize
from massl_ray.data.decode import PLAIN
from massl_ray.data.sources import open_source
from massl_ray.evaluation.embedding import Decoded, Plan, decode, embed, plan_embedding
from massl_ray.evaluation.subjects import Subject, open_subject

BACKBONE, SIDE = "vit_tiny_patch16_224", 96
BATCH = {"cpu": 32, "cuda": 256}
FILL, BATCHES, REST = 4, 16, 12  # of a stream: to fill its pipes, to time, and so that its end is not in it
CORES = len(os.sched_getaffinity(0))

Took = tuple[float, float]  # seconds, and seconds of CPUs
Reading = tuple[float, dict[int, int]]


def run(device: torch.device, rounds: int = 3, photos: str | None = None) -> dict[str, Any]:
    """Medians over `rounds`."""
    from massl_ray.on_ray.cluster import cluster

    subject = open_subject(f"untrained:{BACKBONE}", size=SIDE)
    images = open_source(photos or "demo")
    images = images.take(np.resize(np.arange(len(images)), BATCH[device.type] * (FILL + BATCHES + REST)))
    plan = plan_embedding(subject, images, PLAIN, "pooled", "float32", BATCH[device.type])
    torch.set_num_threads(CORES)
    sides: dict[str, Any] = {"model": _model, "process": _process, "ours": _through_ray}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    with cluster():
        for turn in range(rounds + 1):
            for name, side in sides.items():
                took = side(subject.to(device), images, plan, device)
                if turn:
                    seconds[name].append(took[0])
                    cpu[name].append(took[1])
    rates = {name: plan.batch * BATCHES / statistics.median(values) for name, values in seconds.items()}
    return {
        "name": "embed",
        "work": f"{BACKBONE} at {SIDE} px, fp32, batches of {plan.batch}, images of {images.root}",
        **machine(device),
        "images_per_s": rates["ours"],
        "images_per_s_model": rates["model"],
        "images_per_s_process": rates["process"],
        "ratio": median_ratio(seconds["model"], seconds["ours"]),
        "ratio_process": median_ratio(seconds["process"], seconds["ours"]),
        "cpu_ms_per_image": {name: statistics.median(values) * 1000 / plan.batch / BATCHES for name, values in cpu.items()},
        "ratio_cpu": median_ratio(cpu["model"], cpu["ours"]),
    }


def _model(subject: Subject, images: Any, plan: Plan, device: torch.device) -> Took:
    """The backbone alone."""
    views = torch.zeros(plan.batch, subject.size, subject.size, subject.channels, dtype=torch.uint8, device=device)
    ready = Decoded(np.arange(plan.batch), views.cpu().numpy(), ())
    embed(subject, plan, ready)
    synchronize(device)
    started = _now()
    for _ in range(BATCHES):
        embed(subject, plan, ready)
    return _since(started)


def _process(subject: Subject, images: Any, plan: Plan, device: torch.device) -> Took:
    started = _now()
    for number in range(BATCHES):
        embed(subject, plan, decode(subject, images, PLAIN, plan.samples(number), threads=4))
    return _since(started)


def _through_ray(subject: Subject, images: Any, plan: Plan, device: torch.device) -> Took:
    from massl_ray.on_ray.embed import embed_batches

    with closing(embed_batches(subject, images, plan, list(range(plan.batches)))) as stream:  # type: ignore[type-var]
        for _ in range(FILL):
            next(stream)
        started = _now()
        for _ in range(BATCHES):
            next(stream)
        return _since(started)


def _since(started: Reading) -> Took:
    now = _now()
    ticks = sum(max(0, count - started[1].get(process, 0)) for process, count in now[1].items())
    return now[0] - started[0], ticks / os.sysconf("SC_CLK_TCK")


def _now() -> Reading:
    """The clock, and what this process and all that it has started, and these, have taken of the CPUs, in ticks."""
    parent, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        process = int(path.parent.name)
        parent[process], ticks[process] = int(fields[1]), int(fields[11]) + int(fields[12])
    ours = {os.getpid()}
    while found := {process for process, above in parent.items() if above in ours} - ours:
        ours |= found
    return time.perf_counter(), {process: ticks.get(process, 0) for process in ours}
