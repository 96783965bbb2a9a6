"""Schedules: pure functions of images seen. They know no loader, no epoch array and no worker."""

import math
from dataclasses import dataclass

from massl_ray.config import Config, Resolved


def cosine(
    images: float, base: float, final: float, total: float, warmup: float = 0.0, start: float = 0.0, batch: float = 1.0
) -> float:
    """Linear from `start` to `base` over the first `warmup` images, then cosine from `base` to `final` at `total`.

    `images` counts those seen before the step; the warm-up reaches `base` at its last step, one `batch` before its end.
    """
    if images < warmup:
        return start + (base - start) * min(1.0, images / max(warmup - batch, batch))
    progress = (images - warmup) / max(total - warmup, 1.0)
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule:
    """The scheduled values of one step."""

    images_seen: int
    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float


def schedule_at(step: int, config: Config, resolved: Resolved) -> Schedule:
    """Values for the step that starts after `step` earlier ones."""
    batch, total = resolved.batch_size, resolved.total_images
    images = step * batch
    optim = config.optim
    return Schedule(
        images_seen=images,
        lr=cosine(images, resolved.peak_lr, optim.lr_final, total, resolved.warmup_images, 0.0, batch),
        weight_decay=cosine(images, optim.weight_decay, optim.weight_decay_final, total),
        teacher_momentum=cosine(images, optim.teacher_momentum, optim.teacher_momentum_final, total),
        teacher_temp=cosine(
            images,
            resolved.teacher_temp,
            resolved.teacher_temp,
            total,
            resolved.teacher_temp_images,
            resolved.teacher_temp_start,
            batch,
        ),
    )
