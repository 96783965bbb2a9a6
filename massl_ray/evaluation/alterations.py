"""Other views of an image than the centred one, for the protocols that ask for them. Each is drawn for a seed and the image itself:
it is the same wherever the image stands."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from massl_ray.config import ViewsSection
from massl_ray.evaluation.corruptions import corrupt
from massl_ray.evaluation.results import Split
from massl_ray.method.resampling import Pyramid
from massl_ray.method.views import apply_view, draw_view


@dataclass(frozen=True)
class Corrupted:
    """The centred view under a corruption."""

    kind: str
    severity: int
    seed: int = 0

    def view(self, image: np.ndarray, side: int, centred: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        pixels = centred(image)
        return corrupt(pixels, self.kind, self.severity, seed=self.seed, sample=_number(pixels))


@dataclass(frozen=True)
class RandomCrop:
    """A random resized crop, flipped half of the time: how images are cut where classifiers are trained."""

    number: int = 0  # of this image's crops
    seed: int = 0
    area: tuple[float, float] = (0.08, 1.0)

    def view(self, image: np.ndarray, side: int, centred: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        height, width, _ = image.shape
        how = ViewsSection(global_size=side, global_area=self.area, jitter=0, gray=0, blur=(0, 0, 0), solarize=0)
        drawn = draw_view(how, width, height, seed=self.seed, epoch=self.number, sample=_number(image), view=0)
        return apply_view(Pyramid(image), drawn)


Alteration = Corrupted | RandomCrop
ViewsOf = Callable[[Literal["train", "test"], Alteration], Split]  # features of a side's images in other views


def described(alteration: Alteration) -> dict[str, Any]:
    return {"is": type(alteration).__name__, **asdict(alteration)}


def _number(image: np.ndarray) -> int:
    """Of what is in it, in 63 bits; of a large one every so many rows are looked at."""
    rows = image[:: max(1, len(image) // 256)]
    return int.from_bytes(hashlib.blake2b(rows.tobytes(), digest_size=8).digest()) >> 1
