"""One life of one worker, from meeting the others to the outcome."""

import dataclasses
import os
import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from massl_ray.method.determinism import compute_alike, names_no_deterministic_way
from massl_ray.method.step import State
from massl_ray.on_ray.ingest import stream_views
from massl_ray.on_ray.layout import Layout, data_tasks
from massl_ray.on_ray.place import Place
from massl_ray.on_ray.telemetry import TelemetryClient, unpack
from massl_ray.reporting.reporter import Reporter, Silent
from massl_ray.storage import reason
from massl_ray.training.checkpoint import CheckpointWriter, NotSaved, list_checkpoints, read_latest, step_of
from massl_ray.training.collectives import Distributed, Local
from massl_ray.training.exact_sums import Exact
from massl_ray.training.loop import Outcome, train
from massl_ray.training.rehearsal import rehearse
from massl_ray.training.run import Run
from massl_ray.training.state import build_state, from_tensors, to_tensors


@dataclass
class Remains:
    """What a process keeps from one life for the next."""

    feeder: Any  # of on_ray.feeder
    state: State | None = None  # where it was trained, after a life that ended in good order
    writer: CheckpointWriter | None = None  # which may still be writing


def live(run: Run, telemetry: Any, layout: Layout, life: int, failures: int, place: Place, remains: Remains) -> dict[str, Any]:
    """Meet the other workers, take up the newest state or build one, then train. Returns the Outcome, the same on every worker,
    as a dict."""
    if failures > run.config.elastic.max_failures:  # the same number on every worker
        return dataclasses.asdict(Outcome("failed", 0, _given_up(run, failures)))
    line = TelemetryClient(telemetry, life)
    device = _device(place.gpu)
    torch.set_num_threads(run.config.train.threads)
    if run.config.elastic.exact:
        compute_alike(device)
    try:
        workers = meet(run, device, place)
        outcome = _train(run, line, layout, device, workers, remains, first_life=life == 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return dataclasses.asdict(outcome)


def meet(run: Run, device: torch.device, place: Place) -> Local | Distributed | Exact:
    """The collectives of this life."""
    timeout = timedelta(seconds=run.config.elastic.timeout_seconds)
    workers = Local()
    if place.world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=place.meeting, rank=place.rank, world_size=place.world_size, timeout=timeout)
        workers = Distributed(run.resolved.num_micro_batches, timeout)
    return Exact(workers, run.resolved.num_micro_batches) if run.config.elastic.exact else workers


def _train(
    run: Run,
    line: TelemetryClient,
    layout: Layout,
    device: torch.device,
    workers: Local | Distributed | Exact,
    remains: Remains,
    first_life: bool,
) -> Outcome:
    state, remains.state = remains.state, None
    newer = None if workers.rank else find_newer(run, line, than=state)
    step = workers.share(newer[0] if newer else state and state.step)
    tasks = data_tasks(layout, workers.world_size)
    views = stream_views(run, workers.rank, workers.world_size, step or 0, tasks, device, remains.feeder)
    state = take_up(run, device, workers, state, step, newer and newer[1])
    try:
        step_s = rehearse(run, state, workers) if first_life else None
    except RuntimeError as error:  # on every worker
        if not names_no_deterministic_way(error):
            raise
        views.close()
        return Outcome("failed", state.step, _never_alike(run, error))
    recorder: Silent = Silent(line)
    if workers.rank == 0:
        line.announce(_started(state, workers.world_size, device, step_s))
        remains.writer = remains.writer or CheckpointWriter(run.checkpoints, run.config.checkpoint.keep, note=print)
        remains.writer.note, remains.writer.before_publish = (lambda text: _note(line, text)), line.wait_recorded
        recorder = Reporter(run, line, remains.writer)

    with closing(views):
        outcome = train(run, state, views, workers, recorder)
    line.close()
    if outcome.status == "resize":
        remains.state = state
    elif remains.writer:
        try:
            remains.writer.close()
        except NotSaved as error:
            return Outcome("not_saved", outcome.step, str(error))
    return outcome


def find_newer(run: Run, line: TelemetryClient, than: State | None) -> tuple[int, dict[str, Tensor]] | None:
    """A state that is further than the one at hand: the copy kept in this cluster or the latest whole checkpoint. Returns its step
    and tensors. Raises OSError where the storage fails and there is nothing else to go on from."""
    at_hand = -1 if than is None else than.step
    kept = line.kept()
    known = max(at_hand, kept[0] if kept else -1)
    try:
        checkpoints = list_checkpoints(run.checkpoints)
    except OSError as error:
        if known < 0:
            raise
        _note(line, f"{run.checkpoints} cannot be read: {reason(error)}. Going on from the copy of step {known}.")
        checkpoints = []
    if any((step_of(checkpoint.name) or 0) > known for checkpoint in checkpoints):
        with warnings.catch_warnings(record=True) as damaged:
            warnings.simplefilter("always")
            stored = read_latest(run.checkpoints)
        for warning in damaged:
            _note(line, str(warning.message))
        if stored and int(stored[0]["step"]) > known:
            return int(stored[0]["step"]), stored[0]
    if kept and kept[0] > at_hand:
        return kept[0], unpack(ray.get(kept[1][0]))
    return None


def take_up(
    run: Run,
    device: torch.device,
    workers: Local | Distributed | Exact,
    state: State | None,
    step: int | None,
    tensors: dict[str, Tensor] | None,
) -> State:
    """The state of `step` on every worker: the one that is at hand where all have it, else the first worker's `tensors` or state
    sent to all. A new one where there is no step yet."""
    lacks = step is not None and (tensors is not None or state is None or state.step != step)
    if state is None:
        state = build_state(run.config, run.resolved, device, workers)
    else:
        state.replica = workers.wrap(state.student)
    if workers.start_agreement(int(lacks))():
        first = None if workers.rank else tensors or to_tensors(state)
        from_tensors(state, workers.share_tensors(first))
    return state


def _device(gpu: str | None) -> torch.device:
    """The GPU of the worker's seat. Before its first life CUDA has not looked yet which there are; later ones are on the same."""
    if gpu is None:
        return torch.device("cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def _note(line: TelemetryClient, text: str) -> None:
    line.announce({"kind": "note", "text": text})


def _given_up(run: Run, failures: int) -> str:
    return (
        f"The workers failed {failures} times in a row without a new step between, more than elastic.max_failures "
        f"{run.config.elastic.max_failures} allows. What they said stands above; mend it and run the same command again."
    )


def _never_alike(run: Run, error: RuntimeError) -> str:
    return (
        f"model.backbone {run.config.model.backbone} computes something whose last bits differ from time to time on a GPU "
        f"({str(error).split()[0]}), so elastic.exact cannot be kept: use --elastic.exact false, or another backbone."
    )


def _started(state: State, world_size: int, device: torch.device, step_s: float | None) -> dict[str, Any]:
    return {
        "kind": "started",
        "at": time.time(),
        "step": state.step,
        "world_size": world_size,
        "device": str(device),
        "step_s": step_s,
        "parameters": sum(parameter.numel() for parameter in state.student.backbone.parameters()),
    }
