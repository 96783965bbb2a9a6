"""Linear probe: softmax regression on frozen features, one head for each learning rate, all trained at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, cos, pi
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massl_ray.errors import UserError
from massl_ray.evaluation.alterations import RandomCrop, ViewsOf
from massl_ray.evaluation.bootstrap import INTERVAL, accuracy_figures
from massl_ray.evaluation.checks import labelled
from massl_ray.evaluation.draws import Purpose, keyed, some_of_each
from massl_ray.evaluation.results import Result, Split

RATES = tuple(float(f"{10 ** (-4 + third / 3):.2g}") for third in range(13))  # 1e-4 to 1, three in each decade
MOMENTUM = 0.9


@dataclass(frozen=True)
class Schedule:
    epochs: int = 100
    batch: int = 1024
    min_steps: int = 1000  # a small train set is seen more often

    def batch_of(self, images: int) -> int:
        return min(self.batch, images)

    def epochs_of(self, images: int) -> int:
        return max(self.epochs, ceil(self.min_steps / ceil(images / self.batch_of(images))))


@dataclass(frozen=True)
class Heads:
    """One linear classifier for each learning rate, on features standardized by what it was trained on."""

    weight: Tensor  # (D, H, C)
    bias: Tensor  # (H, C)
    mean: Tensor  # (D,)
    scale: Tensor  # (D,)

    def logits(self, vectors: Tensor) -> Tensor:
        """(n, D) -> (n, H, C)."""
        rows = (vectors - self.mean) * self.scale
        return (rows @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias


@dataclass(frozen=True)
class Probe:
    """The classifier that was chosen, and what it depends on."""

    heads: Heads
    head: int  # the one that counts
    train_labels: np.ndarray  # (m,) int64
    test_labels: np.ndarray  # (n,) int64
    parameters: Mapping[str, Any]

    def predict(self, split: Split) -> np.ndarray:
        """(n,) int64, numbered as `test_labels`."""
        parts = torch.from_numpy(split.vectors).float().split(1024)
        return (
            torch.cat([self.heads.logits(part.to(self.heads.bias.device))[:, self.head].argmax(1) for part in parts]).cpu().numpy()
        )


def linear(
    train: Split,
    test: Split,
    *,
    rates: Sequence[float] = RATES,
    epochs: int = 100,
    batch: int = 1024,
    refit: bool = True,
    augment: int = 0,
    views_of: ViewsOf | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Result:
    """Top-1 accuracy and its mean over classes of the head with the lowest loss on a tenth of train that was held out;
    test images choose nothing.

    Args:
        refit: that rate is then used on all of train.
        augment: random crops of each train image, had of `views_of`, that it is trained on instead of the centred view; an epoch
            takes any one of them.
    """
    views = [views_of("train", RandomCrop(number, seed)).vectors for number in range(augment)] if views_of else []
    schedule = Schedule(epochs, batch)
    found = probe(train, test, "linear", rates=rates, schedule=schedule, refit=refit, views=views, seed=seed, device=device)
    figures = accuracy_figures(found.predict(test), found.test_labels, seed=seed)
    return Result("linear", figures, {**found.parameters, "test_images": len(test), "interval": INTERVAL})


def probe(
    train: Split,
    test: Split,
    protocol: str,
    *,
    rates: Sequence[float] = RATES,
    schedule: Schedule = Schedule(),  # noqa: B008, it is frozen
    refit: bool = True,
    views: Sequence[np.ndarray] = (),
    seed: int = 0,
    device: str = "cpu",
) -> Probe:
    """Of `test` only labels are looked at, to name the classes. `views`: features (m, D) of train to be trained on instead."""
    both = labelled(train, test, protocol)
    if not rates or min(rates) <= 0:
        raise UserError(f"{protocol}: learning rates must be over 0, got {', '.join(map(str, rates)) or 'none'}")
    centred = torch.from_numpy(np.ascontiguousarray(train.vectors, dtype=np.float32)).to(device)
    rows = torch.from_numpy(np.stack(views)).float().to(device) if len(views) else centred[None]  # (V, m, D)
    truth = torch.from_numpy(both.train).to(device)
    held = held_out(both.train, seed)
    fitted = np.setdiff1d(np.arange(len(train)), held)
    heads = fit_heads(rows[:, fitted], truth[fitted], rates, both.num_classes, schedule, seed)
    scores = _scores(heads, centred[held], truth[held])
    best = max(range(len(rates)), key=lambda head: scores[head][1])  # accuracies of few images are equal by chance
    if refit:
        heads = fit_heads(rows, truth, [rates[best]], both.num_classes, schedule, seed)
    trained = len(train) if refit else len(fitted)
    parameters: dict[str, Any] = {
        "rates": list(rates),
        "held_out_top1": [score[0] for score in scores],
        "held_out_loss": [-score[1] if np.isfinite(score[1]) else None for score in scores],
        "chosen_by": "held-out loss",
        "rate": rates[best],
        "rate_at_edge": len(rates) > 1 and rates[best] in (min(rates), max(rates)),
        "refit": refit,
        "held_out_images": len(held),
        "optimizer": f"SGD, momentum {MOMENTUM}, no weight decay, cosine to 0",
        "epochs": schedule.epochs_of(trained),
        "batch": schedule.batch_of(trained),
        "standardized": "by mean and standard deviation of the images it was trained on",
        "augmentation": f"{len(views)} random crops of each image" if len(views) else "none: features of centred views",
        "classes": both.num_classes,
        "train_images": len(train),
        "seed": seed,
    }
    return Probe(heads, 0 if refit else best, both.train, both.test, parameters)


def held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Places of a tenth of each class, of at least one image where the class has two."""
    counts = np.bincount(labels)
    tenth = np.where(counts > 1, np.maximum(1, np.round(counts / 10)), 0).astype(np.int64)
    if tenth.sum() == 0:
        raise UserError("linear: every class has one train image, so none can be held out to choose the learning rate; give more")
    return some_of_each(labels, tenth, keyed(Purpose.HOLD_OUT, seed))


