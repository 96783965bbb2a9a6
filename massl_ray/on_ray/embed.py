"""Embeddings over the whole cluster, in order. A row of the dataset is a batch of images, so batches are the same whichever tasks
Ray Data makes of them.

With GPUs tasks decode, and an actor a GPU embeds. Without, an actor a CPU does both: there is nothing to overlap, and images need
not travel.
"""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, ExecutionOptions, ExecutionResources
from ray.data._internal.datasource.range_datasource import RangeDatasource
from ray.data.block import BlockAccessor

from massl_ray.data.decode import Decoding
from massl_ray.data.listing import Listing
from massl_ray.evaluation.embedding import Decoded, Embedded, Plan, decode, embed, write_part
from massl_ray.evaluation.subjects import Subject
from massl_ray.on_ray.pace import Pace
from massl_ray.storage import Folder

ACTOR_CPUS, READ_CPUS = 0.9, 0.1  # without GPUs: on every machine with an actor a CPU there is room for the tasks that number rows
TASK_BATCHES = 8  # at most
DATASET_BATCHES = 16_384  # Ray Data plans all tasks of a dataset before the first one runs, in 4 ms each; then a new one begins
IN_FLIGHT = 4  # tasks that an actor has in line

Rows = dict[str, np.ndarray]


def embed_parts(subject: Subject, images: Listing, folder: Folder, plan: Plan, parts: list[int]) -> Iterator[int]:
    """Make the missing parts, `parts`; gives amounts of images as they are done, first of those that were done before."""
    numbers = [batch for part in parts for batch in plan.batches_of(part)]
    yield plan.count - sum(len(plan.samples(number)) for number in numbers)
    batches = embed_batches(subject, images, plan, numbers)
    for part in parts:
        yield from write_part(folder, plan, part, images, batches)


def embed_batches(subject: Subject, images: Listing, plan: Plan, numbers: list[int]) -> Iterator[Embedded]:
    """Of the batches of these numbers, in their order."""
    shared = Shared(ray.put(subject.to(torch.device("cpu"))), ray.put(images), ray.put(np.array(numbers, np.int64)), plan)
    for first in range(0, len(numbers), DATASET_BATCHES):
        rows = _dataset(shared, first, min(DATASET_BATCHES, len(numbers) - first), subject)
        for bundle in rows.iter_internal_ref_bundles():
            for entry in bundle.blocks:
                block: Any = ray.get(entry.ref)  # pyright: ignore[reportCallIssue, reportArgumentType]
                yield from _batches(block, plan)


class Shared:
    """What tasks and actors need: once a machine, not once a task."""

    def __init__(self, subject: Any, images: Any, numbers: Any, plan: Plan):
        self.references, self.plan, self.held = (subject, images, numbers), plan, None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"held": None}

    def get(self) -> tuple[Subject, Listing, np.ndarray]:
        if self.held is None:
            self.held = tuple(ray.get(list(self.references)))
        return self.held  # type: ignore[return-value]

    def decode(self, row: int) -> Decoded:
        subject, images, numbers = self.get()
        how = Decoding(self.plan.max_pixels, subject.channels, self.plan.white)
        return decode(subject, images, how, self.plan.samples(int(numbers[row])))


class Decoder:
    """Row numbers into batches of views. A task."""

    def __init__(self, shared: Shared, first: int):
        self.shared, self.first = shared, first

    def __call__(self, rows: Rows) -> Iterator[Rows]:
        for row in rows["id"].tolist():
            found = self.shared.decode(self.first + row)
            yield _row(found.samples, found.views, found.skipped)


class Embedder:
    """Row numbers, or batches of views, into batches of vectors. An actor."""

    def __init__(self, shared: Shared, first: int, on_gpu: bool):
        torch.set_num_threads(1)
        self.shared, self.first = shared, first
        self.subject = shared.get()[0].to(torch.device("cuda" if on_gpu else "cpu"))

    def __call__(self, rows: Rows) -> Iterator[Rows]:
        for decoded in self._decoded(rows):
            found = embed(self.subject, self.shared.plan, decoded)
            yield _row(found.samples, found.vectors, found.skipped)

    def _decoded(self, rows: Rows) -> Iterator[Decoded]:
        if "id" in rows:
            yield from (self.shared.decode(self.first + row) for row in rows["id"].tolist())
            return
        shape = (-1, self.subject.size, self.subject.size, self.subject.channels)
        for samples, views, skipped in _columns(rows):
            yield Decoded(np.frombuffer(samples, np.int64), np.frombuffer(views, np.uint8).reshape(shape).copy(), skipped)


def _dataset(shared: Shared, first: int, count: int, subject: Subject) -> ray.data.Dataset:
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
    actors = min(gpus or cpus, count)
    task_batches = max(1, min(TASK_BATCHES, count // (4 * actors)))
    view_bytes = shared.plan.batch * subject.size**2 * subject.channels if gpus else 0
    made_bytes = shared.plan.batch * shared.plan.width * (4 if shared.plan.dtype == "float32" else 2)
    context = _context(task_batches * max(view_bytes, made_bytes), actors * IN_FLIGHT + (cpus if gpus else 0))
    with DataContext.current(context):
        numbers = ray.data.read_datasource(
            RangeDatasource(count, block_format="arrow", column_name="id"),
            override_num_blocks=-(-count // task_batches),
            num_cpus=READ_CPUS if not gpus else 1,
        )
        batched: dict[str, Any] = {"batch_size": None, "batch_format": "numpy"}
        if gpus:
            numbers = numbers.map_batches(Decoder(shared, first), num_cpus=1, **batched)  # pyright: ignore[reportArgumentType]
        return numbers.map_batches(
            Embedder,  # pyright: ignore[reportArgumentType]
            fn_constructor_args=(shared, first, bool(gpus)),
            compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=IN_FLIGHT),
            num_cpus=0 if gpus else ACTOR_CPUS,
            num_gpus=1 if gpus else 0,
            **batched,
        )


def _context(task_bytes: int, tasks: int) -> DataContext:
    """In order, silent, with little more made than is asked for."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every dataset that ends
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Pace]
    context.memory_usage_poll_interval_s = None
    context.target_max_block_size = 2 * task_bytes
    room = ExecutionResources(object_store_memory=max(256_000_000, 4 * task_bytes * tasks))
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=room)
    return context


def _row(samples: np.ndarray, values: np.ndarray, skipped: tuple[str, ...]) -> Rows:
    row = {"samples": np.empty(1, object), "values": np.empty(1, object), "skipped": np.empty(1, object)}
    row["samples"][0], row["values"][0], row["skipped"][0] = samples.tobytes(), values.tobytes(), "\0".join(skipped)
    return row  # no path has a NUL


def _columns(rows: Rows) -> Iterator[tuple[bytes, bytes, tuple[str, ...]]]:
    for samples, values, skipped in zip(rows["samples"], rows["values"], rows["skipped"], strict=True):
        yield samples, values, tuple(skipped.split("\0")) if skipped else ()


def _batches(block: Any, plan: Plan) -> Iterator[Embedded]:
    rows: Any = BlockAccessor.for_block(block).to_numpy()
    for samples, vectors, skipped in _columns(rows):
        yield Embedded(np.frombuffer(samples, np.int64), np.frombuffer(vectors, plan.dtype).reshape(-1, plan.width), skipped)
