"""Peers to learn beside: losses and heads of the library lightly, in one plain training loop with this product's backbone, views,
optimizer and schedules, the whole batch at once.

Letters: B images, V views of which the first two are global, F features, D dimensions of a head's output.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from massl_ray.config import Config
from massl_ray.errors import UserError
from massl_ray.keyed import Stream, seed_for
from massl_ray.method.network import Encoder, build_encoder, drop_path_draws
from massl_ray.method.optim import build_optimizer, clip_per_parameter, set_schedule, update_teacher
from massl_ray.method.products import use_onednn
from massl_ray.method.schedules import schedule_at
from massl_ray.method.step import MicroBatch, prepare_views
from massl_ray.training.loop import Views
from massl_ray.training.run import Run
from massl_ray.training.state import choose_attention, step_settings

SIMCLR_TEMPERATURE = 0.2
VICREG_WIDTH = 512
DINO_PROTOTYPES, DINO_BOTTLENECK, DINO_STUDENT_TEMPERATURE, DINO_TEACHER_TEMPERATURE = 1024, 128, 0.1, 0.04

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""The loss of one batch: of V outputs (B, D) of the student, and of two of the teacher, none where there is no teacher."""


@dataclass(frozen=True)
class Peer:
    """A method: its head (B, F) -> (B, D), its loss, and whether a moving average of the student is its teacher."""

    head: Callable[[int, Config], nn.Module]
    loss: Callable[[], Loss]
    teacher: bool = False


@dataclass(frozen=True)
class Learned:
    """What a method has made of the images: the backbone that it exports, the head upon it, and what it said on the way."""

    backbone: nn.Module
    head: nn.Module
    seconds_per_step: float | None = None  # median CPU seconds of one thread, without the making of views
    measured: Mapping[str, Any] = field(default_factory=dict)


def train_peer(name: str, run: Run, batches: Iterable[Views]) -> Learned:
    """Train by a peer's method. A pure function of the run, the batches and the method's name."""
    peer = PEERS[name]
    config, resolved = run.config, run.resolved
    settings = step_settings(config, resolved, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):  # heads and losses draw from the global generator: lend it ours and take it back
        torch.manual_seed(seed_for(Stream.WEIGHTS, config.run.seed))
        student, teacher = _encoders(peer, config)
        loss_of = peer.loss()
        optimizer, seconds = build_optimizer(student), []
        for step, views in enumerate(batches):
            started = time.process_time()
            schedule = schedule_at(step, config, resolved)
            groups = prepare_views(MicroBatch(views.global_views, views.local_views, None), settings)
            batch, num_views = len(views.global_views), 2 + config.views.num_local
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast is not None):
                outputs = student(groups, drop_path_draws(student, config.run.seed, step, 0, batch, num_views)).split(batch)
                with torch.no_grad():
                    targets = teacher(groups[:1]).split(batch) if teacher else ()
            optimizer.zero_grad(set_to_none=True)
            loss_of(outputs, targets).backward()
            clip_per_parameter(student.parameters(), config.optim.clip_norm)
            set_schedule(optimizer, schedule.lr, schedule.weight_decay)
            optimizer.step()
            if teacher:
                update_teacher(teacher, student, schedule.teacher_momentum)
            seconds.append(time.process_time() - started)
    learned = teacher or student
    return Learned(learned.backbone, learned.head, statistics.median(seconds))


def check_library() -> None:
    """Raises UserError where lightly is not installed."""
    try:
        import lightly.loss  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(
            "bench learn compares with methods of the library lightly, which is not installed: pip install 'massl-ray[dev]', or "
            "leave them out with --methods pixels,untrained,ours."
        ) from None


def _encoders(peer: Peer, config: Config) -> tuple[Encoder, Encoder | None]:
    """Student and teacher with the backbone's weights of a run of this seed, as it starts with them."""
    student = build_encoder(config, drop_path=config.model.drop_path)
    student.head = peer.head(student.backbone.num_features, config)  # type: ignore[arg-type]
    teacher = None
    if peer.teacher:
        teacher = build_encoder(config)
        teacher.head = peer.head(student.backbone.num_features, config)  # type: ignore[arg-type]
        teacher.load_state_dict(student.state_dict())
        teacher.requires_grad_(False)
    for encoder in filter(None, (student, teacher)):
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        choose_attention(encoder.backbone, torch.device("cpu"), config.train.precision)
        use_onednn(encoder)
    return student, teacher


def projection(features: int, hidden: int, width: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Three layers with batch norm after the first two: (n, features) -> (n, width)."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        activation(),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        activation(),
        nn.Linear(hidden, width),
    )


def mean_over_pairs(loss: Callable[[Tensor, Tensor], Tensor], views: Sequence[Tensor]) -> Tensor:
    """The mean of a loss of two views over all pairs of a global view j < 2 and a later view k > j, of V outputs (B, D)."""
    losses = [loss(views[j], views[k]) for j in range(2) for k in range(j + 1, len(views))]
    return torch.stack(losses).mean()


def _simclr_head(features: int, config: Config) -> nn.Module:
    return projection(features, config.head.hidden_dim, config.head.dim, nn.GELU)


def _simclr() -> Loss:
    from lightly.loss import NTXentLoss  # type: ignore[import-not-found]

    loss = NTXentLoss(temperature=SIMCLR_TEMPERATURE)
    return lambda views, _: mean_over_pairs(loss, views)


def _vicreg_head(features: int, config: Config) -> nn.Module:
    return projection(features, config.head.hidden_dim, VICREG_WIDTH, nn.ReLU)


def _vicreg() -> Loss:
    from lightly.loss import VICRegLoss  # type: ignore[import-not-found]

    loss = VICRegLoss()
    return lambda views, _: mean_over_pairs(loss, views)


def _dino_head(features: int, config: Config) -> nn.Module:
    from lightly.models.modules.heads import DINOProjectionHead  # type: ignore[import-not-found]

    with warnings.catch_warnings():  # torch has a newer weight norm than lightly takes
        warnings.simplefilter("ignore", FutureWarning)
        return DINOProjectionHead(features, config.head.hidden_dim, DINO_BOTTLENECK, DINO_PROTOTYPES, batch_norm=True)


def _dino() -> Loss:
    from lightly.loss import DINOLoss  # type: ignore[import-not-found]

    loss = DINOLoss(DINO_PROTOTYPES, teacher_temp=DINO_TEACHER_TEMPERATURE, student_temp=DINO_STUDENT_TEMPERATURE)
    return lambda views, targets: loss(list(targets), list(views))


PEERS = {
    "simclr": Peer(_simclr_head, _simclr),
    "vicreg": Peer(_vicreg_head, _vicreg),
    "dino": Peer(_dino_head, _dino, teacher=True),
}
