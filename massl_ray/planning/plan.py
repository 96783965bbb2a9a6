"""How long a run takes on how many workers, what it costs, and what keeps them waiting."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from massl_ray.config import Config, Resolved, resolve
from massl_ray.data.order import worker_share
from massl_ray.errors import UserError
from massl_ray.planning.cluster_file import Cluster
from massl_ray.planning.estimate import Footprint, footprint, of_worker
from massl_ray.planning.gpus import GPUS, gpu_named
from massl_ray.planning.machines import CPU, cpus_of, device_memory, devices, helpers, homes, places, usd_per_hour
from massl_ray.planning.work import CPU_FLOPS_PER_S, Work, work

WORKER_CPUS = 0.75
"""That a worker reserves of its machine, for each thread (massl_ray.on_ray.layout); the rest makes views."""
ROOM = 0.92
"""Share of a GPU's memory that tensors can use: torch's allocator holds blocks that are too small for what comes next."""


@dataclass(frozen=True)
class Row:
    """A run at one number of workers, all on the same kind of device."""

    device: str  # the GPU's name, or CPU
    workers: int
    machines: Mapping[str, int]  # of each pool besides the head, those for views included
    batch_per_worker: tuple[int, int]  # images, smallest and largest share
    micro_batches: tuple[int, int]
    efficiency: float  # share of the time that the average worker computes: shares differ by a micro-batch
    rate: float  # images a second of a worker that never waits
    images_per_s: float  # of all of them
    cpus_needed: float  # to make the views as fast as the workers could use them
    cpus_spare: float  # on the machines of the workers, where no worker computes
    cpu_machines: int  # more of them, of pools without GPUs
    feeds: bool  # False: there are not enough CPUs, and the rate above is what they allow
    footprint: Footprint  # of a worker
    memory_bytes: float | None  # of its device
    hours: float
    usd: float | None  # each machine in its own market
    usd_on_demand: float | None

    @property
    def fits(self) -> bool:
        return self.memory_bytes is None or self.footprint.total <= ROOM * self.memory_bytes


@dataclass(frozen=True)
class Plan:
    """Rows by device and number of workers."""

    cluster: Cluster
    resolved: Resolved
    work: Work
    measured: bool  # the rate was given, not estimated
    rows: tuple[Row, ...]

    @property
    def cheapest(self) -> Row | None:
        """The row that costs least, of equal ones the fastest; without prices the fastest. None where the model fits nowhere."""
        fitting = [row for row in self.rows if row.fits]
        return min(fitting, key=lambda row: (row.usd if row.usd is not None else math.inf, row.hours), default=None)


@dataclass(frozen=True)
class _Case:
    """What all rows of a device share."""

    config: Config
    resolved: Resolved
    cluster: Cluster
    work: Work
    device: str
    alone: Footprint
    rate: float  # images a second of a worker that never waits


def plan(config: Config, dataset_size: int, cluster: Cluster, rate: float | None = None, cpu_s: float | None = None) -> Plan:
    """Every number of workers worth a look, on each kind of device that there is.

    Args:
        dataset_size: images.
        rate: images a second of one worker, if it was measured.
        cpu_s: seconds of one CPU for the views of an image, if they were measured.

    Raises:
        UserError: a GPU that is in no table, none where train.device asks for one, or fewer workers or micro-batches than
            elastic.min_workers.
    """
    resolved = resolve(config, dataset_size)
    if config.train.device == "cuda" and devices(cluster, "auto") == [CPU]:
        raise UserError(f"train.device is cuda, but {cluster.name} has no GPUs. Set it to auto, or plan for machines with GPUs.")
    need = work(config, resolved, cpu_s)
    rows: list[Row] = []
    for device in devices(cluster, config.train.device):
        alone = footprint(config, resolved, "cpu" if device == CPU else "cuda")
        case = _Case(
            config,
            resolved,
            cluster,
            need,
            device,
            alone,
            rate or _rate(config, device, need, alone.activations / resolved.micro_batch_size),
        )
        rows += [_row(case, workers) for workers in _sizes(case)]
    if not rows:
        raise UserError(
            f"No run of at least {config.elastic.min_workers} workers (elastic.min_workers) fits {cluster.name} and "
            f"{resolved.num_micro_batches} micro-batches a step. Lower it, or add machines."
        )
    return Plan(cluster, resolved, need, rate is not None, tuple(rows))


def _rate(config: Config, device: str, need: Work, kept_bytes: float) -> float:
    """Images a second of one worker, estimated; `kept_bytes` for the backward pass of an image."""
    if device == CPU:
        return config.train.threads * CPU_FLOPS_PER_S[config.train.precision] / need.flops
    return gpu_named(device).images_per_s(config.train.precision, need.flops, kept_bytes)


def _memory(cluster: Cluster, device: str) -> float | None:
    if device == CPU:
        return device_memory(cluster, CPU)
    return GPUS[device].memory_gib * 2**30 if device in GPUS else None


def _sizes(case: _Case) -> list[int]:
    """Numbers of workers: each up to 8, then powers of two, and the most that there may be."""
    elastic = case.config.elastic
    most = min(places(case.cluster, case.device, case.config.train.threads), case.resolved.num_micro_batches)
    if elastic.max_workers != "auto":
        most = min(most, elastic.max_workers)
    sizes = {*range(1, 9), *(2**power for power in range(4, 20)), most}
    return sorted(size for size in sizes if elastic.min_workers <= size <= most)


def _row(case: _Case, workers: int) -> Row:
    config, resolved, cluster, device = case.config, case.resolved, case.cluster, case.device
    shares = [last - first for first, last in (worker_share(i, workers, resolved.num_micro_batches) for i in range(workers))]
    efficiency = resolved.num_micro_batches / (workers * max(shares))
    held = homes(cluster, device, workers)
    threads = config.train.threads if device == CPU else 1
    spare = max(0.0, cluster.head.cpus + cpus_of(cluster, held) - workers * WORKER_CPUS * threads)
    wanted = case.rate * workers * efficiency
    needed = wanted * case.work.cpu_s
    more = helpers(cluster, held, needed - spare) if device != CPU else {}
    there = spare + cpus_of(cluster, more)
    images_per_s = wanted * min(1.0, there / needed)
    hours = resolved.end * resolved.batch_size / images_per_s / 3600 if images_per_s else math.inf
    machines = {name: held.get(name, 0) + more.get(name, 0) for name in held | more}
    prices = [usd_per_hour(cluster, machines, on_demand) for on_demand in (False, True)]
    return Row(
        device=device,
        workers=workers,
        machines=machines,
        batch_per_worker=(min(shares) * resolved.micro_batch_size, max(shares) * resolved.micro_batch_size),
        micro_batches=(min(shares), max(shares)),
        efficiency=efficiency,
        rate=case.rate,
        images_per_s=images_per_s,
        cpus_needed=needed,
        cpus_spare=spare,
        cpu_machines=sum(more.values()),
        feeds=there >= needed * (1 - 1e-9),
        footprint=of_worker(case.alone, config, resolved, workers),
        memory_bytes=_memory(cluster, device),
        hours=hours,
        usd=None if prices[0] is None else hours * prices[0],
        usd_on_demand=None if prices[1] is None else hours * prices[1],
    )
