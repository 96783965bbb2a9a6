"""Linear probe: softmax regression on frozen features, one head for each learning rate, all trained at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, cos, pi
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massl_ray.errors import UserError
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


def linear(
    train: Split,
    test: Split,
    *,
    rates: Sequence[float] = RATES,
    epochs: int = 100,
    batch: int = 1024,
    refit: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> Result:
    """Top-1 accuracy and its mean over classes of the head with the lowest loss on a tenth of train that was held out;
    test images choose nothing. `refit`: that rate is then used on all of train."""
    both = labelled(train, test, "linear")
    if not rates or min(rates) <= 0:
        raise UserError(f"linear: learning rates must be over 0, got {', '.join(map(str, rates)) or 'none'}")
    rows = torch.from_numpy(np.ascontiguousarray(train.vectors, dtype=np.float32)).to(device)
    truth = torch.from_numpy(both.train).to(device)
    schedule = Schedule(epochs, batch)
    held = held_out(both.train, seed)
    fitted = np.setdiff1d(np.arange(len(train)), held)
    heads = fit_heads(rows[fitted], truth[fitted], rates, both.num_classes, schedule, seed)
    scores = _scores(heads, rows[held], truth[held])
    best = max(range(len(rates)), key=lambda head: scores[head][1])  # accuracies of few images are equal by chance
    if refit:
        heads, head = fit_heads(rows, truth, [rates[best]], both.num_classes, schedule, seed), 0
    else:
        head = best
    predicted = torch.cat(
        [heads.logits(part.to(device))[:, head].argmax(1) for part in torch.from_numpy(test.vectors).float().split(1024)]
    )
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
        "epochs": schedule.epochs_of(len(train) if refit else len(fitted)),
        "batch": schedule.batch_of(len(train) if refit else len(fitted)),
        "standardized": "by mean and standard deviation of the images it was trained on",
        "augmentation": "none: features of centre views",
        "classes": both.num_classes,
        "train_images": len(train),
        "test_images": len(test),
        "seed": seed,
        "interval": INTERVAL,
    }
    return Result("linear", accuracy_figures(predicted.cpu().numpy(), both.test, seed=seed), parameters)


def held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Places of a tenth of each class, of at least one image where the class has two."""
    counts = np.bincount(labels)
    tenth = np.where(counts > 1, np.maximum(1, np.round(counts / 10)), 0).astype(np.int64)
    if tenth.sum() == 0:
        raise UserError("linear: every class has one train image, so none can be held out to choose the learning rate; give more")
    return some_of_each(labels, tenth, keyed(Purpose.HOLD_OUT, seed))


def fit_heads(rows: Tensor, labels: Tensor, rates: Sequence[float], num_classes: int, schedule: Schedule, seed: int) -> Heads:
    """All heads see the same batches. They start at zero; the gradient of the mean cross-entropy, (softmax - truth) / B, is
    written out, so that a step is two matrix products for all heads together."""
    rate = torch.tensor(rates, device=rows.device).view(-1, 1)
    spread, mean = torch.std_mean(rows, dim=0, correction=0)
    scale = torch.where(spread > 1e-6 * spread.max(), 1 / spread.clamp_min(1e-20), 0)
    rows = (rows - mean) * scale
    weight = torch.zeros(rows.shape[1], len(rates), num_classes, device=rows.device)
    bias = torch.zeros(len(rates), num_classes, device=rows.device)
    speeds = torch.zeros_like(weight), torch.zeros_like(bias)
    batch, epochs = schedule.batch_of(len(rows)), schedule.epochs_of(len(rows))
    steps, step = epochs * ceil(len(rows) / batch), 0
    for epoch in range(epochs):
        order = torch.from_numpy(keyed(Purpose.EPOCH, seed, epoch).permutation(len(rows))).to(rows.device)
        for places in order.split(batch):
            x = rows[places]
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
