"""One training worker: what Ray Train calls on every rank, again after each resize."""

import time
import warnings
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from massl_ray.method.step import State
from massl_ray.on_ray.ingest import start_now, stream_views
from massl_ray.on_ray.telemetry import TelemetryClient
from massl_ray.reporting.recorder import RunRecorder, Silent
from massl_ray.training.checkpoint import read_latest
from massl_ray.training.collectives import Distributed, Local
from massl_ray.training.loop import train
from massl_ray.training.rehearsal import rehearse
from massl_ray.training.run import Run
from massl_ray.training.state import build_state, from_tensors


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Build the state or read the latest checkpoint, then train. Returns the Outcome as a dict; the same on every rank."""
    run: Run = arguments["run"]
    config = run.config
    torch.set_num_threads(config.train.threads)
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    telemetry = TelemetryClient(arguments["telemetry"])
    device = ray.train.torch.get_device() if arguments["use_gpu"] else torch.device("cpu")
    collectives = (
        Distributed(run.resolved.num_micro_batches, run.resolved.micro_batch_size)
        if dist.is_initialized() and world_size > 1
        else Local()
    )

    state = build_state(config, run.resolved, device, collectives)
    with warnings.catch_warnings(record=True) as damaged:
        warnings.simplefilter("always")
        stored = read_latest(run.checkpoints)
    if stored:
        from_tensors(state, stored[0])
    views = start_now(stream_views(run, rank, world_size, state.step, arguments["data_cpus"] / world_size))
    step_s = rehearse(run, state, collectives)
    recorder = Silent(telemetry.announce)
    if rank == 0:
        recorder = RunRecorder(run, telemetry.announce, telemetry.stop_asked, state.step)
        for warning in damaged:
            telemetry.announce({"kind": "note", "text": str(warning.message)})
        telemetry.announce(_started(run, state, world_size, device, step_s))

    outcome = train(run, state, views, collectives, recorder)
    return {"status": outcome.status, "step": outcome.step, "message": outcome.message}


def _started(run: Run, state: State, world_size: int, device: torch.device, step_s: float) -> dict[str, Any]:
    return {
        "kind": "started",
        "at": time.time(),
        "step": state.step,
        "world_size": world_size,
        "device": str(device),
        "step_s": step_s,
        "parameters": sum(parameter.numel() for parameter in state.student.backbone.parameters()),
    }
