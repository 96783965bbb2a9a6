"""A map of the embeddings in the plane: principal components, then t-SNE."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from massl_ray.keyed import Stream, seed_for

FEWEST = 5  # images that make a map
DIMS = 50  # principal components that t-SNE starts from
PERPLEXITY = 30.0
NEAR = 10


@dataclass(frozen=True)
class Landscape:
    points: np.ndarray  # (n, 2) float32
    perplexity: float  # about the number of neighbours that each point looks at
    kept: float | None  # share of each point's NEAR nearest neighbours that are among its nearest ones on the map; None if too few


def landscape(vectors: np.ndarray, seed: int = 0) -> Landscape:
    """The plane map of (n, D) vectors by their cosine similarities: the same each time on one machine. Raises ValueError for fewer
    than FEWEST."""
    from sklearn.manifold import TSNE

    if len(vectors) < FEWEST:
        raise ValueError(f"a map needs at least {FEWEST} images, and there are {len(vectors)}")
    rows = vectors.astype(np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    rows = _principal(rows - rows.mean(0))
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    start = rows[:, :2] / max(float(rows[:, 0].std()), 1e-12) * 1e-4  # as init='pca', without its draws
    state = seed_for(Stream.MAP, seed) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # images that are all alike
        begin: Any = start.astype(np.float32)
        points = TSNE(perplexity=perplexity, init=begin, random_state=state).fit_transform(rows)
    return Landscape(points, perplexity, _kept(rows, points) if len(rows) > 2 * NEAR else None)


def _principal(centred: np.ndarray) -> np.ndarray:
    """(n, at least 2 and at most DIMS), signs fixed by the largest loading."""
    u, values, loadings = np.linalg.svd(centred, full_matrices=False)
    signs = np.where(loadings[np.arange(len(loadings)), np.abs(loadings).argmax(1)] < 0, -1, 1)
    rows = (u * values * signs)[:, :DIMS]
    return np.pad(rows, ((0, 0), (0, max(0, 2 - rows.shape[1]))))


def _kept(rows: np.ndarray, points: np.ndarray) -> float:
    from sklearn.neighbors import NearestNeighbors

    near = [NearestNeighbors(n_neighbors=NEAR).fit(each).kneighbors(return_distance=False) for each in (rows, points)]
    return float(np.mean([len(np.intersect1d(a, b)) / NEAR for a, b in zip(*near, strict=True)]))
