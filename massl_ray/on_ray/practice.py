"""A cluster of pretended machines on this one, and a run on it that meets what happens to machines. For measurements and tests."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.cluster_utils import Cluster

from massl_ray.on_ray.cluster import private
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
        with _address_file_in(self.scratch.name):
            self.cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "object_store_memory": OBJECTS,
                    "include_dashboard": False,
                    "_system_config": (HEAD if fast else {}) | {"worker_niceness": 0},  # whatever else this computer does
                    "temp_dir": self.scratch.name,
                },
            )
        self.address = str(self.cluster.address)
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

    def give_notice(self, rank: int, seconds: float, then_kill: bool = False) -> None:
        """The machine of that worker will go away in so many seconds, and does with `then_kill`."""
        node_id = self.placed[rank]["node"]
        if then_kill:
            end = threading.Timer(seconds, lambda: self.cluster.remove_node(self.machines.pop(node_id), allow_graceful=False))
            end.daemon = True
            end.start()
        address = ray.get_runtime_context().gcs_address
        client = ray._raylet.GcsClient(address=address)  # type: ignore[attr-defined]
        deadline_ms = int((time.time() + seconds) * 1000)
        client.drain_node(node_id, PREEMPTION, "notice", deadline_ms)

    def follow(self, event: dict[str, Any]) -> None:
        if event["kind"] == "placed":
            self.placed[event["rank"]] = event
        elif event["kind"] == "started":
            self.placed = {rank: place for rank, place in self.placed.items() if rank < event["world_size"]}

    def close(self) -> None:
        with _address_file_in(self.scratch.name):
            ray.shutdown()
            self.cluster.shutdown()
        self.scratch.cleanup()


@contextmanager
def _address_file_in(folder: str) -> Iterator[None]:
    """Cluster writes down where it is, in a directory that may not exist, over the address of a cluster that may, and takes it away
    in the end: let it do so in a `folder` of its own."""
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    os.makedirs(os.path.join(folder, "ray"), exist_ok=True)
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before


@contextmanager
def practice_cluster(num_machines: int, *, fast: bool = True) -> Iterator[PracticeCluster]:
    """`fast`: with the knobs of `on_ray.knobs`; otherwise Ray as it comes."""
    if fast:
        set_knobs()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with private():
        cluster = PracticeCluster(num_machines, fast=fast)
        try:
            yield cluster
        finally:
            cluster.close()


def run_through(
    run: Run, cluster: PracticeCluster, meet: Callable[[dict[str, Any]], None], *, stock: bool = False
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Train, handing every event to `meet`, which may let things happen to the cluster. Returns the outcome and all events, each
    with the time of its arrival, `seen`, in seconds.

    `stock`: leave elasticity to Ray Train's own settings.
    """
    events, recorder = [], RunRecorder(run)

    def follow(event: dict[str, Any]) -> None:
        seen = event | {"seen": time.monotonic()}
        recorder.follow(event)
        cluster.follow(event)
        events.append(seen)
        meet(seen)

    try:
        return run_workers(run, follow, stock=stock), events
    finally:
        recorder.close()


class Scenario:
    """What happens to a cluster during a run, in the order of a script: a generator that waits with `yield from` for steps and
    transitions, and lets things happen between. Hand `meet` to `run_through`.
    """

    def __init__(self, script: "Callable[[Scenario], Wait]"):
        self.life = self.step = 0
        self.over = False  # whether the script has ended
        self._script = script(self)
        self._resume(None)

    def meet(self, event: dict[str, Any]) -> None:
        if not self.over and event["kind"] in ("progress", "transition", "note"):
            self.life, self.step = event.get("life", self.life), event.get("step", self.step)
            self._resume(event)

    def steps(self, number: int) -> "Wait":
        """Until so many more steps are done."""
        until = self.step + number
        while self.step < until:
            yield

    def transition(self, world_size: int) -> "Wait":
        """Until so many workers have done a step after a change; returns the event, with the time of its arrival, `seen`."""
        while True:
            event = yield
            if event["kind"] == "transition" and event["to"] == world_size:
                return event

    def noted(self, words: str) -> "Wait":
        """Until the user is told something with these words."""
        while words not in (yield).get("text", ""):
            pass

    def _resume(self, event: dict[str, Any] | None) -> None:
        try:
            self._script.send(event)  # type: ignore[arg-type]
        except StopIteration:
            self.over = True


Wait = Generator[None, dict[str, Any], Any]
