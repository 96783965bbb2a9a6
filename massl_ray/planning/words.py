"""A plan for people, and for programs."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from massl_ray.config import Config
from massl_ray.planning.cluster_file import Cluster
from massl_ray.planning.gpus import GPUS
from massl_ray.planning.machines import CPU
from massl_ray.planning.plan import ROOM, Plan, Row

HEADER = (
    "workers",
    "on",
    "images each",
    "even",
    "images/s",
    "CPUs: need",
    "spare",
    "machines",
    "GiB",
    "takes",
    "USD",
    "on demand",
    "",
)


def describe(plan: Plan, config: Config) -> str:
    """What is planned, a table with a row a number of workers, and what there is to say about it."""
    resolved = plan.resolved
    stop = f", of which up to {resolved.end:,} now" if resolved.end < resolved.steps else ""
    length = "train.steps" if config.train.steps else "train.epochs"
    lines = [
        f"Run       {resolved.dataset_size:,} images; {resolved.steps:,} steps ({length}){stop} of {resolved.batch_size:,} images, "
        f"{resolved.total_images / resolved.dataset_size:,.1f} epochs",
        f"Model     {config.model.backbone}, {config.train.precision}; {plan.work.flops / 1e9:,.1f} GFLOP and "
        f"{plan.work.cpu_s * 1e3:.2f} ms of a CPU an image; micro-batches of {resolved.micro_batch_size}",
        f"Machines  {_machines(plan.cluster)}",
        f"Rate      {_rate(plan, config.train.precision)}",
        "",
        *_table([HEADER, *(_cells(row, row is plan.cheapest) for row in plan.rows)]),
        "",
        *_remarks(plan, config),
    ]
    return "\n".join(lines)


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything, with what follows from it."""
    cheapest = plan.cheapest
    rows = [
        {key: value if value != math.inf else None for key, value in asdict(row).items()}
        | {"footprint": asdict(row.footprint) | {"total": row.footprint.total}, "fits": row.fits, "cheapest": row is cheapest}
        for row in plan.rows
    ]
    return {
        "cluster": plan.cluster.name,
        "images": plan.resolved.dataset_size,
        "steps": plan.resolved.steps,
        "batch_size": plan.resolved.batch_size,
        "micro_batch_size": plan.resolved.micro_batch_size,
        "flops_per_image": plan.work.flops,
        "cpu_s_per_image": plan.work.cpu_s,
        "rate_measured": plan.measured,
        "rows": rows,
    }


def duration(hours: float) -> str:
    """'45 s', '12 min', '3.4 h', '21.0 days'."""
    if hours == math.inf:
        return "for ever"
    if hours < 1.5:
        return f"{hours * 3600:.0f} s" if hours < 0.025 else f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def counted(number: int, what: str) -> str:
    """'1 worker', '2 workers'."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def usd_text(usd: float | None) -> str:
    if usd is None or usd == math.inf:
        return "-"
    return f"{usd:,.0f}" if usd >= 100 else f"{usd:.2f}"


def _cells(row: Row, cheapest: bool) -> tuple[str, ...]:
    few, many = row.batch_per_worker
    marks = ["cheapest" if row.usd is not None else "fastest"] if cheapest else []
    marks += [] if row.fits else ["does not fit"]
    marks += [] if row.feeds else ["waits for CPUs"]
    return (
        f"{row.workers}",
        row.device,
        f"{few}" if few == many else f"{few}-{many}",
        f"{row.efficiency:.0%}",
        f"{row.images_per_s:,.0f}" if row.images_per_s >= 10 else f"{row.images_per_s:.1f}",
        f"{row.cpus_needed:.1f}",
        f"{row.cpus_spare:.1f}",
        "+".join(f"{count} {name}" for name, count in row.machines.items() if count) or "1",
        f"{row.footprint.total / 2**30:.1f}" + (f" of {row.memory_bytes / 2**30:.0f}" if row.memory_bytes else ""),
        duration(row.hours),
        usd_text(row.usd),
        usd_text(row.usd_on_demand),
        ", ".join(marks),
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their longest cell, numbers to the right; columns with nothing in them are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(cell not in ("", "-") for cell in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    left = {index for index, column in enumerate(columns) if column[0] in ("on", "machines", "")}
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]


def _machines(cluster: Cluster) -> str:
    if cluster.kind == "machine":
        head = cluster.head
        return f"this one: {head.cpus:g} CPUs" + (f", {head.gpus} x {head.gpu}" if head.gpus else ", no GPU")
    pools = [
        f"up to {pool.max} x {pool.name} ({pool.cpus:g} CPUs"
        + (f", {pool.gpus} x {pool.gpu or 'GPU'}" if pool.gpus else "")
        + (", spot" if pool.spot else "")
        + ")"
        for pool in cluster.pools
    ]
    most = "" if cluster.max_machines is None else f"; together at most {cluster.max_machines}"
    dates = [pool.prices_of for pool in cluster.pools if pool.prices_of]
    prices = f"; prices of {min(dates):%d %B %Y}".replace(" 0", " ") if dates else ""
    return f"{cluster.name}: {', '.join(pools)}{most}{prices}"


def _rate(plan: Plan, precision: str) -> str:
    if plan.measured:
        return f"as given: {plan.rows[0].rate:,.1f} images/s a worker"
    names = sorted({row.device for row in plan.rows})
    parts = [
        f"{GPUS[name].flops_per_s(precision) / 1e12:g} TFLOP/s and {GPUS[name].gb_per_s:,g} GB/s of {name}, used as on an H100"
        for name in names
        if name in GPUS
    ]
    parts += ["what ViT-S reached on the CPU of benchmarks/step_cpu.json; small networks reach less"] if CPU in names else []
    return f"estimated: {', '.join(parts)}; measure it (massl-ray doctor --measure), then give --rate"


def _remarks(plan: Plan, config: Config) -> list[str]:
    lines = []
    if any(not row.fits for row in plan.rows):
        lines.append(
            f"Memory    of a worker should stay under {ROOM:.0%} of its device's: lower train.micro_batch_size "
            f"({plan.resolved.micro_batch_size}) or take larger GPUs."
        )
    starved = [row for row in plan.rows if not row.feeds]
    if starved:
        other = "" if config.views.device == "cuda" else ", or set views.device to cuda"
        first = counted(starved[0].workers, "worker")
        lines.append(f"CPUs      from {first} on, views cannot be made fast enough: more machines without GPUs{other}.")
    slow = sorted({row.device for row in plan.rows if row.device in GPUS and not GPUS[row.device].has_bf16})
    if slow and config.train.precision == "bf16":
        lines.append(f"Precision {', '.join(slow)} has no units for bf16: the rate is that of fp32. Set train.precision to fp32.")
    if plan.rows[0].usd is None and plan.cluster.kind != "machine":
        lines.append(
            "Prices    are missing for some machines: label them massl-ray/usd-per-hour (and massl-ray/usd-per-hour-spot)."
        )
    away = max(row.cpu_machines / sum(row.machines.values()) * row.images_per_s if row.cpu_machines else 0.0 for row in plan.rows)
    if away:
        megabytes = plan.work.view_bytes / 1e6
        lines.append(
            f"Network   views are {megabytes:.2f} MB an image, so up to {away * megabytes:,.0f} MB/s come from other machines."
        )
    if plan.cluster.kind != "machine":
        lines.append("Costs     include the head. Left out: starting machines, k-NN, networks, storage and traffic.")
    return lines
