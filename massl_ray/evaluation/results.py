"""What protocols take and give: features of images, and figures with their intervals. Plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Split:
    """Frozen features of one set of images; unreadable ones are left out."""

    vectors: np.ndarray  # (n, D) float32, as the backbone gives them: not normalized
    labels: np.ndarray | None  # (n,) int64, places in `classes`
    classes: Sequence[str] = ()
    paths: Sequence[str] = ()  # (n,)

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class Figure:
    """With its 95 % interval, by bootstrap over test images or over draws where there are several; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Result:
    """Of one protocol: its figures by name, those that it is judged by first, and all parameters that they depend on."""

    protocol: str
    figures: Mapping[str, Figure]
    parameters: Mapping[str, Any] = field(default_factory=dict)
