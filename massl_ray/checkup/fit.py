"""Whether the run could start, whether the model fits, how fast it is, and what it will take."""

import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from massl_ray.config import Config
from massl_ray.errors import UserError
from massl_ray.method.determinism import compute_alike, names_no_deterministic_way
from massl_ray.planning.checks import Finding
from massl_ray.planning.cluster_file import Cluster
from massl_ray.planning.here import this_machine
from massl_ray.planning.machines import CPU, devices
from massl_ray.planning.plan import ROOM, Plan, Row, plan
from massl_ray.planning.words import counted, duration, usd_text
from massl_ray.training.rehearsal import rehearse
from massl_ray.training.run import Run, prepare_run


@dataclass(frozen=True)
class Measured:
    """One micro-batch on this machine."""

    device: str  # as in a plan's rows
    step_s: float  # seconds a step of one worker
    peak_bytes: int
    images_per_s: float


def check_start(config: Config) -> tuple[Run | None, Finding]:
    """All that `massl-ray train` would refuse before it starts a worker."""
    try:
        run = prepare_run(config)
    except UserError as error:
        return None, Finding("start", "error", f"massl-ray train would refuse to start: {error}", "Mend what it says.")
    return run, Finding("start", "ok", "massl-ray train would start: settings, model and run directory fit together.")


def measure(run: Run) -> tuple[Measured | None, Finding]:
    """Build the model here and take a micro-batch through it. Where that fails, an error that says how."""
    import torch

    from massl_ray.training.collectives import Local
    from massl_ray.training.state import build_state

    wanted, there = run.config.train.device, torch.cuda.is_available()
    device = torch.device("cuda" if wanted != "cpu" and there else "cpu")
    threads = torch.get_num_threads()
    if run.config.elastic.exact:
        compute_alike(device)
    torch.set_num_threads(run.config.train.threads if device.type == "cpu" else threads)
    try:
        state = build_state(run.config, run.resolved, device, Local())
        step_s = rehearse(run, state, Local())
    except (torch.OutOfMemoryError, MemoryError) as error:
        size = run.resolved.micro_batch_size
        text = f"A micro-batch of {size} images does not fit: {' '.join(str(error).split())[:200]}"
        return None, Finding("measured", "error", text, "Lower train.micro_batch_size.")
    except RuntimeError as error:
        if not names_no_deterministic_way(error):
            raise
        text = f"On a GPU {run.config.model.backbone} has an operation that differs from time to time ({str(error).split()[0]})."
        return None, Finding("measured", "error", text, "Use --elastic.exact false, or another model.backbone.")
    finally:
        torch.set_num_threads(threads)
    name, peak = CPU, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        name, peak = this_machine().head.gpu or "GPU", torch.cuda.max_memory_allocated(device)
    measured = Measured(name, step_s, peak, run.resolved.batch_size / step_s)
    return measured, Finding(
        "measured",
        "ok",
        f"One worker here ({name}) takes {step_s:.3g} s a step, {measured.images_per_s:,.1f} images/s, if it never waits for "
        f"images; at most {peak / 2**30:.1f} GiB of memory were in use.",
    )


def make_plan(
    config: Config, images: int, cluster: Cluster, measured: Measured | None, cpu_s: float | None
) -> tuple[Plan | None, list[Finding]]:
    """With the measured rate, if it is of a device of that cluster."""
    alike = measured and devices(cluster, config.train.device) == [measured.device]
    try:
        made = plan(config, images, cluster, measured.images_per_s if measured and alike else None, cpu_s)
    except UserError as error:
        return None, [Finding("plan", "error", str(error), "Mend what it says.")]
    return made, [*check_memory(made), *check_length(made)]


def check_memory(made: Plan) -> Iterator[Finding]:
    """Whether a worker fits its device, at the number of workers that needs least."""
    for device in sorted({row.device for row in made.rows}):
        rows = [row for row in made.rows if row.device == device]
        least, most = (choose(rows, key=lambda row: row.footprint.total) for choose in (min, max))
        need, memory = _gib(least.footprint.total), least.memory_bytes
        if memory is None:
            yield Finding("memory", "note", f"A worker needs about {need} of {device} memory; how much there is is not known.")
            continue
        room = f"of the {_gib(memory)} of {device}"
        remedy = f"Lower train.micro_batch_size ({made.resolved.micro_batch_size}), or take a GPU with more memory."
        if not least.fits:
            others = any(row.fits for row in made.rows)
            text = f"A worker needs about {need} {room}, and {ROOM:.0%} of that can be used: the model does not fit."
            yield Finding("memory", "warning" if others else "error", text, remedy)
        elif not most.fits:
            text = (
                f"With {most.workers} worker(s) each needs about {_gib(most.footprint.total)} {room}; with {least.workers} it fits."
            )
            yield Finding("memory", "warning", text, f"Set elastic.min_workers to {_fewest(rows)}. Or: {remedy}")
        else:
            yield Finding("memory", "ok", f"A worker needs about {_gib(most.footprint.total)} {room}.")


def check_length(made: Plan) -> Iterator[Finding]:
    """How long the run takes, and what it costs, by the plan's best row and its slowest."""
    best = made.cheapest
    if best is None:
        return
    how = "measured" if made.measured else "estimated"
    cost = f", USD {usd_text(best.usd)} as rented and {usd_text(best.usd_on_demand)} all on demand" if best.usd is not None else ""
    at = f"{counted(best.workers, 'worker')} on {best.device}"
    yield Finding(
        "time and cost",
        "note",
        f"{made.resolved.end:,} steps take {duration(best.hours)} with {at}, at {best.images_per_s:,.0f} images/s ({how}){cost}.",
    )
    if not best.feeds and (made.measured or best.device != CPU):  # small networks are slower on CPUs than is estimated
        yield Finding(
            "feeding",
            "warning",
            f"{at} could use {best.cpus_needed:.1f} CPUs for views; there are not as many, so they wait.",
            "Allow more machines without GPUs, set views.device to cuda, or lower views.num_local.",
        )


def _fewest(rows: list[Row]) -> int:
    return min(row.workers for row in rows if row.fits)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def state_bytes(made: Plan) -> int:
    """Of a checkpoint."""
    return made.rows[0].footprint.state + made.rows[0].footprint.memory_bank
