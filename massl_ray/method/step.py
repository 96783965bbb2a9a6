"""One training step, a function of (state, batch): no I/O, no global random state, no rank look-ups."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from massl_ray.method.collapse import alignment, signs_of_collapse
from massl_ray.method.koleo import koleo_loss
from massl_ray.method.memory import Memory, joined_slots, memory_slots
from massl_ray.method.network import Encoder
from massl_ray.method.optim import clip_per_parameter, set_schedule, update_teacher
from massl_ray.method.readout import readout_loss
from massl_ray.method.running import RunningStatistics
from massl_ray.method.schedules import Schedule


@dataclass
class State:
    """All that training changes. `replica` is the student as it is called: itself, or wrapped for gradient averaging."""

    student: Encoder
    teacher: Encoder
    optimizer: torch.optim.Optimizer
    memory: Memory
    replica: nn.Module
    step: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """Views of b images, uint8, channels last."""

    global_views: Tensor  # (b, 2, H, W, C)
    local_views: Tensor  # (b, V-2, h, w, C); V-2 may be 0
    drop_path: Tensor | None  # uniform draws (layers, V*b), or None


@dataclass(frozen=True)
class Batch:
    """This worker's micro-batches, in batch order, and what all workers share."""

    micro_batches: Sequence[MicroBatch]
    permutation: Tensor  # (K // S * S,) slots in block order
    num_micro_batches: int  # of all workers


@dataclass(frozen=True)
class StepSettings:
    """What stays the same from step to step."""

    mean: tuple[float, ...]  # of the C channels, in 0..1
    std: tuple[float, ...]
    block_size: int
    student_temp: float
    koleo_weight: float
    clip_norm: float
    autocast: torch.dtype | None
    device: torch.device
    dtype: torch.dtype = torch.float32  # of parameters and pixels
    batch_slots: bool = False  # the batch's own teacher embeddings join every block


class Collectives(Protocol):
    """What the step needs of other workers; `massl_ray.training.collectives` has a local and a distributed one."""

    def start_gather(self, rows: Tensor) -> Callable[[], Tensor]:
        """Start gathering each worker's rows; the result waits and returns all of them in batch order."""
        ...

    def total(self, rows: Tensor) -> Tensor:
        """Sum over the micro-batches of all workers, (n,), the same on each, of one row a micro-batch, (m, n)."""
        ...

    def micro_batch(self, replica: nn.Module, last: bool) -> AbstractContextManager:
        """Around the forward and backward pass of one micro-batch, in batch order."""
        ...

    def finish_gradients(self, student: nn.Module) -> None:
        """After the last micro-batch: leaves in every `.grad` the sum over the micro-batches of all workers."""
        ...


METRICS = (
    "loss",
    "teacher_entropy",
    "student_entropy",
    "agreement",
    "koleo",
    "alignment",
    "embedding_std",
    "effective_rank",
    "uniformity",
    "memory_usage",
    "grad_norm",
)


def train_step(state: State, batch: Batch, schedule: Schedule, settings: StepSettings, collectives: Collectives) -> Tensor:
    """Advance `state` by one optimizer step and return the METRICS, (len(METRICS),), the same on every worker, without waiting
    for the device. The batch is compared with the memory as it was before, and where settings.batch_slots says so also with its
    own teacher embeddings; those of the second global views are written afterwards."""
    student_statistics, teacher_statistics = RunningStatistics(state.student), RunningStatistics(state.teacher)
    views = [prepare_views(micro, settings) for micro in batch.micro_batches]

    with torch.no_grad(), _autocast(settings):
        targets = []
        for groups in views:
            targets.append(state.teacher(groups[:1]))
            teacher_statistics.after_micro_batch()
    gathered = collectives.start_gather(torch.cat([_by_image(rows) for rows in targets]))
    if settings.batch_slots:
        own = torch.cat(gathered().chunk(2, dim=1))
        slots = joined_slots(state.memory, batch.permutation, settings.block_size, own)
    else:
        slots = memory_slots(state.memory, batch.permutation, settings.block_size)

    figures = []
    state.optimizer.zero_grad(set_to_none=True)
    for i, (micro, groups, target) in enumerate(zip(batch.micro_batches, views, targets, strict=True)):
        with collectives.micro_batch(state.replica, last=i == len(views) - 1):
            with _autocast(settings):
                embeddings = state.replica(groups, micro.drop_path)
            read = readout_loss(
                embeddings,
                target,
                slots.rows,
                slots.order,
                num_views=len(embeddings) // (len(target) // 2),
                block_size=slots.block_size,
                student_temp=settings.student_temp,
                teacher_temp=schedule.teacher_temp,
            )
            spread = _koleo(embeddings, len(target) // 2) if settings.koleo_weight else torch.zeros_like(read.loss)
            loss = read.loss + settings.koleo_weight * spread
            (loss / batch.num_micro_batches).backward()
        student_statistics.after_micro_batch()
        measured = [loss.detach(), read.teacher_entropy, read.student_entropy, read.agreement, spread.detach()]
        figures.append(torch.stack([*measured, alignment(*target.chunk(2))]))

    collectives.finish_gradients(state.student)
    norms = clip_per_parameter(state.student.parameters(), settings.clip_norm)
    set_schedule(state.optimizer, schedule.lr, schedule.weight_decay)
    state.optimizer.step()
    update_teacher(state.teacher, state.student, schedule.teacher_momentum)
    for statistics in (student_statistics, teacher_statistics):
        statistics.finish(batch.num_micro_batches, collectives.total)
    newest = gathered().chunk(2, dim=1)[1]
    signs = signs_of_collapse(newest, state.memory.rows[batch.permutation[: settings.block_size]])
    state.memory.write(newest)
    state.step += 1
    means = collectives.total(torch.stack(figures)) / batch.num_micro_batches
    return torch.cat([means, signs, norms.norm().to(means.dtype).unsqueeze(0)])


def prepare_views(micro: MicroBatch, settings: StepSettings) -> list[Tensor]:
    """Normalize on the device: one tensor (n*b, C, H, W) a resolution, view-major, channels last in memory."""
    mean = (torch.tensor(settings.mean, dtype=settings.dtype) * 255).to(settings.device, non_blocking=True)
    scale = (1.0 / (torch.tensor(settings.std, dtype=settings.dtype) * 255)).to(settings.device, non_blocking=True)
    groups = []
    for views in (micro.global_views, micro.local_views):
        if views.shape[1]:
            pixels = views.to(settings.device, non_blocking=True).transpose(0, 1).flatten(0, 1)
            groups.append(((pixels.to(settings.dtype) - mean) * scale).permute(0, 3, 1, 2))
    return groups


def _by_image(rows: Tensor) -> Tensor:
    """A row an image, (b, 2D), of the embeddings (2b, D) of its two global views."""
    return torch.cat(rows.chunk(2), dim=1)


def _koleo(embeddings: Tensor, batch: int) -> Tensor:
    return (koleo_loss(embeddings[:batch]) + koleo_loss(embeddings[batch : 2 * batch])) / 2


def _autocast(settings: StepSettings) -> AbstractContextManager:
    return torch.autocast(settings.device.type, dtype=settings.autocast or torch.bfloat16, enabled=settings.autocast is not None)
