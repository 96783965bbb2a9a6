"""The training loop. It reads like the method: take the next batch, step, look at the figures now and then, save, evaluate."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from massl_ray.data.order import worker_share
from massl_ray.method.memory import block_permutation
from massl_ray.method.network import drop_path_draws
from massl_ray.method.schedules import Schedule, schedule_at
from massl_ray.method.step import METRICS, Batch, MicroBatch, State, train_step
from massl_ray.training.collectives import Distributed, Local
from massl_ray.training.monitors import HealthMonitor
from massl_ray.training.run import Run
from massl_ray.training.state import step_settings
from massl_ray.training.wish import Wish


@dataclass(frozen=True)
class Views:
    """This worker's share of one step, in batch order: uint8, channels last."""

    global_views: Tensor  # (b, 2, H, W, C)
    local_views: Tensor  # (b, V-2, h, w, C)
    skipped: list[str]  # "path: reason" of images that could not be read


@dataclass(frozen=True)
class Outcome:
    """How training ended, the same on every worker: finished, resize, stopped, collapsed, dead, non_finite or unreadable."""

    status: str
    step: int
    message: str = ""


class Recorder(Protocol):
    """Where the loop's results go. Only one worker's recorder writes; the others' do nothing."""

    def views(self, views: Views) -> None: ...
    def metrics(self, lines: list[dict[str, Any]]) -> None: ...
    def skipped(self, images: list[str]) -> None: ...
    def evaluate(self, state: State) -> None: ...
    def checkpoint(self, state: State) -> None: ...
    def snapshot(self, state: State) -> None: ...
    def step_done(self, state: State) -> None: ...
    def wish(self) -> Wish: ...


def train(run: Run, state: State, batches: Iterable[Views], collectives: Local | Distributed, recorder: Recorder) -> Outcome:
    """Train from `state.step` to the run's end; `batches` begins with the batch of `state.step`.

    Returns when the run is over, for whatever reason, on every worker after the same step.
    """
    config, resolved = run.config, run.resolved
    device = state.memory.rows.device
    settings = step_settings(config, resolved, device)
    pending = PendingMetrics(run, collectives.world_size)
    monitor = HealthMonitor(config.monitor, resolved.read_size, resolved.warmup_images / resolved.dataset_size)
    skipped = 0.0
    if state.step == 0:
        recorder.evaluate(state)
    pending.restart_clock()

    source = iter(batches)
    while state.step < resolved.end:
        asked = time.perf_counter()
        views = next(source)
        waited_s = time.perf_counter() - asked
        if state.step == 0:
            recorder.views(views)
        schedule = schedule_at(state.step, config, resolved)
        batch = assemble(run, state, views, collectives)
        agreement = collectives.start_agreement(recorder.wish())
        metrics = train_step(state, batch, schedule, settings, collectives)
        pending.add(state.step, metrics, schedule, waited_s, views.skipped)
        wish = Wish(agreement())

        last, save = state.step == resolved.end, state.step % config.train.checkpoint_every == 0
        evaluate = last or (config.eval.knn_every and state.step % config.eval.knn_every == 0)
        if save or evaluate or wish or state.step % config.train.log_every == 0:
            lines = pending.flush()
            recorder.skipped(pending.skipped)
            newly_skipped = int(collectives.total(_counted(pending.skipped, batch, device)))
            pending.skipped = []
            recorder.metrics(lines)
            for line in lines:
                if ending := monitor.judge(line["step"], line):
                    return Outcome(ending.status, line["step"], ending.message)
            skipped += newly_skipped
            enough = pending.images_tried >= min(resolved.dataset_size, 1000)  # a share of a few images says nothing
            if enough and skipped > config.data.max_skipped * pending.images_tried:
                return Outcome("unreadable", state.step, _too_many_unreadable(run, skipped, pending.images_tried))
            if evaluate:
                recorder.evaluate(state)
            if save or evaluate or wish == Wish.STOP:
                recorder.checkpoint(state)
            elif wish:
                recorder.snapshot(state)
            pending.restart_clock()
            if wish == Wish.STOP and not last:
                return Outcome("stopped", state.step, f"Stopped on request after step {state.step}, which is saved.")
            if wish == Wish.RESIZE and not last:
                return Outcome("resize", state.step)
        recorder.step_done(state)
    return Outcome("finished", state.step)


