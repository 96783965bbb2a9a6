"""Made features for the tests of evaluation protocols."""

import numpy as np

from massl_ray.evaluation.results import Split


def clouds(n: int, *, classes: int = 4, dims: int = 16, apart: float = 1.0, seed: int = 0) -> Split:
    """n Gaussian vectors around one centre for each class; the centres are the same for any n and seed."""
    centres = np.random.default_rng(99).normal(size=(classes, dims)) * apart
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(0, classes, n - classes)])
    vectors = centres[labels] + random.normal(size=(n, dims))
    return Split(vectors.astype(np.float32), labels, [f"kind {label}" for label in range(classes)])
