"""Sparse correspondences: patches of two pictures that are each other's most similar ones."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from massl_ray.config import ViewsSection
from massl_ray.method.resampling import Pyramid
from massl_ray.method.views import ViewParameters, apply_view, draw_view

BEST = 24  # correspondences that are drawn
TINY = 1e-12


@dataclass(frozen=True)
class Matches:
    """Best first. Positions are centres of patches, (x, y) as shares of the picture's width and height."""

    left: np.ndarray  # (m, 2)
    right: np.ndarray  # (m, 2)
    similarity: np.ndarray  # (m,) cosine

    def __len__(self) -> int:
        return len(self.similarity)


def correspondences(left: np.ndarray, right: np.ndarray, best: int = BEST) -> Matches:
    """Mutually nearest tokens of two maps (h, w, D) by cosine similarity; the `best` of them."""
    similarity = _unit(left) @ _unit(right).T
    to_right, to_left = similarity.argmax(1), similarity.argmax(0)
    mutual = np.flatnonzero(to_left[to_right] == np.arange(len(to_right)))
    values = similarity[mutual, to_right[mutual]]
    chosen = np.argsort(-values, kind="stable")[:best]
    mutual = mutual[chosen]
    return Matches(centres(left.shape)[mutual], centres(right.shape)[to_right[mutual]], values[chosen])


def centres(shape: tuple[int, ...]) -> np.ndarray:
    """(h * w, 2): (x, y) of each patch's centre, as shares of width and height."""
    height, width = shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([(x.ravel() + 0.5) / width, (y.ravel() + 0.5) / height], 1)


@dataclass(frozen=True)
class Pair:
    """Two views of one image, and where they were cut."""

    pixels: tuple[np.ndarray, np.ndarray]  # (side, side, channels) uint8 each
    views: tuple[ViewParameters, ViewParameters]


def two_views(image: ArrayLike, side: int, *, seed: int = 0, sample: int = 0) -> Pair:
    """Drawn as training draws its global views, with the same changes of colour, but of 40 to 80 % of the image's area and neither
    solarized nor gray: a pure function of (seed, sample)."""
    pixels = np.asarray(image)
    how = ViewsSection(global_size=side, num_local=0, global_area=(0.4, 0.8), gray=0.0, solarize=0.0)
    height, width, _ = pixels.shape
    first, second = (draw_view(how, width, height, seed=seed, epoch=0, sample=sample, view=view) for view in (0, 1))
    image_levels = Pyramid(pixels)
    return Pair((apply_view(image_levels, first), apply_view(image_levels, second)), (first, second))


def in_image(points: np.ndarray, view: ViewParameters) -> np.ndarray:
    """Where points (m, 2) of a view, as shares of it, lie in the image: (x, y) in its pixels."""
    left, top, right, bottom = view.box
    x = 1 - points[:, 0] if view.flip else points[:, 0]
    return np.stack([left + x * (right - left), top + points[:, 1] * (bottom - top)], 1)


def errors_px(matches: Matches, pair: Pair) -> np.ndarray:
    """(m,) pixels of the image between where the two ends of each correspondence were cut from."""
    first, second = pair.views
    return np.linalg.norm(in_image(matches.left, first) - in_image(matches.right, second), axis=1)


def any_two_px(shape: tuple[int, ...], pair: Pair) -> np.ndarray:
    """(patches, patches) pixels of the image between each patch of the one view and each of the other: what errors of
    correspondences taken at random would be."""
    ends = [in_image(centres(shape), view) for view in pair.views]
    return np.linalg.norm(ends[0][:, None] - ends[1][None], axis=2)


def patch_px(shape: tuple[int, ...], pair: Pair) -> float:
    """Side of a patch in pixels of the image, the larger of the two views'."""
    sides = [max((box[2] - box[0]) / shape[1], (box[3] - box[1]) / shape[0]) for box in (view.box for view in pair.views)]
    return float(max(sides))


def _unit(tokens: np.ndarray) -> np.ndarray:
    rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY)
