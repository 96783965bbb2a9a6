"""Ray Data as the source of views: this worker's slice of every step's batch, from any step on, in order."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray.data
import torch
from PIL import Image
from ray.data import DataContext, ExecutionOptions, ExecutionResources

from massl_ray.config import ViewsSection
from massl_ray.data.decode import UNREADABLE, read, reason
from massl_ray.data.order import samples_at, worker_share
from massl_ray.data.sources import Listing
from massl_ray.method.views import make_views
from massl_ray.training.loop import Views
from massl_ray.training.run import Run

TASKS = 2000  # tasks a dataset is made of; a longer run is a chain of datasets
ROWS = 64  # images a task makes views of, at most


def stream_views(run: Run, rank: int, world_size: int, start_step: int, cpus: float) -> Iterator[Views]:
    """Views of this worker's share of each step's batch, from `start_step` to the end of the run.

    `cpus` bounds the tasks that run at once for this worker. What comes out depends on (configuration, images, step, share)
    only, so a restart at any step and any number of workers continues with the very next sample.
    """
    first, last = (edge * run.resolved.micro_batch_size for edge in worker_share(rank, world_size, run.resolved.num_micro_batches))
    share = last - first
    task_rows = next(rows for rows in range(min(share, ROWS), 0, -1) if share % rows == 0)
    steps_at_once = max(1, TASKS * task_rows // share)
    for begin in range(start_step, run.resolved.steps, steps_at_once):
        end = min(begin + steps_at_once, run.resolved.steps)
        make = ViewMaker(run.images, run.config.views, run.config.run.seed, run.resolved.batch_size, begin, first, share)
        dataset = _dataset(make, (end - begin) * share, task_rows, cpus)
        for rows in dataset.iter_batches(batch_size=share, batch_format="numpy", prefetch_batches=2):
            yield _to_views(rows)  # type: ignore[arg-type]


def start_now(stream: Iterator[Views]) -> Iterator[Views]:
    """Ray Data takes seconds to its first batch: begin fetching it while the caller prepares."""
    first = ThreadPoolExecutor(1).submit(next, stream)

    def views() -> Iterator[Views]:
        yield first.result()
        yield from stream

    return views()


class ViewMaker:
    """From row numbers to views; runs in Ray Data's tasks."""

    def __init__(self, images: Listing, config: ViewsSection, seed: int, batch_size: int, start_step: int, first: int, share: int):
        self.images, self.config, self.seed = images, config, seed
        self.batch_size, self.start_step, self.first, self.share = batch_size, start_step, first, share

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        step, place = np.divmod(rows["id"], self.share)
        positions = (step + self.start_step) * self.batch_size + self.first + place
        epochs, samples = samples_at(positions, len(self.images), self.seed)
        made = [self._views(int(epoch), int(sample)) for epoch, sample in zip(epochs, samples, strict=True)]
        return {
            "global_views": np.stack([global_views for global_views, _, _ in made]),
            "local_views": np.stack([local_views for _, local_views, _ in made]),
            "skipped": np.array(["\0".join(skipped) for _, _, skipped in made]),
        }

    def _views(self, epoch: int, sample: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        image, skipped = read_or_next(self.images, sample)
        global_views, local_views = make_views(image, self.config, seed=self.seed, epoch=epoch, sample=sample)
        return global_views, local_views, skipped


def read_or_next(images: Listing, sample: int) -> tuple[Image.Image, list[str]]:
    """The image at `sample`, or where it cannot be read the next readable one of the listing: a rule that depends on the
    files only. Also returns what was passed over, as "path: reason"."""
    skipped: list[str] = []
    for offset in range(len(images)):
        path = images.path((sample + offset) % len(images))
        try:
            return read(path), skipped
        except UNREADABLE as error:
            skipped.append(f"{path}: {reason(error)}")
    raise ValueError(f"none of the {len(images)} images in {images.root} can be read any more")


def _dataset(make: Any, rows: int, task_rows: int, cpus: float) -> ray.data.Dataset:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=ExecutionResources(cpu=cpus))
    with DataContext.current(context):
        return ray.data.range(rows, override_num_blocks=rows // task_rows).map_batches(
            make, batch_size=task_rows, batch_format="numpy"
        )


def _to_views(rows: dict[str, np.ndarray]) -> Views:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # and nobody writes to it
        global_views, local_views = torch.from_numpy(rows["global_views"]), torch.from_numpy(rows["local_views"])
    skipped = [line for lines in rows["skipped"] if lines for line in str(lines).split("\0")]  # no path has a NUL
    return Views(global_views, local_views, skipped)
