"""A step without consequences, to warm up and to know beforehand how long a run will take."""

import time
from contextlib import nullcontext

import torch

from massl_ray.data.order import worker_share
from massl_ray.method.running import RunningStatistics
from massl_ray.method.step import MicroBatch, State, prepare_views
from massl_ray.training.collectives import Distributed, Local
from massl_ray.training.run import Run
from massl_ray.training.state import step_settings


def rehearse(run: Run, state: State, collectives: Local | Distributed) -> float:
    """Estimated seconds a step: one micro-batch of black images through student, its backward and the teacher, timed the
    second time. The state is as before afterwards."""
    config, size, channels = run.config, run.resolved.micro_batch_size, run.config.data.channels
    settings = step_settings(config, run.resolved, state.memory.rows.device)
    views = MicroBatch(
        torch.zeros(size, 2, config.views.global_size, config.views.global_size, channels, dtype=torch.uint8),
        torch.zeros(size, config.views.num_local, config.views.local_size, config.views.local_size, channels, dtype=torch.uint8),
        None,
    )
    groups = prepare_views(views, settings)
    statistics = [RunningStatistics(state.student), RunningStatistics(state.teacher)]
    elapsed = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(settings.device.type, dtype=torch.bfloat16, enabled=settings.autocast is not None):
            with getattr(state.replica, "no_sync", nullcontext)():
                state.replica(groups).sum().backward()
            with torch.no_grad():
                state.teacher(groups[:1])
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)
        elapsed = time.perf_counter() - started
        for statistic in statistics:
            statistic.after_micro_batch()
    state.optimizer.zero_grad(set_to_none=True)
    first, last = worker_share(0, collectives.world_size, run.resolved.num_micro_batches)
    return elapsed * max(1, last - first)
