"""What follows from a configuration and the number of images: pure functions."""

import math
from dataclasses import dataclass
from typing import Any

from massl_ray.config.schema import Config, merge
from massl_ray.errors import UserError


@dataclass(frozen=True)
class Resolved:
    """What follows from a configuration and the number of images. Lengths are in images seen, so no value depends on workers."""

    dataset_size: int
    memory_size: int
    num_blocks: int
    block_size: int
    recipe: str  # "paper" or "joined"
    batch_slots: bool
    koleo_weight: float
    teacher_temp: float
    teacher_temp_start: float
    teacher_temp_images: float
    warmup_images: float
    peak_lr: float
    batch_size: int
    micro_batch_size: int
    steps: int
    end: int
    """Step after which the run stops: the last one, or train.stop_at."""

    @property
    def total_images(self) -> int:
        return self.steps * self.batch_size

    @property
    def read_size(self) -> int:
        """Slots that one read compares with: those of a block, and the batch's own two an image where they join it."""
        return self.block_size + (2 * self.batch_size if self.batch_slots else 0)

    @property
    def num_micro_batches(self) -> int:
        return self.batch_size // self.micro_batch_size


SMALL, LARGE = 20_000, 1_000_000  # images: where the small-data defaults end and the paper's recipes begin


def resolve(config: Config, dataset_size: int) -> Resolved:
    """Derive everything that depends on the size of the data set (images). Pure.

    Source: the recipes hold at 1.28 M images; below, memory and teacher temperature follow the data set's size, linearly in
    its logarithm (docs/log.md has the measurements on small sets).
    """
    if dataset_size < 2:
        raise UserError(f"data.source has {dataset_size} image(s); training needs at least 2.")
    batch = config.train.global_batch_size
    steps = config.train.steps or max(1, round(config.train.epochs * dataset_size / batch))
    epochs = steps * batch / dataset_size
    rise = min(1.0, max(0.0, math.log(dataset_size / SMALL) / math.log(LARGE / SMALL)))

    memory_size = _or_auto(config.memory.size, 2 ** round(13 + 4 * rise))
    num_blocks = _or_auto(config.memory.num_blocks, min(8, memory_size // 2))
    if memory_size < 2 * num_blocks:
        raise UserError(
            f"memory.size {memory_size} is too small for {num_blocks} blocks: a block needs at least two slots; "
            f"raise memory.size to {2 * num_blocks} or more, or lower memory.num_blocks."
        )
    teacher_temp = _or_auto(config.loss.teacher_temp, round(0.04 + 0.03 * rise, 4))
    recipe = _or_auto(config.loss.recipe, "joined" if dataset_size < LARGE else "paper")
    warmup_default = 0.0 if dataset_size >= LARGE else min(10.0, epochs / 10)
    return Resolved(
        dataset_size=dataset_size,
        memory_size=memory_size,
        num_blocks=num_blocks,
        block_size=memory_size // num_blocks,
        recipe=recipe,
        batch_slots=_or_auto(config.loss.batch_slots, recipe == "joined"),
        koleo_weight=_or_auto(config.loss.koleo_weight, 1.0 if recipe == "joined" else 0.0),
        teacher_temp=teacher_temp,
        teacher_temp_start=_or_auto(config.loss.teacher_temp_start, min(0.04, teacher_temp)),
        teacher_temp_images=_or_auto(config.loss.teacher_temp_epochs, min(30.0, epochs / 10)) * dataset_size,
        warmup_images=_or_auto(config.optim.warmup_epochs, warmup_default) * dataset_size,
        peak_lr=config.optim.lr * batch / 256,
        batch_size=batch,
        micro_batch_size=_or_auto(config.train.micro_batch_size, _largest_divisor(batch, 64)),
        steps=steps,
        end=min(steps, config.train.stop_at or steps),
    )


def fill(config: Config, resolved: Resolved) -> Config:
    """The configuration with every 'auto' that the data set decides written out: what config.toml in a run directory holds."""
    epochs = resolved.dataset_size
    return Config.model_validate(
        merge(
            config.model_dump(),
            {
                "memory": {"size": resolved.memory_size, "num_blocks": resolved.num_blocks},
                "loss": {
                    "recipe": resolved.recipe,
                    "batch_slots": resolved.batch_slots,
                    "koleo_weight": resolved.koleo_weight,
                    "teacher_temp": resolved.teacher_temp,
                    "teacher_temp_start": resolved.teacher_temp_start,
                    "teacher_temp_epochs": resolved.teacher_temp_images / epochs,
                },
                "optim": {"warmup_epochs": resolved.warmup_images / epochs},
                "train": {"micro_batch_size": resolved.micro_batch_size, "steps": resolved.steps},
            },
        )
    )


def _or_auto(value: Any, default: Any) -> Any:
    return default if value == "auto" else value


def _largest_divisor(number: int, most: int) -> int:
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)
