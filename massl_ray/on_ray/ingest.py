"""Ray Data as the source of views: this worker's slice of every step's batch, from any step on, in order."""

import sys
import warnings
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import DataContext, ExecutionOptions, ExecutionResources
from ray.data._internal.datasource.range_datasource import RangeDatasource
from torch import Tensor

from massl_ray.data.making import ViewMaker
from massl_ray.data.order import worker_share
from massl_ray.method.device_views import device_views, padded
from massl_ray.method.views import draw_views
from massl_ray.on_ray.layout import DATA_TASK_CPUS, DataTasks
from massl_ray.on_ray.pace import Pace
from massl_ray.training.loop import Views
from massl_ray.training.run import Run

TASKS, STEPS = 64, 16  # a dataset is made of so many tasks, and of so many steps at least; a run is a chain of datasets
LEAD = 8  # steps before the end of a dataset at which the next one starts
# Ray Data plans all tasks of a dataset before the first one runs, in 4 ms each: 0.6 s to the first batch of 64 tasks, 3 s of 256.
AHEAD = 8  # steps that views are made before they are needed: those that a change of the number of workers finds are lost
ROWS = 64  # images a task makes views of, at most
SWITCH_S = 0.0005  # after which threads that look after data hand the interpreter back to the one that trains (0.005)


def stream_views(
    run: Run, rank: int, world_size: int, start_step: int, tasks: DataTasks, device: torch.device
) -> Generator[Views, None, None]:
    """Views of this worker's share of each step's batch, from `start_step` to the end of the run.

    What comes out depends on (configuration, images, step, share) only, so a restart at any step and any number of workers
    continues with the very next sample.
    """
    sys.setswitchinterval(SWITCH_S)
    first, last = (edge * run.resolved.micro_batch_size for edge in worker_share(rank, world_size, run.resolved.num_micro_batches))
    share, steps = last - first, run.resolved.steps
    task_rows = next(rows for rows in range(min(share, ROWS), 0, -1) if share % rows == 0)
    steps_at_once = max(STEPS, TASKS * task_rows // share)

    def dataset_from(begin: int) -> Generator[Views, None, None]:
        make = ViewMaker(run.images, run.config, run.resolved.batch_size, begin, first, share)
        rows = (min(begin + steps_at_once, steps) - begin) * share
        dataset = _dataset(make, rows, task_rows, tasks, AHEAD * share, _row_bytes(run))
        for rows in dataset.iter_batches(batch_size=share, batch_format="numpy", prefetch_batches=2):
            yield _to_views(rows, run, device)  # type: ignore[arg-type]

    upcoming = dataset_from(start_step)
    for begin in range(start_step, steps, steps_at_once):
        end, current = begin + steps_at_once, upcoming
        for step, views in enumerate(current, begin):
            if step == max(begin, end - LEAD) and end < steps:
                upcoming = start_now(dataset_from(end))
            yield views


def start_now(stream: Generator[Views, None, None]) -> Generator[Views, None, None]:
    """Ray Data takes seconds to its first batch: begin fetching it while the caller prepares."""
    first = ThreadPoolExecutor(1).submit(next, stream)

    def views() -> Generator[Views, None, None]:
        try:
            yield first.result()
            yield from stream
        finally:
            wait([first])  # a generator at work cannot be closed
            stream.close()

    return views()


def warm_up() -> None:
    """What Ray Data does once in a process takes a second or two; and a task on this machine starts a process for the next."""
    for _ in _dataset(lambda rows: rows, 1, 1, DataTasks(1, DATA_TASK_CPUS), 1, 2**20).iter_batches():
        pass


def _row_bytes(run: Run) -> int:
    """About what an image's row of the dataset takes."""
    config = run.config.views
    if config.device != "cpu":
        return run.config.data.channels * 2**20  # decoded, a megapixel
    return run.config.data.channels * (2 * config.global_size**2 + config.num_local * config.local_size**2)


def _dataset(make: Any, rows: int, task_rows: int, tasks: DataTasks, ahead: int, row_bytes: int) -> ray.data.Dataset:
    """Of row numbers and what `make` makes of them, in tasks of so many rows, and not much more than `ahead` rows, of about
    `row_bytes`, before they are asked for."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Pace]
    context.memory_usage_poll_interval_s = None  # a thread in every task, for a figure that nobody looks at
    context.target_max_block_size = 2 * task_rows * row_bytes  # else 128 MB are set aside for each task that runs
    unread = ahead + 2 * (tasks.at_once + tasks.waiting) * task_rows
    room = ExecutionResources(cpu=tasks.at_once * tasks.cpus, object_store_memory=row_bytes * unread)
    options = context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=room)
    # Ray Data submits no more than would run at once, and follows up a task that has ended only when its loop looks next. Take away
    # less than nothing of the cluster's CPUs, and some wait in line at Ray.
    options._set_exclude_resources(ExecutionResources(cpu=-tasks.waiting * tasks.cpus))
    with DataContext.current(context):
        numbers = ray.data.read_datasource(  # ray.data.range would reserve a whole CPU a task
            RangeDatasource(rows, block_format="arrow", column_name="id"),
            override_num_blocks=rows // task_rows,
            num_cpus=tasks.cpus,
        )
        # A batch is a whole block: of any other size would keep reading and making views apart, as two tasks each.
        return numbers.map_batches(make, batch_size=None, batch_format="numpy", num_cpus=tasks.cpus)


def _to_views(rows: dict[str, np.ndarray], run: Run, device: torch.device) -> Views:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")  # and nobody writes to it
        if "pixels" in rows:
            global_views, local_views = _views_on_device(rows, run, device)
        else:
            global_views, local_views = torch.from_numpy(rows["global_views"]), torch.from_numpy(rows["local_views"])
    skipped = [line for lines in rows["skipped"] if lines for line in str(lines).split("\0")]  # no path has a NUL
    return Views(global_views, local_views, skipped)


def _views_on_device(rows: dict[str, np.ndarray], run: Run, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make the views of decoded images, a micro-batch at a time: its images are the same whichever worker has it, and so are
    the last bits of sums over them."""
    config, size = run.config.views, run.resolved.micro_batch_size
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first in range(0, len(rows["pixels"]), size):
        part = {name: column[first : first + size].tolist() for name, column in rows.items()}
        images = [
            torch.frombuffer(pixels, dtype=torch.uint8).view(*shape)
            for pixels, shape in zip(part["pixels"], part["shape"], strict=True)
        ]
        drawn = [
            draw_views(config, width, height, seed=run.config.run.seed, epoch=epoch, sample=sample)
            for (width, height), epoch, sample in zip(part["size"], part["epoch"], part["sample"], strict=True)
        ]
        batch = padded(images, device)
        groups[0].append(device_views(batch, part["shrunk"], [views[:2] for views in drawn]))
        side = config.local_size
        empty = torch.empty(len(images), 0, side, side, run.config.data.channels, dtype=torch.uint8, device=device)
        groups[1].append(device_views(batch, part["shrunk"], [views[2:] for views in drawn]) if config.num_local else empty)
    return torch.cat(groups[0]), torch.cat(groups[1])