def assemble(run: Run, state: State, views: Views, collectives: Local | Distributed) -> Batch:
    """Cut this worker's views into micro-batches and add the step's keyed draws."""
    seed, resolved = run.config.run.seed, run.resolved
    size, num_views = resolved.micro_batch_size, 2 + run.config.views.num_local
    first, last = worker_share(collectives.rank, collectives.world_size, resolved.num_micro_batches)
    device = state.memory.rows.device
    micro_batches = []
    for place, index in enumerate(range(first, last)):
        rows = slice(place * size, (place + 1) * size)
        drop_path = drop_path_draws(state.student, seed, state.step, index, size, num_views)
        drop_path = None if drop_path is None else drop_path.to(device, non_blocking=True)
        micro_batches.append(MicroBatch(views.global_views[rows], views.local_views[rows], drop_path))
    permutation = block_permutation(seed, state.step, resolved.memory_size, resolved.block_size)
    return Batch(micro_batches, permutation.to(device, non_blocking=True), resolved.num_micro_batches)


class PendingMetrics:
    """Metrics left on the device until they are looked at, so that steps do not wait for each other."""

    def __init__(self, run: Run, world_size: int):
        self.run, self.world_size = run, world_size
        self.waiting: list[tuple[int, Tensor, Mapping[str, float]]] = []
        self.skipped: list[str] = []
        self.images_tried = 0
        self.since = time.perf_counter()

    def add(self, step: int, metrics: Tensor, schedule: Schedule, waited_s: float, skipped: list[str]) -> None:
        batch = self.run.resolved.batch_size
        known = {
            "images_seen": step * batch,
            "epoch": step * batch / self.run.resolved.dataset_size,
            "lr": schedule.lr,
            "weight_decay": schedule.weight_decay,
            "teacher_momentum": schedule.teacher_momentum,
            "teacher_temp": schedule.teacher_temp,
            "waited_s": waited_s,
        }
        self.waiting.append((step, metrics, known))
        self.skipped += skipped
        self.images_tried += batch

    def flush(self) -> list[dict[str, Any]]:
        """One line a step; rates are means since the last flush. Waits for the device."""
        if not self.waiting:
            return []
        values = torch.stack([metrics for _, metrics, _ in self.waiting]).tolist()
        now = time.perf_counter()
        step_s = (now - self.since) / len(self.waiting)
        self.since = now
        koleo_weight = self.run.config.loss.koleo_weight  # the loss has that term, too
        lines = []
        for (step, _, known), row in zip(self.waiting, values, strict=True):
            measured = dict(zip(METRICS, row, strict=True))
            lines.append(
                {"step": step}
                | {key: value for key, value in known.items() if key != "waited_s"}
                | measured
                | {"kl": measured["loss"] - koleo_weight * measured["koleo"] - measured["teacher_entropy"]}
                | {
                    "world_size": self.world_size,
                    "images_per_s": self.run.resolved.batch_size / step_s,
                    "step_s": step_s,
                }
                | {"data_wait": min(1.0, known["waited_s"] / step_s)}
            )
        self.waiting = []
        return lines

    def restart_clock(self) -> None:
        """Leave what happened since the last flush (an evaluation, a start) out of the rates."""
        self.since = time.perf_counter()


def _counted(skipped: list[str], batch: Batch, device: torch.device) -> Tensor:
    """(m, 1): how many images this worker passed over, as a row a micro-batch."""
    rows = torch.zeros(len(batch.micro_batches), 1, dtype=torch.float64, device=device)
    rows[0] = len(skipped)
    return rows


def _too_many_unreadable(run: Run, skipped: float, tried: int) -> str:
    return (
        f"{skipped:.0f} of {tried} images could not be read, more than data.max_skipped {run.config.data.max_skipped:g} allows. "
        f"They are listed in {run.dir / 'skipped.jsonl'}; mend or remove them, or raise data.max_skipped."
    )
