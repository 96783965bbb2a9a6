"""A cluster of pretended machines on this one, and a run on it that meets what happens to machines. For measurements and tests."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.cluster_utils import Cluster

from massl_ray.on_ray.knobs import HEAD, QUIET, set_knobs
from massl_ray.on_ray.launch import run_workers
from massl_ray.reporting.recorder import RunRecorder
from massl_ray.training.loop import Outcome
from massl_ray.training.run import Run

OBJECTS = 150 * 2**20  # bytes of each machine's object store
PREEMPTION = 2  # Ray's reason for draining


class PracticeCluster:
    """Machines of one CPU, beside a head that has none and holds the command.

    `placed` and `node` follow the run: where each worker lives. Times are of this process's monotonic clock, in seconds.
    """

    def __init__(self, num_machines: int, *, fast: bool = True):
        self.scratch = TemporaryDirectory(prefix="mr-")  # short: Ray's sockets lie inside, and their paths are limited
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": OBJECTS,
                "include_dashboard": False,
                "_system_config": HEAD if fast else None,
                "temp_dir": self.scratch.name,
            },
        )
        self.machines: dict[str, Any] = {}  # by node id
        self.placed: dict[int, dict[str, Any]] = {}  # by rank
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        for _ in range(num_machines):
            self.add()

    def add(self) -> str:
        """Start a machine; returns its node id once it has joined."""
        node = self.cluster.add_node(num_cpus=1, object_store_memory=OBJECTS)
        self.machines[node.node_id] = node
        return node.node_id

    def kill(self, rank: int) -> None:
        """The machine of that worker vanishes."""
        node_id = self.placed[rank]["node"]
        self.cluster.remove_node(self.machines.pop(node_id), allow_graceful=False)

    def kill_worker(self, rank: int) -> None:
        """Only the process of that worker vanishes."""
        os.kill(self.placed[rank]["pid"], signal.SIGKILL)

    def give_notice(self, rank: int, seconds: float) -> None:
        """The machine of that worker will go away in so many seconds."""
        address = ray.get_runtime_context().gcs_address
        client = ray._raylet.GcsClient(address=address)  # type: ignore[attr-defined]
        deadline_ms = int((time.time() + seconds) * 1000)
        client.drain_node(self.placed[rank]["node"], PREEMPTION, "notice", deadline_ms)

    def follow(self, event: dict[str, Any]) -> None:
        if event["kind"] == "placed":
            self.placed[event["rank"]] = event
        elif event["kind"] == "started":
            self.placed = {rank: place for rank, place in self.placed.items() if rank < event["world_size"]}

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()
        self.scratch.cleanup()


@contextmanager
def practice_cluster(num_machines: int, *, fast: bool = True) -> Iterator[PracticeCluster]:
    """`fast`: with the knobs of `on_ray.knobs`; otherwise Ray as it comes."""
    if fast:
        set_knobs()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    cluster = PracticeCluster(num_machines, fast=fast)
    try:
        yield cluster
    finally:
        cluster.close()


def run_through(
    run: Run, cluster: PracticeCluster, happenings: Mapping[int, Callable[[], None]], *, stock: bool = False
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Train, and let things happen once the run has first done so many steps. Returns the outcome and all events, each with its
    time of arrival `seen` in seconds.

    `stock`: leave elasticity to Ray Train's own settings.
    """
    waiting, events, recorder = dict(happenings), [], RunRecorder(run)

    def follow(event: dict[str, Any]) -> None:
        recorder.follow(event)
        events.append(event | {"seen": time.monotonic()})
        cluster.follow(event)
        if event["kind"] == "progress":
            for step in sorted(step for step in waiting if step <= event["step"]):
                waiting.pop(step)()

    try:
        return run_workers(run, follow, stock=stock), events
    finally:
        recorder.close()
