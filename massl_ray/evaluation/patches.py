"""Principal components of patch tokens, shown as colours: parts that the backbone takes for alike get the same one."""

from dataclasses import dataclass

import numpy as np

CLIP = 2.0  # percent of the tokens at each end that are shown as the ends
EDGE = 1  # patches at the border, where there is less of what a picture is of


@dataclass(frozen=True)
class Components:
    scores: np.ndarray  # (n, h, w, k) float64
    shares: np.ndarray  # (k,) of the variance


def components(tokens: np.ndarray, count: int = 3, mask: np.ndarray | None = None) -> Components:
    """The first principal components of all tokens (n, h, w, D) together, or of those of `mask` (n, h, w).

    The sign of each is such that its largest loading is positive, so the same tokens always get the same colours. Components that
    tokens do not have are zero.
    """
    rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    used = rows if mask is None else rows[mask.ravel()]
    scores, shares = np.zeros((len(rows), count)), np.zeros(count)
    if len(used) > 1:
        centre = used.mean(0)
        variances, axes = np.linalg.eigh(np.cov(used - centre, rowvar=False, bias=True).reshape(rows.shape[1], -1))
        variances, axes = variances[::-1].clip(0)[:count], axes[:, ::-1][:, :count]
        axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1, 1)
        total = (used - centre).var(0).sum()
        real = variances > 1e-9 * max(total, 1e-30)
        scores[:, : len(variances)] = (rows - centre) @ axes * real
        shares[: len(variances)] = variances * real / max(total, 1e-30)
    return Components(scores.reshape(*tokens.shape[:-1], count), shares)


def colours(scores: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """(n, h, w, 3) uint8: each component from its CLIP-th percentile, 0, to that at the other end, 255, over all images together;
    middle gray where it does not vary, black outside of `mask`."""
    used = scores.reshape(-1, scores.shape[-1]) if mask is None else scores[mask]
    if not len(used):
        return np.zeros(scores.shape, np.uint8)
    low, high = np.percentile(used, [CLIP, 100 - CLIP], axis=0)
    width = high - low
    scaled = np.where(width > 0, (scores - low) / np.where(width > 0, width, 1), 0.5)
    shown = np.round(scaled.clip(0, 1) * 255).astype(np.uint8)
    return shown if mask is None else shown * mask[..., None].astype(np.uint8)


def foreground(scores: np.ndarray) -> np.ndarray:
    """(n, h, w) bool: the side of the first component, cut where the two sides vary least (Otsu), that is the rarer one at the
    images' borders. A guess: nothing tells a backbone what a picture is of."""
    first = scores[..., 0]
    above = first > otsu(first.ravel())
    border = np.ones(above.shape[1:], bool)
    border[EDGE:-EDGE, EDGE:-EDGE] = False
    inside = above[:, ~border].mean() if (~border).any() else 0.5
    return above if above[:, border].mean() <= inside else ~above


def otsu(values: np.ndarray) -> float:
    """The cut between two groups of `values` (n,) whose means differ most for their sizes (Otsu, 1979)."""
    ordered = np.sort(values)
    below = np.arange(1, len(ordered))
    if not len(below) or ordered[0] == ordered[-1]:
        return float(ordered[-1])
    sums = np.cumsum(ordered)
    lower, upper = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(ordered) - below)
    between = below * (len(ordered) - below) * (upper - lower) ** 2
    between[ordered[1:] == ordered[:-1]] = -1  # equal values are on one side
    cut = int(between.argmax())
    return float((ordered[cut] + ordered[cut + 1]) / 2)
