"""Which machines of a cluster hold so many workers, which ones help them, and what all of them cost."""

import math
from collections.abc import Mapping

from massl_ray.planning.cluster_file import Cluster, Pool

CPU = "CPU"
"""The device of workers that compute on CPUs: one a machine."""


def devices(cluster: Cluster, train_device: str) -> list[str]:
    """What workers could run on: the GPUs' names, or CPUs where there are none or train.device says so."""
    names = {pool.gpu or "unknown" for pool in (cluster.head, *cluster.pools) if pool.gpus}
    return sorted(names) if names and train_device != "cpu" else [CPU]


def places(cluster: Cluster, device: str, threads: int = 1) -> int:
    """The most workers that the cluster holds. On CPUs at least half of them are left to make views."""
    head, left = cluster.head, _limit(cluster)
    count, cpus = _seats(head, device), head.cpus
    for pool in _largest_first(cluster, device):
        machines = min(pool.max, left)
        left -= machines
        count += machines * _seats(pool, device)
        cpus += machines * pool.cpus
    if device == CPU and count:
        return max(1, min(count, int(cpus // (2 * threads))))
    return count


def homes(cluster: Cluster, device: str, workers: int) -> dict[str, int]:
    """Machines of each pool besides the head: those that hold the workers, the cheapest first, or where so many machines are not
    allowed the largest; and those that are always there."""
    workers -= min(workers, _seats(cluster.head, device))
    held, left = _filled(cluster, device, workers, _cheapest_first(cluster, device))
    if left:
        held, _ = _filled(cluster, device, workers, _largest_first(cluster, device))
    always = {pool.name: pool.min for pool in cluster.pools if pool.min}
    return {name: max(held.get(name, 0), always.get(name, 0)) for name in held | always}


def _filled(cluster: Cluster, device: str, workers: int, pools: list[Pool]) -> tuple[dict[str, int], int]:
    """Machines taken of pools in this order, and workers that are left over."""
    allowed, taken = _limit(cluster), {}
    for pool in pools:
        machines = min(pool.max, allowed, math.ceil(workers / _seats(pool, device)))
        workers -= min(workers, machines * _seats(pool, device))
        allowed -= machines
        if machines:
            taken[pool.name] = machines
    return taken, workers


def helpers(cluster: Cluster, taken: Mapping[str, int], cpus: float) -> dict[str, int]:
    """More machines without GPUs that together have so many CPUs, or as many as there may be."""
    left = _limit(cluster) - sum(taken.values())
    more: dict[str, int] = {}
    for pool in sorted(cluster.pools, key=lambda pool: _price(pool) / max(pool.cpus, 1e-9)):
        if pool.gpus or not pool.cpus or cpus <= 1e-9:
            continue
        machines = max(0, min(pool.max - taken.get(pool.name, 0), left, math.ceil(cpus / pool.cpus - 1e-9)))
        cpus, left = cpus - machines * pool.cpus, left - machines
        if machines:
            more[pool.name] = machines
    return more


def cpus_of(cluster: Cluster, machines: Mapping[str, int]) -> float:
    """Of all of them; the head's are not among them."""
    return sum(pool.cpus * machines.get(pool.name, 0) for pool in cluster.pools)


def usd_per_hour(cluster: Cluster, machines: Mapping[str, int], on_demand: bool) -> float | None:
    """Head included; each in its own market, or all on demand. None where a price is not known."""
    total = 0.0
    for pool, number in ((cluster.head, 1), *((pool, machines.get(pool.name, 0)) for pool in cluster.pools)):
        price = pool.usd_on_demand if on_demand else pool.usd_per_hour
        if number and price is None:
            return None
        total += number * (price or 0.0)
    return total


def device_memory(cluster: Cluster, device: str) -> float | None:
    """Bytes of the smallest machine that may hold a worker on its CPUs; None where the file does not say."""
    known = [pool.memory_bytes for pool in (cluster.head, *cluster.pools) if _seats(pool, device) and pool.memory_bytes]
    return min(known, default=None)


def _seats(pool: Pool, device: str) -> int:
    """Workers that one machine holds."""
    if device == CPU:
        return int(pool.cpus >= 1)
    return pool.gpus if (pool.gpu or "unknown") == device else 0


def _cheapest_first(cluster: Cluster, device: str) -> list[Pool]:
    fitting = [pool for pool in cluster.pools if _seats(pool, device)]
    return sorted(fitting, key=lambda pool: _price(pool) / _seats(pool, device))


def _largest_first(cluster: Cluster, device: str) -> list[Pool]:
    return sorted(_cheapest_first(cluster, device), key=lambda pool: -_seats(pool, device))


def _price(pool: Pool) -> float:
    return math.inf if pool.usd_per_hour is None else pool.usd_per_hour


def _limit(cluster: Cluster) -> int:
    return sum(pool.max for pool in cluster.pools) if cluster.max_machines is None else cluster.max_machines
