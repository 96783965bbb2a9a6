"""How many workers, what each reserves, and the CPUs that remain for Ray Data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import placement_group

from massl_ray.config import Config
from massl_ray.on_ray.place import Seat

DATA_TASK_CPUS = 0.25
"""That a task of Ray Data reserves at least. Workers reserve three quarters of a CPU a thread, so on any machine that holds a
worker there is room for a task, and nobody waits for ever."""

MAX_GPUS = "massl-ray/max-gpus"
"""Label of a head node: how many GPUs its autoscaler may bring. Ray itself does not tell, and at first there are none."""


@dataclass(frozen=True)
class Layout:
    """What a run asks of a cluster."""

    min_workers: int
    max_workers: int
    use_gpu: bool
    per_worker: Mapping[str, float]  # resources
    tasks: int | None = None  # of Ray Data for each worker; None: by the CPUs there are


def plan_layout(config: Config, num_micro_batches: int) -> Layout:
    """For the cluster at hand. elastic.max_workers 'auto': one a GPU that there is or that the autoscaler may bring; without GPUs
    one a machine, leaving at least half of the CPUs to Ray Data. A worker needs a micro-batch, so there are never more of them."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node["Resources"] for node in alive]
    promised = max((int(node["Labels"].get(MAX_GPUS, 0)) for node in alive), default=0)
    gpus = max(promised, int(sum(resources.get("GPU", 0) for resources in nodes)))
    use_gpu = config.train.device == "cuda" or (config.train.device == "auto" and gpus > 0)
    threads = config.train.threads
    machines = sum(resources.get("CPU", 0) >= 1 for resources in nodes)
    cpus = sum(resources.get("CPU", 0) for resources in nodes)
    automatic = gpus if use_gpu else min(machines, int(cpus // (2 * threads)))
    most = max(1, automatic) if config.elastic.max_workers == "auto" else config.elastic.max_workers
    if use_gpu and promised:  # asked for more than it may bring, Ray's autoscaler brings nothing
        most = min(most, gpus)
    most = max(config.elastic.min_workers, min(most, num_micro_batches))
    smallest = min((resources["CPU"] for resources in nodes if resources.get("CPU", 0) >= 1), default=1.0)
    per_worker = {"CPU": 1 - DATA_TASK_CPUS, "GPU": 1.0} if use_gpu else {"CPU": (1 - DATA_TASK_CPUS) * min(threads, smallest)}
    tasks = None if config.elastic.view_tasks == "auto" else config.elastic.view_tasks
    return Layout(config.elastic.min_workers, most, use_gpu, per_worker, tasks)


def fitting(layout: Layout, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many workers, up to the most wanted, machines of these resources hold."""
    held = sum(int(min(node.get(name, 0.0) // amount for name, amount in layout.per_worker.items())) for node in nodes)
    return min(held, layout.max_workers)


def free_seats(
    layout: Layout, nodes: Mapping[str, Mapping[str, float]], available: Mapping[str, Mapping[str, float]], taken: Sequence[Seat]
) -> tuple[Seat, ...]:
    """Room for more workers, up to the most wanted, on machines that have none yet. Left out is a machine whose GPUs are partly in
    use: nobody but Ray knows which ones are free."""
    seats: list[Seat] = []
    for node, resources in nodes.items():
        free = available.get(node, {})
        if any(seat.node == node for seat in taken) or free.get("GPU", 0.0) < resources.get("GPU", 0.0):
            continue
        seats += [Seat(node, str(place) if layout.use_gpu else None) for place in range(fitting(layout, [free]))]
    return tuple(seats[: max(0, layout.max_workers - len(taken))])


def reserve_worker(layout: Layout) -> None:
    """Take what a worker computes with from the cluster, for a process that computes outside Ray."""
    ray.get(placement_group([dict(layout.per_worker)]).ready())


@dataclass(frozen=True)
class DataTasks:
    """The tasks of Ray Data that make one worker's views."""

    at_once: int
    cpus: float  # that each reserves

    @property
    def waiting(self) -> int:
        """How many more wait in line. Tasks of a part of a CPU run wherever there is room, also on a machine that has just joined:
        no more of them than leave room there for a worker."""
        return 2 * self.at_once if self.cpus == 1 else self.at_once


def data_tasks(layout: Layout, world_size: int) -> DataTasks:
    """One for each of a worker's share of the CPUs that no worker computes with. A task reserves a whole CPU where any machine can
    spare one, so that Ray does not run more of them at a time than there are CPUs; but not while the run waits for machines: tasks
    in line would take the CPUs of one that joins before a worker could."""
    if layout.tasks:
        return DataTasks(layout.tasks, DATA_TASK_CPUS)  # others may compute beside this run: a whole CPU may never be free
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    reserved = layout.per_worker["CPU"]
    spare = min((node["CPU"] - reserved * fitting(layout, [node]) for node in nodes), default=0.0)
    free = sum(node["CPU"] for node in nodes) - world_size * reserved
    return DataTasks(max(1, round(free / world_size)), 1.0 if spare >= 1 and world_size >= layout.max_workers else DATA_TASK_CPUS)
