"""`bench ingest`: images from a folder into a consumer through Ray Data, beside a DataLoader of torch; the demo's steps fed by Ray
Data beside steps fed from memory; prepared shards beside the files they were made of.

The sides take turns. A stream is timed between its first batches, which fill its pipes, and its end.
"""

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from massl_ray.benches.measure import alternate, machine, median_ratio
from massl_ray.benches.photographs import HEIGHT, WIDTH, write_photographs
from massl_ray.config import load
from massl_ray.data.decode import Encoded
from massl_ray.data.listing import Listing
from massl_ray.data.making import ViewMaker
from massl_ray.data.preparing import begin, do_part, finish, missing
from massl_ray.data.sources import open_source
from massl_ray.method.schedules import schedule_at
from massl_ray.method.step import train_step
from massl_ray.storage import Folder
from massl_ray.training.collectives import Local
from massl_ray.training.exact_sums import Exact
from massl_ray.training.loop import Views, assemble
from massl_ray.training.run import Run, prepare_run
from massl_ray.training.state import build_state, step_settings

PHOTOGRAPHS, BATCH = 512, 64
RECIPE = ["--preset", "vit_small", "--train.global_batch_size", str(BATCH)]
FILL, BATCHES = 4, 96  # of a stream: to fill its pipes, to time
FILL_STEPS, STEPS = 5, 30  # of the demo
CORES = len(os.sched_getaffinity(0))
CPU = torch.device("cpu")


def run(device: torch.device, rounds: int = 5, photos: str | None = None) -> dict[str, Any]:
    """Medians over `rounds`. On the CPU: it is the CPU's work."""
    from massl_ray.on_ray.cluster import cluster

    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, cluster():
        root = Path(folder)
        source = write_photographs(root / "photographs", PHOTOGRAPHS, photos)
        streams = _streams(prepared([*RECIPE, "--data.source", str(source)], root / "run"), rounds)
        demo = _demo(prepared(["--preset", "demo"], root / "demo"), rounds)
        shards = _shards(source, root / "shards", rounds)
        bits = statistics.mean(file.stat().st_size * 8 / WIDTH / HEIGHT for file in source.iterdir())
    images_per_s = {name: BATCH * BATCHES / statistics.median(seconds) for name, seconds in streams.items()}
    return {
        "name": "ingest",
        "work": f"{PHOTOGRAPHS} JPEGs of {WIDTH} x {HEIGHT} px, the recipe's 12 views, {CORES} processes; demo; random reads",
        **machine(CPU),
        "images_per_s": images_per_s["ours"],
        "images_per_s_dataloader": images_per_s["dataloader"],
        "images_per_s_per_core": images_per_s["ours"] / CORES,
        "bits_per_pixel": bits,
        "demo_step_s": statistics.median(demo["ours"]) / STEPS,
        "demo_step_from_memory_s": statistics.median(demo["memory"]) / STEPS,
        "shards_ms_per_image": statistics.median(shards["ours"]) / PHOTOGRAPHS * 1000,
        "folder_ms_per_image": statistics.median(shards["folder"]) / PHOTOGRAPHS * 1000,
        "ratio": median_ratio(streams["dataloader"], streams["ours"]),
        "ratio_dataloader": median_ratio(streams["dataloader"], streams["ours"]),
        "ratio_memory": median_ratio(demo["memory"], demo["ours"]),
        "ratio_shards": median_ratio(shards["folder"], shards["ours"]),
    }


def prepared(flags: list[str], folder: Path) -> Run:
    return prepare_run(load([*flags, "--run.dir", str(folder), "--train.steps", "100000", "--train.precision", "fp32"]))


# ---- streams ---------------------------------------------------------------------------------------------------------


def _streams(run: Run, rounds: int) -> dict[str, list[float]]:
    from massl_ray.on_ray.feeder import start_feeder

    feeder = start_feeder()
    sides = {"ours": lambda: through_ray(run, CORES, feeder), "dataloader": lambda: through_dataloader(run, CORES)}
    return _in_turn({name: lambda open=open: _consume(open()) for name, open in sides.items()}, rounds)