def fit_heads(rows: Tensor, labels: Tensor, rates: Sequence[float], num_classes: int, schedule: Schedule, seed: int) -> Heads:
    """On features (V, m, D) of V views of each image, of which an epoch takes any one, and labels (m,). All heads see the same
    batches. They start at zero; the gradient of the mean cross-entropy, (softmax - truth) / B, is written out, so that a step is
    two matrix products for all heads together."""
    views, images, dims = rows.shape
    rate = torch.tensor(rates, device=rows.device).view(-1, 1)
    spread, mean = torch.std_mean(rows, dim=(0, 1), correction=0)
    scale = torch.where(spread > 1e-6 * spread.max(), 1 / spread.clamp_min(1e-20), 0)
    rows = (rows - mean) * scale
    weight = torch.zeros(dims, len(rates), num_classes, device=rows.device)
    bias = torch.zeros(len(rates), num_classes, device=rows.device)
    speeds = torch.zeros_like(weight), torch.zeros_like(bias)
    batch, epochs = schedule.batch_of(images), schedule.epochs_of(images)
    steps, step = epochs * ceil(images / batch), 0
    for epoch in range(epochs):
        random = keyed(Purpose.EPOCH, seed, epoch)
        order = torch.from_numpy(random.permutation(images)).to(rows.device)
        view = torch.from_numpy(random.integers(views, size=images)).to(rows.device)
        for places in order.split(batch):
            x = rows[view[places], places]
            error = ((x @ weight.flatten(1)).unflatten(1, bias.shape) + bias).softmax(2)  # (B, H, C)
            error[torch.arange(len(x), device=x.device), :, labels[places]] -= 1
            error /= len(x)
            now = rate * (0.5 + 0.5 * cos(pi * step / steps))
            for value, speed, gradient in zip(
                (weight, bias), speeds, ((x.T @ error.flatten(1)).view_as(weight), error.sum(0)), strict=True
            ):
                speed.mul_(MOMENTUM).add_(gradient)
                value.sub_(now * speed)
            step += 1
    return Heads(weight, bias, mean, scale)


def _scores(heads: Heads, rows: Tensor, labels: Tensor) -> list[tuple[float, float]]:
    """Of each head its accuracy and minus its loss; a head that ran away is worse than any."""
    logits = heads.logits(rows)
    right = (logits.argmax(2) == labels[:, None]).float().mean(0)
    loss = -logits.log_softmax(2)[torch.arange(len(rows), device=rows.device), :, labels].mean(0)
    return [
        (accuracy, -value) if np.isfinite(value) else (0.0, -np.inf)
        for accuracy, value in zip(right.tolist(), loss.tolist(), strict=True)
    ]
