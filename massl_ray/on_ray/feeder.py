"""Ray Data at work for one worker, in a process of its own: looking after tasks and blocks would take the interpreter from the one
that trains, twenty times a step. It imports no torch, so that it is there before the worker is."""

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.data import DataContext, ExecutionOptions, ExecutionResources
from ray.data._internal.datasource.range_datasource import RangeDatasource
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from massl_ray.data.making import ViewMaker
from massl_ray.on_ray.layout import DATA_TASK_CPUS, DataTasks
from massl_ray.on_ray.pace import Pace

TASKS, STEPS = 64, 16  # a dataset is made of so many tasks, and of so many steps at least; a run is a chain of datasets
LEAD = 8  # steps before the end of a dataset at which the next one starts
# Ray Data plans all tasks of a dataset before the first one runs, in 4 ms each: 0.6 s to the first batch of 64 tasks, 3 s of 256.
AHEAD = 8  # steps that views are made before they are needed: those that a change of the number of workers finds are lost
ROWS = 64  # images a task makes views of, at most

Blocks = list[Any]
"""References to Arrow tables, which one after the other have the rows of one step."""


@dataclass(frozen=True)
class Feed:
    """What one worker trains on from one step to the end of the run."""

    make: ViewMaker  # which knows the first step
    share: int  # images a step
    steps: int
    tasks: DataTasks
    row_bytes: int  # about what an image takes


class Feeder:
    """An actor. Calls are answered in their order."""

    def __init__(self) -> None:
        # What Ray Data does once in a process takes a second or two; and a task on this machine starts a process for the next.
        for _ in dataset(lambda rows: rows, 1, 1, DataTasks(1, DATA_TASK_CPUS), 1, 2**20).iter_batches():
            pass
        self.blocks: Generator[Blocks, None, None] | None = None

    def ready(self) -> None: ...

    def open(self, feed: Feed) -> None:
        self.close()
        self.blocks = blocks_of(feed)

    def next(self) -> Blocks | None:
        """Those of the next step, on this machine; None after the last one."""
        blocks = next(self.blocks, None) if self.blocks else None
        if blocks:
            ray.wait(blocks, num_returns=len(blocks), fetch_local=True)
        return blocks

    def close(self) -> None:
        if self.blocks:
            self.blocks.close()
        self.blocks = None


def start_feeder() -> Any:
    """For this process, on its machine; it ends with it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Feeder).options(scheduling_strategy=here).remote()


def blocks_of(feed: Feed) -> Generator[Blocks, None, None]:
    """By step."""
    task_rows = next(rows for rows in range(min(feed.share, ROWS), 0, -1) if feed.share % rows == 0)
    steps_at_once = max(STEPS, TASKS * task_rows // feed.share)

    def part_from(begin: int) -> Generator[Blocks, None, None]:
        rows = (min(begin + steps_at_once, feed.steps) - begin) * feed.share
        make = feed.make.later(begin)
        return _by_step(dataset(make, rows, task_rows, feed.tasks, AHEAD * feed.share, feed.row_bytes), feed.share)

    if not feed.steps:
        return
    upcoming = part_from(0)
    for begin in range(0, feed.steps, steps_at_once):
        end, current = begin + steps_at_once, upcoming
        for step, blocks in enumerate(current, begin):
            if step == max(begin, end - LEAD) and end < feed.steps:
                upcoming = _start_now(part_from(end))
            yield blocks


def _by_step(rows: ray.data.Dataset, share: int) -> Generator[Blocks, None, None]:
    """The rows of a task divide `share`, so a step ends where a block does."""
    blocks: Blocks = []
    number = 0
    for bundle in rows.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            blocks.append(entry.ref)
            number += entry.metadata.num_rows or 0
        if number == share:
            yield blocks
            blocks, number = [], 0


def _start_now(stream: Generator[Blocks, None, None]) -> Generator[Blocks, None, None]:
    """Ray Data takes a second to its first block: begin while there are others."""
    first: Future[Blocks] = ThreadPoolExecutor(1).submit(next, stream)

    def blocks() -> Generator[Blocks, None, None]:
        yield first.result()
        yield from stream

    return blocks()


def dataset(make: Any, rows: int, task_rows: int, tasks: DataTasks, ahead: int, row_bytes: int) -> ray.data.Dataset:
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