def through_ray(run: Run, tasks: int, feeder: Any) -> Iterator[Views]:
    from massl_ray.on_ray.ingest import stream_views
    from massl_ray.on_ray.layout import DataTasks

    return stream_views(run, 0, 1, 0, DataTasks(tasks, 1.0), CPU, feeder)


def through_dataloader(run: Run, processes: int) -> Iterator[Views]:
    """The same views, as many images at once, made by the worker processes of a DataLoader."""
    loader = iter(
        DataLoader(_Batches(run), batch_size=None, num_workers=processes, prefetch_factor=2, multiprocessing_context="spawn")
    )
    try:
        for global_views, local_views in loader:
            yield Views(global_views, local_views, [])
    finally:
        deque(loader, maxlen=0)  # its processes abort, and say so, when they are stopped in the middle


class _Batches(Dataset):
    """By step."""

    def __init__(self, run: Run):
        size = run.resolved.batch_size
        self.make, self.size = ViewMaker(run.images, run.config, size, 0, 0, size), size

    def __len__(self) -> int:
        return FILL + BATCHES + 2 * CORES  # so that the processes are busy to the end

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        made = self.make({"id": np.arange(step * self.size, (step + 1) * self.size)})
        return torch.from_numpy(made["global_views"]), torch.from_numpy(made["local_views"])


def _consume(stream: Iterator[Views]) -> float:
    with closing(stream):  # type: ignore[type-var]
        for _ in islice(stream, FILL):
            pass
        started = time.perf_counter()
        for _ in islice(stream, BATCHES):
            pass
        return time.perf_counter() - started


# ---- steps of the demo -----------------------------------------------------------------------------------------------


def _demo(run: Run, rounds: int) -> dict[str, list[float]]:
    from massl_ray.on_ray.feeder import start_feeder
    from massl_ray.on_ray.ingest import stream_views
    from massl_ray.on_ray.layout import data_tasks, plan_layout, reserve_worker

    layout = plan_layout(run.config, run.resolved.num_micro_batches)
    reserve_worker(layout)  # that this process is
    tasks, feeder = data_tasks(layout, 1), start_feeder()
    collectives = Exact(Local(), run.resolved.num_micro_batches)
    state = build_state(run.config, run.resolved, CPU, collectives)
    settings = step_settings(run.config, run.resolved, CPU)

    def step(views: Views) -> None:
        batch = assemble(run, state, views, collectives)
        train_step(state, batch, schedule_at(state.step, run.config, run.resolved), settings, collectives)

    def train(stream: Iterator[Views]) -> float:
        for views in islice(stream, FILL_STEPS):
            step(views)
        started = time.perf_counter()
        for views in islice(stream, STEPS):
            step(views)
        return time.perf_counter() - started

    def fed() -> float:
        with closing(stream_views(run, 0, 1, state.step, tasks, CPU, feeder)) as stream:
            return train(stream)

    with closing(stream_views(run, 0, 1, 0, tasks, CPU, feeder)) as stream:
        kept = next(stream)
    return _in_turn({"ours": fed, "memory": lambda: train(repeat(kept))}, rounds)


def _in_turn(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each side says it took, taking turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            took = side()
            if turn:
                seconds[name].append(took)
    return seconds


# ---- shards ----------------------------------------------------------------------------------------------------------


def _shards(source: Path, folder: Path, rounds: int) -> dict[str, list[float]]:
    images, shards = open_source(str(source)), Folder(folder)
    plan = begin(images, shards, max_side=None, shard_mb=16)
    assert plan is not None
    for part in missing(shards, plan):
        do_part(images, shards, plan, part)
    finish(images, shards, plan)
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    sides = {"ours": open_source(str(folder)), "folder": images}
    return alternate({name: lambda listing=listing: _decode_all(listing, order) for name, listing in sides.items()}, CPU, rounds)


def _decode_all(images: Listing, order: list[int]) -> None:
    for sample in order:
        Encoded(images.read(sample)).pixels()
