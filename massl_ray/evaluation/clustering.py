"""Clustering: how far k-means on the test features finds the classes."""

import warnings
from collections.abc import Callable

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

from massl_ray.errors import UserError
from massl_ray.evaluation.bootstrap import JACKKNIFE, jackknife_figure
from massl_ray.evaluation.checks import calm, finite, names_of, unit
from massl_ray.evaluation.draws import Purpose, random_state
from massl_ray.evaluation.results import Result, Split

SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "nmi": normalized_mutual_info_score,  # mutual information over the arithmetic mean of the entropies
    "ami": adjusted_mutual_info_score,  # the same, adjusted for chance
    "ari": adjusted_rand_score,  # Rand index adjusted for chance
}


def clustering(train: Split, test: Split, *, clusters: int | None = None, starts: int = 10, seed: int = 0) -> Result:
    """Normalized and adjusted mutual information and adjusted Rand index between the test images' classes and k-means clusters
    of their unit vectors, as many as classes if nothing else is said. Train plays no part.

    Intervals are the jackknife's, for the clusters that were found: copies of images, as the bootstrap draws them, would
    raise mutual information.
    """
    finite(test, "test", "clustering")
    kinds, labels = np.unique(names_of(test, "test", "clustering").astype(str), return_inverse=True)
    if len(kinds) < 2:
        raise UserError(f"clustering needs two classes or more, and all {len(test)} test images are of class {kinds[0]}")
    clusters = len(kinds) if clusters is None else clusters
    if not 2 <= clusters <= len(test):
        raise UserError(f"clustering: {clusters} clusters of {len(test)} test images cannot be; ask for 2 to {len(test)}")
    with calm(test.vectors.size), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct vectors than clusters: the scores say it
        means = KMeans(clusters, random_state=random_state(Purpose.KMEANS, seed)).set_params(n_init=starts)
        found = means.fit_predict(unit(test.vectors))
    figures = {
        name: jackknife_figure(
            lambda places, score=score: float(score(labels[places], found[places])), len(test), most=1, seed=seed
        )
        for name, score in SCORES.items()
    }
    parameters = {
        "clusters": clusters,
        "classes": len(kinds),
        "starts": starts,
        "vectors": "of length 1",
        "nmi": "normalized by the arithmetic mean of the entropies",
        "test_images": len(test),
        "seed": seed,
        "interval": JACKKNIFE,
    }
    return Result("clustering", figures, parameters)
