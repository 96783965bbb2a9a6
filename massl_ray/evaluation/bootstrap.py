"""95 % intervals of figures: how far they would move with other test images of the same kind.

Means of scores and statistics of counts have percentile intervals of the bootstrap (Efron, 1979). Statistics that two copies
of an image distort (mutual information, ranks, pairs) have intervals of the grouped jackknife, which leaves images out.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import stdtrit

from massl_ray.evaluation.draws import Purpose, keyed
from massl_ray.evaluation.results import Figure

RESAMPLES = 1000
GROUPS = 20
CHUNK = 2**22  # numbers drawn at once
INTERVAL = "95 % percentile bootstrap over test images, 1,000 resamples"
JACKKNIFE = f"95 % of the jackknife over test images, {GROUPS} groups"


def mean_figure(scores: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Figure:
    """The mean of `scores` (n,), one for each test image, and its percentile interval."""
    scores = np.asarray(scores, dtype=np.float64)
    values, counts = np.unique(scores, return_counts=True)
    if len(values) * 8 < len(scores):  # right or wrong: how often each value is drawn is enough
        return counts_figure(counts, lambda drawn: drawn @ values / len(scores), seed=seed, resamples=resamples)
    random = keyed(Purpose.BOOTSTRAP, seed)
    each = max(1, CHUNK // len(scores))
    means = [
        scores[random.integers(0, len(scores), (min(each, resamples - first), len(scores)))].mean(axis=1)
        for first in range(0, resamples, each)
    ]
    return _percentiles(float(scores.mean()), np.concatenate(means))


def counts_figure(
    counts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0, resamples: int = RESAMPLES
) -> Figure:
    """A statistic of how many images are of each of some kinds, counts (kinds,), for instance right and wrong ones of each
    class. `statistic` takes (r, kinds) and gives (r,). Drawing n images anew is a multinomial draw of their kinds.
    """
    counts = np.asarray(counts)
    drawn = keyed(Purpose.BOOTSTRAP, seed).multinomial(counts.sum(), counts / counts.sum(), resamples)
    return _percentiles(float(statistic(counts[None])[0]), statistic(drawn))


def statistic_figure(statistic: Callable[[np.ndarray], float], n: int, *, seed: int = 0, resamples: int = RESAMPLES) -> Figure:
    """Any statistic of images by their places (r,) among n, computed once for each resample."""
    random = keyed(Purpose.BOOTSTRAP, seed)
    values = np.array([statistic(random.integers(0, n, n)) for _ in range(resamples)])
    return _percentiles(statistic(np.arange(n)), values)


def jackknife_figure(
    statistic: Callable[[np.ndarray], float], n: int, *, most: float = np.inf, seed: int = 0, groups: int = GROUPS
) -> Figure:
    """A statistic of images by their places among n, and value -+ t * se, where se is from leaving out one random group of
    images after the other (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11), up to `most` at most."""
    value, groups = statistic(np.arange(n)), min(groups, n)
    if groups < 2:
        return Figure(value)
    parts = np.array_split(keyed(Purpose.JACKKNIFE, seed).permutation(n), groups)
    left = np.array([statistic(np.sort(np.concatenate(parts[:part] + parts[part + 1 :]))) for part in range(groups)])
    error = float(np.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum()))
    reach = float(stdtrit(groups - 1, 0.975)) * error
    return Figure(value, value - reach, min(value + reach, max(most, value)))


def draws_figure(values: np.ndarray) -> Figure:
    """The mean over draws of a share, and its interval by Student's t within 0 and 1; one draw has none."""
    values = np.asarray(values, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Figure(mean)
    reach = float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / np.sqrt(n))
    return Figure(mean, max(mean - reach, 0.0), min(mean + reach, 1.0))


def accuracy_figures(predicted: np.ndarray, truth: np.ndarray, *, seed: int = 0) -> dict[str, Figure]:
    """Top-1 accuracy, and its mean over the classes of the test set, each as much as the other; shares."""
    right = (predicted == truth).astype(np.int64)
    classes = np.unique(truth, return_inverse=True)[1]
    counts = np.bincount(2 * classes + right, minlength=2 * int(classes.max()) + 2)
    return {"top1": mean_figure(right, seed=seed), "per_class": counts_figure(counts, _mean_of_classes, seed=seed)}


def _mean_of_classes(counts: np.ndarray) -> np.ndarray:
    """(r, 2 C) numbers of wrong and right images, class by class -> (r,). A class that was not drawn counts not."""
    pairs = counts.reshape(len(counts), -1, 2)
    images = pairs.sum(axis=2)
    return (pairs[:, :, 1] / np.maximum(images, 1)).sum(axis=1) / (images > 0).sum(axis=1)


def _percentiles(value: float, resampled: np.ndarray) -> Figure:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Figure(value, float(low), float(high))
