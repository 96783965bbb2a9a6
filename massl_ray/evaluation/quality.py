"""Quality of features without labels: how many directions they use, how evenly, and whether a few images are near all."""

from typing import Any

import numpy as np
import torch

from massl_ray.errors import UserError
from massl_ray.evaluation.alterations import RandomCrop, ViewsOf, described
from massl_ray.evaluation.bootstrap import JACKKNIFE, jackknife_figure
from massl_ray.evaluation.checks import finite, unit
from massl_ray.evaluation.draws import Purpose, keyed
from massl_ray.evaluation.results import Figure, Result, Split

CROP = RandomCrop(area=(0.32, 1.0))  # of a global view of training


def quality(
    train: Split,
    test: Split,
    *,
    views_of: ViewsOf | None = None,
    neighbours: int = 10,
    most: int = 2048,
    seed: int = 0,
) -> Result:
    """Figures of the test features' unit vectors; train plays no part, no labels are looked at.

    effective_rank: participation ratio (tr C)^2 / tr(C^2) of their covariance C, as it is logged while training.
    entropy_rank: exp of the entropy of C's eigenvalues as shares (Roy and Vetterli, EUSIPCO 2007). Both between 1 and D.
    uniformity: log of the mean over pairs of images of exp(-2 |x - y|^2) (Wang and Isola, ICML 2020, t = 2); 0 for one point,
        lower is more even, about -4 on a sphere of many dimensions.
    hubness: skewness of how often an image is among the `neighbours` nearest of others (Radovanovic et al., JMLR 2010).
    alignment: mean of |x - y|^2 over images and a random crop of each, had of `views_of` (Wang and Isola, a = 2); only if given.
    Pairs of images are of `most` images at most.
    """
    finite(test, "test", "quality")
    if len(test) < 3:
        raise UserError(f"quality needs 3 images or more, and the test set has {len(test)}")
    rows = unit(test.vectors)
    some = rows if len(rows) <= most else rows[np.sort(keyed(Purpose.SAMPLE, seed).permutation(len(rows))[:most])]
    close = torch.from_numpy(some) @ torch.from_numpy(some).T
    kernel = torch.exp(4 * (close - 1)).numpy()  # exp(-2 |x - y|^2)
    figures: dict[str, Figure] = {
        "effective_rank": jackknife_figure(lambda places: ranks(rows[places])[0], len(rows), seed=seed),
        "entropy_rank": jackknife_figure(lambda places: ranks(rows[places])[1], len(rows), seed=seed),
        "uniformity": jackknife_figure(lambda places: uniformity(kernel[np.ix_(places, places)]), len(some), seed=seed),
        "hubness": jackknife_figure(lambda places: hubness(close[places][:, places], neighbours), len(some), seed=seed),
    }
    if views_of is not None:
        distances = ((rows - unit(views_of("test", CROP).vectors)) ** 2).sum(axis=1)
        figures["alignment"] = jackknife_figure(lambda places: float(distances[places].mean()), len(rows), seed=seed)
    parameters: dict[str, Any] = {
        "vectors": "of length 1",
        "uniformity_t": 2,
        "neighbours": min(neighbours, len(some) - 1),
        "images_in_pairs": len(some),
        "alignment_with": described(CROP),
        "dims": rows.shape[1],
        "test_images": len(test),
        "seed": seed,
        "interval": JACKKNIFE,
    }
    return Result("quality", figures, parameters)


def ranks(rows: np.ndarray) -> tuple[float, float]:
    """(participation ratio, exp of the entropy) of the eigenvalues of the covariance of rows (n, D); 1 for a single point."""
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    gram = centred.T @ centred if len(rows) >= rows.shape[1] else centred @ centred.T  # the same eigenvalues but for zeros
    shares = np.linalg.eigvalsh(gram).clip(0)
    if shares.sum() <= 1e-12 * len(rows):
        return 1.0, 1.0
    shares = shares[shares > 0] / shares.sum()
    return float(1 / (shares**2).sum()), float(np.exp(-(shares * np.log(shares)).sum()))


def uniformity(kernel: np.ndarray) -> float:
    """Log of the mean of (n, n) but for the diagonal."""
    n = len(kernel)
    return float(np.log((kernel.sum(dtype=np.float64) - np.trace(kernel, dtype=np.float64)) / (n * (n - 1))))


def hubness(close: torch.Tensor, k: int) -> float:
    """Skewness of how often each image is among the k nearest others, by similarities (n, n); 0 where all are it equally often."""
    k = min(k, len(close) - 1)
    others = close - 4 * torch.eye(len(close))
    counts = np.bincount(others.topk(k, dim=1).indices.flatten().numpy(), minlength=len(close)).astype(np.float64)
    spread = counts.std()
    return float((((counts - k) / spread) ** 3).mean()) if spread > 0 else 0.0
