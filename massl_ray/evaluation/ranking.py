"""Average precision of rankings, with and without images that count neither way."""

from collections.abc import Iterator

import numpy as np
import torch

SIMILARITIES = 2**24  # held at once


def average_precision(relevant: np.ndarray, junk: np.ndarray | None = None, *, total: int | None = None) -> float:
    """Mean over relevant images of the precision at their ranks. relevant, junk: (m,) bool, nearest first; junk is taken out
    of the ranking. `total`: relevant images there are, if not all are in the ranking. NaN if there is none."""
    hits = _hits(relevant, junk)
    total = len(hits) if total is None else total
    return float((np.arange(1, len(hits) + 1) / hits).sum() / total) if total else float("nan")


def trapezoid_precision(relevant: np.ndarray, junk: np.ndarray | None = None) -> float:
    """Area under the precision-recall curve by trapezoids, as Oxford's benchmark counts it (Philbin et al., CVPR 2007;
    Radenovic et al., CVPR 2018): at the j-th relevant image the mean of the precision just before its rank and at it."""
    hits = _hits(relevant, junk)
    if not len(hits):
        return float("nan")
    found = np.arange(len(hits))
    before = np.where(hits == 1, 1.0, found / np.maximum(hits - 1, 1))
    return float(((before + (found + 1) / hits) / 2).mean())


def precision_at(relevant: np.ndarray, k: int, junk: np.ndarray | None = None) -> float:
    """Share of relevant images among the first k, or among those up to the last relevant image where it ranks before k
    (Radenovic et al., CVPR 2018: a query with fewer than k relevant images can reach 1)."""
    hits = _hits(relevant, junk)
    if not len(hits):
        return float("nan")
    reach = min(int(hits[-1]), k)
    return float((hits <= reach).sum() / reach)


def _hits(relevant: np.ndarray, junk: np.ndarray | None) -> np.ndarray:
    """Ranks of the relevant images, from 1, with junk taken out."""
    relevant = np.asarray(relevant, dtype=bool)
    kept = relevant if junk is None else relevant[~np.asarray(junk, dtype=bool)]
    return np.flatnonzero(kept) + 1


def ranked(queries: np.ndarray, gallery: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """A chunk of queries after the other, with the gallery's places (q, m) by falling similarity, equals in the gallery's
    order. Rows have length 1."""
    rows, each = torch.from_numpy(gallery), max(1, SIMILARITIES // max(1, len(gallery)))
    for first in range(0, len(queries), each):
        part = slice(first, min(first + each, len(queries)))
        yield part, (torch.from_numpy(queries[part]) @ rows.T).argsort(dim=1, descending=True, stable=True).numpy()
