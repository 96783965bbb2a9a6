"""What a cluster file says: which machines there may be, how many, and what they cost. Of Ray's cluster launcher and of KubeRay.

Prices, the market and the GPU's name stand in `labels` of the launcher's node types and in annotations of KubeRay's pod templates,
as massl-ray/usd-per-hour, massl-ray/usd-per-hour-spot, massl-ray/prices-of (YYYY-MM-DD), massl-ray/market (spot or on-demand) and
massl-ray/gpu (`massl_ray.planning.gpus`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from massl_ray.errors import UserError

PREFIX = "massl-ray/"
UNITS = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True)
class Pool:
    """Machines that are alike."""

    name: str
    min: int  # machines
    max: int
    cpus: float  # of a machine, as Ray counts them
    gpus: int
    gpu: str | None = None  # as in massl_ray.planning.gpus
    spot: bool = False
    usd_on_demand: float | None = None  # an hour of a machine
    usd_spot: float | None = None
    prices_of: date | None = None
    memory_bytes: float | None = None  # of a machine; None: the file does not say

    @property
    def usd_per_hour(self) -> float | None:
        """In the market that it is rented in."""
        return self.usd_spot if self.spot and self.usd_spot is not None else self.usd_on_demand


@dataclass(frozen=True)
class Cluster:
    """Machines to plan for."""

    name: str
    kind: str  # 'launcher', 'kuberay' or 'machine': this one
    head: Pool
    pools: tuple[Pool, ...]
    max_machines: int | None = None  # besides the head, of all pools together
    max_gpus: int | None = None  # what the head's label massl-ray/max-gpus promises
    dashboard_host: str | None = None  # that the head is told to listen on
    guarded: bool = False  # KubeRay: the file itself keeps others out, by a network policy or Ray's tokens

    @property
    def all_gpus(self) -> int:
        """The most GPUs that pools may have at a time."""
        left, gpus = self.max_machines, 0
        for pool in sorted(self.pools, key=lambda pool: -pool.gpus):
            machines = pool.max if left is None else min(pool.max, left)
            left = None if left is None else left - machines
            gpus += machines * pool.gpus
        return gpus


def read_cluster(path: Path) -> Cluster:
    """Raises UserError for a file that cannot be read, is no cluster file, or leaves out what a plan needs."""
    try:
        documents = [each for each in yaml.safe_load_all(path.read_text()) if isinstance(each, Mapping)]
    except OSError as error:
        raise UserError(f"The cluster file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"The cluster file {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    for document in documents:
        if document.get("kind") == "RayCluster":
            return _kuberay(_File(path), document, documents)
        if "available_node_types" in document:
            return _launcher(_File(path), document)
    raise UserError(
        f"The cluster file {path} has neither available_node_types (Ray's cluster launcher) nor kind: RayCluster (KubeRay). "
        "Give one like those in cluster/."
    )


@dataclass(frozen=True)
class _File:
    path: Path

    def fail(self, where: str, what: str) -> UserError:
        return UserError(f"The cluster file {self.path}: {where} {what}.")

    def number(self, value: Any, where: str) -> float:
        """A number with one of Kubernetes' units, or none."""
        found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", str(value).strip())
        try:
            if not found or found[2] not in UNITS:
                raise ValueError
            return float(found[1]) * UNITS[found[2]]
        except ValueError:
            raise self.fail(where, f"is {value!r}, which is no number") from None

    def count(self, value: Any, where: str) -> int:
        number = self.number(value, where)
        if number != int(number):
            raise self.fail(where, f"is {value!r}, which is no whole number")
        return int(number)

    def section(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.fail(where, "is missing" if value is None else "must have keys and values")
        return value

    def facts(self, labels: Any, where: str) -> dict[str, Any]:
        """Our labels as fields of a Pool."""
        given = {key.removeprefix(PREFIX): value for key, value in (labels or {}).items() if str(key).startswith(PREFIX)}
        facts: dict[str, Any] = {"gpu": str(given["gpu"]) if "gpu" in given else None}
        for key, field in (("usd-per-hour", "usd_on_demand"), ("usd-per-hour-spot", "usd_spot")):
            if key in given:
                facts[field] = self.number(given[key], f"{where} {PREFIX}{key}")
        market = given.get("market", "on-demand")
        if market not in ("spot", "on-demand"):
            raise self.fail(f"{where} {PREFIX}market", f"is {market!r}: it must be spot or on-demand")
        try:
            facts["prices_of"] = date.fromisoformat(str(given["prices-of"])) if "prices-of" in given else None
        except ValueError:
            raise self.fail(f"{where} {PREFIX}prices-of", f"is {given['prices-of']!r}, which is no date (YYYY-MM-DD)") from None
        return facts | {"spot": market == "spot"}


def _launcher(file: _File, document: Mapping[str, Any]) -> Cluster:
    types = file.section(document["available_node_types"], "available_node_types")
    head_type = document.get("head_node_type")
    if not isinstance(head_type, str) or head_type not in types:
        raise file.fail("head_node_type", f"is {head_type!r}: it must be one of {', '.join(map(str, types))}")
    given = {str(name): file.section(each, f"available_node_types.{name}") for name, each in types.items()}
    pools = {name: _launcher_pool(file, name, each) for name, each in given.items()}
    head = pools.pop(head_type)
    commands = yaml.safe_dump([document.get("head_start_ray_commands"), types[head_type].get("labels")], width=10_000)
    most = document.get("max_workers", 2)  # Ray's own default
    return Cluster(
        name=str(document.get("cluster_name", file.path.stem)),
        kind="launcher",
        head=head,
        pools=tuple(pool for pool in pools.values() if pool.max),
        max_machines=file.count(most, "max_workers"),
        max_gpus=_max_gpus(commands),
        dashboard_host=_dashboard_host(commands),
    )


def _launcher_pool(file: _File, name: str, given: Mapping[str, Any]) -> Pool:
    where = f"available_node_types.{name}"
    if "resources" not in given:
        raise file.fail(f"{where}.resources", "is missing: say how many CPU and GPU a machine has, as Ray counts them")
    resources = file.section(given["resources"], f"{where}.resources")
    return Pool(
        name=name,
        min=file.count(given.get("min_workers", 0), f"{where}.min_workers"),
        max=file.count(given.get("max_workers", given.get("min_workers", 0)), f"{where}.max_workers"),
        cpus=file.number(resources.get("CPU", 0), f"{where}.resources.CPU"),
        gpus=file.count(resources.get("GPU", 0), f"{where}.resources.GPU"),
        memory_bytes=file.number(resources["memory"], f"{where}.resources.memory") if "memory" in resources else None,
        **file.facts(given.get("labels"), f"{where}.labels"),
    )


def _kuberay(file: _File, document: Mapping[str, Any], documents: list[Mapping[str, Any]]) -> Cluster:
    spec = file.section(document.get("spec"), "spec")
    head = file.section(spec.get("headGroupSpec"), "spec.headGroupSpec")
    groups = spec.get("workerGroupSpecs") or []
    parameters = yaml.safe_dump([head.get("rayStartParams"), head.get("labels")], width=10_000)
    tokens = (spec.get("authOptions") or {}).get("mode") == "token" or "RAY_AUTH_MODE" in yaml.safe_dump(head.get("template"))
    return Cluster(
        name=str((document.get("metadata") or {}).get("name", file.path.stem)),
        kind="kuberay",
        head=_kuberay_pool(file, "head", head, "spec.headGroupSpec"),
        pools=tuple(
            _kuberay_pool(file, str(group.get("groupName", number)), group, f"spec.workerGroupSpecs[{number}]")
            for number, group in enumerate(groups)
        ),
        max_gpus=_max_gpus(parameters),
        dashboard_host=_dashboard_host(parameters),
        guarded=tokens or any(each.get("kind") == "NetworkPolicy" for each in documents),
    )


def _kuberay_pool(file: _File, name: str, group: Mapping[str, Any], where: str) -> Pool:
    template = file.section(group.get("template"), f"{where}.template")
    containers = file.section(template.get("spec"), f"{where}.template.spec").get("containers")
    if not containers:
        raise file.fail(f"{where}.template.spec.containers", "is missing")
    resources = containers[0].get("resources") or {}
    limits = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    parameters = group.get("rayStartParams") or {}
    if "cpu" not in limits and "num-cpus" not in parameters:
        limit = f"{where}.template.spec.containers[0].resources.limits.cpu"
        raise file.fail(limit, "is missing: Ray would count all CPUs of the node")
    hosts = file.count(group.get("numOfHosts", 1), f"{where}.numOfHosts")
    few = file.count(group.get("minReplicas", group.get("replicas", 0)), f"{where}.minReplicas")
    many = file.count(group.get("maxReplicas", group.get("replicas", few)), f"{where}.maxReplicas")
    return Pool(
        name=name,
        min=few * hosts,
        max=many * hosts,
        cpus=file.number(parameters.get("num-cpus", limits.get("cpu")), f"{where} cpu"),
        gpus=file.count(parameters.get("num-gpus", limits.get("nvidia.com/gpu", 0)), f"{where} nvidia.com/gpu"),
        memory_bytes=file.number(limits["memory"], f"{where} memory") if "memory" in limits else None,
        **file.facts((template.get("metadata") or {}).get("annotations"), f"{where}.template.metadata.annotations"),
    )


def _max_gpus(text: str) -> int | None:
    found = re.search(rf"{PREFIX}max-gpus['\"]?\s*[=:]\s*['\"]?(\d+)", text)
    return int(found[1]) if found else None


def _dashboard_host(text: str) -> str | None:
    found = re.search(r"dashboard-host['\"]?(?:\s*[=:]\s*|\s+)['\"]?([\w.:]+)", text)
    return found[1] if found else None
