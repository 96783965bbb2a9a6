"""What can be said of settings and of a cluster file before anything runs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Literal

from massl_ray.config import Config, Resolved
from massl_ray.planning.cluster_file import Cluster
from massl_ray.planning.gpus import GPUS
from massl_ray.planning.machines import places

Severity = Literal["ok", "note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "error")
SHALLOW = 32  # batches: a memory of 16 collapsed where one of 128 did not (docs/log.md)
FEW_SLOTS = 128  # in a block: a distribution over fewer says little
OLD_DAYS = 183
OPEN = ("0.0.0.0", "::", "[::]")


@dataclass(frozen=True)
class Finding:
    """What a check found. Only an error means that training would fail."""

    check: str
    severity: Severity
    sentence: str
    remedy: str | None = None  # None where there is nothing to do


def worst_last(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def check_settings(config: Config, resolved: Resolved) -> list[Finding]:
    """Settings that train to nothing: embeddings that collapse to one point, or a loss that has nothing to say."""
    found = [
        *_memory(resolved),
        *_blocks(resolved),
        *_teacher(config, resolved),
        *_length(config, resolved),
    ]
    return found or [Finding("settings", "ok", "No setting is known to make embeddings collapse.")]


def check_cluster(cluster: Cluster, config: Config, today: date) -> list[Finding]:
    """Of a cluster file: what would keep workers from coming, money that is not counted, and doors that stand open."""
    if cluster.kind == "machine":
        return list(_workers(cluster, config))
    found = [
        *_gpus(cluster),
        *_workers(cluster, config),
        *_prices(cluster, today),
        *_doors(cluster),
        *_far_places(cluster, config),
    ]
    return found or [
        Finding("cluster", "ok", f"{cluster.name} has nothing against it: GPUs, prices and doors are as they should be.")
    ]


def _memory(resolved: Resolved) -> Iterator[Finding]:
    size, batch, images = resolved.memory_size, resolved.batch_size, resolved.dataset_size
    if size < batch:
        yield Finding(
            "settings",
            "warning",
            f"memory.size {size:,} is smaller than a batch of {batch:,}: every step replaces all of it.",
            f"Raise memory.size to {SHALLOW * batch:,} or more, or lower train.global_batch_size.",
        )
    elif size < SHALLOW * batch:
        yield Finding(
            "settings",
            "warning",
            f"The memory is {size / batch:.1f} batches deep: embeddings collapsed with one of 16 and did not with one of 128.",
            f"Raise memory.size to {SHALLOW * batch:,} or more, or lower train.global_batch_size.",
        )
    if size > images:
        yield Finding(
            "settings",
            "warning" if size > 8 * images else "note",
            f"The memory of {size:,} slots holds each of the {images:,} images {size / images:.1f} times.",
            "Set memory.size to auto, which follows the number of images." if size > 8 * images else None,
        )
    if batch > images:
        yield Finding(
            "settings",
            "warning",
            f"A batch of {batch:,} is larger than the data set of {images:,}: a step sees images several times.",
            "Lower train.global_batch_size.",
        )


def _blocks(resolved: Resolved) -> Iterator[Finding]:
    if resolved.num_blocks == 1:
        yield Finding(
            "settings",
            "warning",
            "memory.num_blocks 1 reads the whole memory at once: nothing about it is random.",
            "Set memory.num_blocks to auto.",
        )
    if resolved.block_size < FEW_SLOTS:
        yield Finding(
            "settings",
            "warning",
            f"A block has only {resolved.block_size} slots: a distribution over so few tells images hardly apart.",
            "Lower memory.num_blocks, or raise memory.size.",
        )


def _teacher(config: Config, resolved: Resolved) -> Iterator[Finding]:
    student, teacher = config.loss.student_temp, max(resolved.teacher_temp, resolved.teacher_temp_start)
    if teacher >= student:
        yield Finding(
            "settings",
            "warning",
            f"The teacher's temperature {teacher:g} is not below the student's {student:g}: its answers are no sharper than the "
            "student's own, and all embeddings alike is the easiest one.",
            "Lower loss.teacher_temp, or set it to auto.",
        )
    if config.optim.teacher_momentum == 0:
        yield Finding(
            "settings",
            "warning",
            "optim.teacher_momentum 0 makes the teacher a copy of the student after every step.",
            "Raise it to 0.97 or more.",
        )
    if config.head.batch_norm and resolved.micro_batch_size < 8:
        yield Finding(
            "settings",
            "warning",
            f"head.batch_norm takes its statistics from micro-batches of only {resolved.micro_batch_size} images.",
            "Raise train.micro_batch_size to 8 or more.",
        )


def _length(config: Config, resolved: Resolved) -> Iterator[Finding]:
    if resolved.total_images < resolved.memory_size:
        yield Finding(
            "settings",
            "warning",
            f"The run ends after {resolved.total_images:,} images, before the memory of {resolved.memory_size:,} slots is filled: "
            "part of it stays random.",
            "Train longer, or lower memory.size.",
        )
    if resolved.warmup_images > resolved.total_images / 2:
        yield Finding(
            "settings",
            "warning",
            f"optim.warmup_epochs takes {resolved.warmup_images / resolved.total_images:.0%} of the run.",
            "Set optim.warmup_epochs to auto, or train longer.",
        )


def _gpus(cluster: Cluster) -> Iterator[Finding]:
    total = cluster.all_gpus
    if cluster.max_gpus is None and total:
        yield Finding(
            "cluster",
            "note",
            f"{cluster.name} does not say massl-ray/max-gpus: a run asks for as many workers as there are GPUs when it starts.",
            f"Add the label massl-ray/max-gpus={total} to the head.",
        )
    elif cluster.max_gpus is not None and cluster.max_gpus != total:
        yield Finding(
            "cluster",
            "error" if cluster.max_gpus > total else "warning",
            f"The head's label massl-ray/max-gpus is {cluster.max_gpus}, but {cluster.name} has at most {total} GPUs.",
            f"Set it to {total}, or raise max_workers (maxReplicas) of the pools and of the cluster.",
        )
    for pool in cluster.pools:
        if pool.gpus and pool.gpu not in GPUS:
            yield Finding(
                "cluster",
                "warning",
                f"Pool {pool.name} does not say which GPU it has, so whether the model fits cannot be said."
                if pool.gpu is None
                else f"Pool {pool.name} has GPUs '{pool.gpu}', which massl-ray does not know.",
                f"Label it massl-ray/gpu with one of {', '.join(GPUS)}.",
            )


def _workers(cluster: Cluster, config: Config) -> Iterator[Finding]:
    device = next((pool.gpu or "unknown" for pool in (cluster.head, *cluster.pools) if pool.gpus), "CPU")
    most = cluster.all_gpus + cluster.head.gpus
    if device == "CPU" or config.train.device == "cpu":
        most = places(cluster, "CPU", config.train.threads)
    if config.train.device == "cuda" and device == "CPU":
        yield Finding(
            "cluster",
            "error",
            f"train.device is cuda, but {cluster.name} has no GPUs.",
            "Set train.device to auto, or add machines with GPUs.",
        )
    elif most < config.elastic.min_workers:
        yield Finding(
            "cluster",
            "error",
            f"elastic.min_workers is {config.elastic.min_workers}, but {cluster.name} holds at most {most}: the run would wait for "
            "ever.",
            "Lower elastic.min_workers, or raise the machines that the file allows.",
        )
    elif cluster.kind != "machine" and config.elastic.max_workers != "auto" and config.elastic.max_workers > most:
        cut = "CPU" not in (device, config.train.device.upper()) and cluster.max_gpus is not None  # massl_ray.on_ray.layout does so
        yield Finding(
            "cluster",
            "note" if cut else "error",
            f"elastic.max_workers is {config.elastic.max_workers}, but {cluster.name} holds at most {most}"
            + (
                ": no more are asked for."
                if cut
                else ": Ray's autoscaler brings nothing where it cannot bring all that is asked for."
            ),
            f"Set elastic.max_workers to {most}, or raise the machines that the file allows.",
        )


def _prices(cluster: Cluster, today: date) -> Iterator[Finding]:
    unpriced = [pool.name for pool in (cluster.head, *cluster.pools) if pool.usd_on_demand is None]
    if unpriced:
        yield Finding(
            "prices",
            "note",
            f"{cluster.name} has no prices for {', '.join(unpriced)}, so costs are not known.",
            "Label them massl-ray/usd-per-hour (and massl-ray/usd-per-hour-spot).",
        )
    oldest = min((pool.prices_of for pool in (cluster.head, *cluster.pools) if pool.prices_of), default=None)
    if oldest and (today - oldest).days > OLD_DAYS:
        yield Finding(
            "prices",
            "note",
            f"The prices in {cluster.name} are of {oldest:%Y-%m-%d}, more than half a year ago.",
            "Look them up again, and change massl-ray/usd-per-hour, -spot and prices-of.",
        )


def _far_places(cluster: Cluster, config: Config) -> Iterator[Finding]:
    """Paths mean another thing on each machine."""
    if "://" not in config.run.dir:
        yield Finding(
            "run.dir",
            "warning",
            f"run.dir {config.run.dir} is a path: on {cluster.name} it lies on the head's disk, and goes when that does.",
            "Give a URI, as s3://BUCKET/runs/NAME, or a path on a file system that stays.",
        )
    if "://" not in config.data.source and config.data.source != "demo":
        yield Finding(
            "data.source",
            "warning",
            f"data.source {config.data.source} is a path: every machine of {cluster.name} must find the same images there.",
            "Give a URI, or a path on a file system that all of them mount.",
        )


def _doors(cluster: Cluster) -> Iterator[Finding]:
    inside = cluster.kind == "kuberay"
    if cluster.dashboard_host not in OPEN or (inside and cluster.guarded):
        return
    yield Finding(
        "dashboard",
        "warning" if inside else "error",
        f"The head of {cluster.name} lets Ray's dashboard listen on {cluster.dashboard_host}: whoever reaches its port 8265 "
        + ("inside Kubernetes " if inside else "")
        + "can run anything on the cluster.",
        "Add a NetworkPolicy or turn on Ray's token authentication (authOptions: mode: token)."
        if inside
        else "Leave --dashboard-host out (it is 127.0.0.1 then), and reach it through ray dashboard FILE or an SSH tunnel.",
    )
