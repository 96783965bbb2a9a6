"""`bench embed`: photographs in files to embeddings in Parquet through Ray, beside the bare backbone on views that are ready.

On a CPU the bare backbone is measured in one process that has all cores, and in a process a core, before and after ours; the
faster counts. Of ours it is what a long source takes longer than a short one: beginning and end are in neither.
"""

import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from massl_ray.benches.measure import machine, median_ratio, synchronize
from massl_ray.benches.photographs import write_photographs
from massl_ray.data.decode import PLAIN
from massl_ray.data.listing import Listing
from massl_ray.data.sources import open_source
from massl_ray.evaluation.embedding import Decoded, Plan, begin, embed, plan_embedding
from massl_ray.evaluation.subjects import Subject, open_subject
from massl_ray.storage import Folder

BACKBONE, PHOTOGRAPHS = "vit_small_patch16_224", 512
BATCH = {"cpu": 8, "cuda": 128}
SHORT, LONG, BARE = 64, 192, 24  # batches
CORES = len(os.sched_getaffinity(0))


def run(device: torch.device, rounds: int = 3, photos: str | None = None) -> dict[str, Any]:
    """Medians over `rounds`."""
    from massl_ray.on_ray.cluster import cluster

    subject, batch, threads = open_subject(f"untrained:{BACKBONE}"), BATCH[device.type], torch.get_num_threads()
    seconds: dict[str, list[float]] = {"one process": [], "a process a core": [], "ours": []}  # of an image
    bare: list[float] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(cluster())
        pool = stack.enter_context(ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn")))
        source = write_photographs(scratch / "photographs", PHOTOGRAPHS, photos)
        for turn in range(rounds):
            before = _fastest(seconds, device, pool)
            seconds["ours"].append(_through_ray(subject, str(source), batch, scratch / str(turn)))
            bare.append((before + _fastest(seconds, device, pool)) / 2)
    torch.set_num_threads(threads)
    return {
        "name": "embed",
        "work": f"{BACKBONE} at {subject.size} px, fp32, batches of {batch}, photographs of 500 x 375 px",
        **machine(device),
        "ratio": median_ratio(bare, seconds["ours"]),
        "images_per_s": {name: 1 / statistics.median(values) for name, values in seconds.items() if values},
    }


def _fastest(seconds: dict[str, list[float]], device: torch.device, pool: ProcessPoolExecutor) -> float:
    """Seconds of an image, by the bare backbone in the better of its ways; each is added to `seconds`."""
    found = {"one process": _bare(device, CORES)}
    if device.type == "cpu":
        found["a process a core"] = 1 / sum(1 / each for each in pool.map(_bare, [device] * CORES, [1] * CORES))
    for name, value in found.items():
        seconds[name].append(value)
    return min(found.values())


def _bare(device: torch.device, threads: int) -> float:
    """Seconds of an image, by the backbone alone."""
    torch.set_num_threads(threads)
    subject = open_subject(f"untrained:{BACKBONE}").to(device)
    batch = BATCH[device.type]
    views = np.zeros((batch, subject.size, subject.size, subject.channels), np.uint8)
    plan, ready = _plan(subject, open_source("demo"), batch), Decoded(np.arange(batch), views, ())
    for _ in range(2):
        embed(subject, plan, ready)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(BARE):
        embed(subject, plan, ready)
    return (time.perf_counter() - started) / BARE / batch


def _through_ray(subject: Subject, source: str, batch: int, scratch: Path) -> float:
    """Seconds of an image."""
    short, long = (_embedded(subject, source, batch, batches, scratch / str(batches)) for batches in (SHORT, LONG))
    return (long - short) / (LONG - SHORT) / batch


def _embedded(subject: Subject, source: str, batch: int, batches: int, folder: Path) -> float:
    """Seconds of a whole source, embedded as `massl-ray embed` does it."""
    from massl_ray.on_ray.embed import embed_parts

    images = open_source(source)
    images = images.take(np.resize(np.arange(len(images)), batches * batch))
    plan, place = _plan(subject, images, batch), Folder(str(folder))
    started = time.perf_counter()
    for _ in embed_parts(subject, images, place, plan, begin(place, plan)):
        pass
    return time.perf_counter() - started


def _plan(subject: Subject, images: Listing, batch: int) -> Plan:
    return plan_embedding(subject, images, PLAIN, "pooled", "float32", batch)
