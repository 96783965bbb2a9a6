"""One life of one worker, from meeting the others to the outcome."""

import dataclasses
import os
import time
import warnings
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from massl_ray.method.step import State
from massl_ray.on_ray.ingest import start_now, stream_views
from massl_ray.on_ray.layout import Layout, data_tasks
from massl_ray.on_ray.telemetry import TelemetryClient, unpack
from massl_ray.reporting.reporter import Reporter, Silent
from massl_ray.training.checkpoint import CheckpointWriter, NotSaved, read_latest
from massl_ray.training.collectives import Distributed, Exact, Local
from massl_ray.training.loop import Outcome, train
from massl_ray.training.rehearsal import rehearse
from massl_ray.training.run import Run
from massl_ray.training.state import build_state, from_tensors


def live(run: Run, telemetry: Any, layout: Layout, life: int, failures: int, place: dict[str, Any]) -> dict[str, Any]:
    """Meet the other workers, take up the newest state or build one, then train. Returns the Outcome, the same on every worker."""
    line = TelemetryClient(telemetry, life)
    device = _device(place["gpus"])
    torch.set_num_threads(run.config.train.threads)
    timeout = timedelta(seconds=run.config.elastic.timeout_seconds)
    if place["world_size"] > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        meeting = f"tcp://{place['address']}"
        dist.init_process_group(backend, init_method=meeting, rank=place["rank"], world_size=place["world_size"], timeout=timeout)
    workers = Distributed(run.resolved.num_micro_batches, timeout) if place["world_size"] > 1 else Local()
    collectives = Exact(workers, run.resolved.num_micro_batches) if run.config.elastic.exact else workers
    if failures > run.config.elastic.max_failures:  # the same number on every worker
        return dataclasses.asdict(Outcome("failed", 0, _given_up(run, failures)))
    return dataclasses.asdict(_train(run, line, layout, device, collectives, first_life=life == 1))


def _train(
    run: Run, line: TelemetryClient, layout: Layout, device: torch.device, workers: Local | Distributed | Exact, first_life: bool
) -> Outcome:
    newest = None if workers.rank else find_newest(run, line)
    step = workers.share(newest and int(newest["step"]))
    tasks = data_tasks(layout, workers.world_size)
    views = start_now(stream_views(run, workers.rank, workers.world_size, step or 0, tasks, device))
    state = build_state(run.config, run.resolved, device, workers)
    if step is not None:
        from_tensors(state, workers.share_tensors(newest))
    step_s = rehearse(run, state, workers) if first_life else None
    if workers.rank:
        return train(run, state, views, workers, Silent(line))

    line.announce(_started(state, workers.world_size, device, step_s))
    keep = run.config.checkpoint.keep
    writer = CheckpointWriter(run.checkpoints, keep, note=lambda text: _note(line, text), before_publish=line.wait_recorded)
    outcome = train(run, state, views, workers, Reporter(run, line, writer))
    line.close()
    if outcome.status != "resize":  # else the copy that was kept is newer than what is still being written
        try:
            writer.close()
        except NotSaved as error:
            return Outcome("not_saved", outcome.step, str(error))
    return outcome


def find_newest(run: Run, line: TelemetryClient) -> dict[str, Tensor] | None:
    """The state to go on from: the copy kept in this cluster or the latest whole checkpoint, whichever is further."""
    with warnings.catch_warnings(record=True) as damaged:
        warnings.simplefilter("always")
        stored = read_latest(run.checkpoints)
    for warning in damaged:
        _note(line, str(warning.message))
    kept = line.kept()
    if kept and (stored is None or kept[0] > int(stored[0]["step"])):
        return unpack(ray.get(kept[1][0]))
    return stored and stored[0]


def _device(gpus: list[int | str]) -> torch.device:
    """The GPU that Ray gave to the worker. CUDA has not looked yet which there are."""
    if not gpus:
        return torch.device("cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpus[0])
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def _note(line: TelemetryClient, text: str) -> None:
    line.announce({"kind": "note", "text": text})


def _given_up(run: Run, failures: int) -> str:
    return (
        f"The workers failed {failures} times in a row without a new step between, more than elastic.max_failures "
        f"{run.config.elastic.max_failures} allows. What they said stands above; mend it and run the same command again."
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
