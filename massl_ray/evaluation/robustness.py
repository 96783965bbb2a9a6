"""Robustness: accuracy of the linear probe under standard corruptions at five severities."""

from collections.abc import Callable, Mapping

import numpy as np

from massl_ray.evaluation.alterations import Corrupted, ViewsOf
from massl_ray.evaluation.bootstrap import INTERVAL, mean_figure
from massl_ray.evaluation.corruptions import CORRUPTIONS, SEVERITIES, SIDE
from massl_ray.evaluation.linear import probe
from massl_ray.evaluation.results import Figure, Result, Split

Right = Mapping[tuple[str, int], np.ndarray]  # of each (kind, severity), which images were right, (n,) bool


def robustness(train: Split, test: Split, *, views_of: ViewsOf, seed: int = 0) -> Result:
    """Top-1 accuracy on corrupted test images, of the linear probe that was trained on clean ones: over all kinds and severities,
    by severity over kinds, by kind over severities, and of the images as they are. Test images choose nothing; intervals are
    over images."""
    classifier = probe(train, test, "robustness", seed=seed)

    def right(split: Split) -> np.ndarray:
        return classifier.predict(split) == classifier.test_labels

    corrupted = {
        (kind, severity): right(views_of("test", Corrupted(kind, severity, seed)))
        for kind in CORRUPTIONS
        for severity in SEVERITIES
    }
    result = under_corruptions(right(test), corrupted, seed=seed)
    return Result(result.protocol, result.figures, {**result.parameters, "classifier": classifier.parameters})


def under_corruptions(clean: np.ndarray, right: Right, *, seed: int = 0) -> Result:
    """From which images (n,) bool were right as they are and under each (kind, severity)."""

    def over(chosen: Callable[[str, int], bool]) -> Figure:
        return mean_figure(np.mean([scores for key, scores in right.items() if chosen(*key)], axis=0), seed=seed)

    names, severities = list(dict.fromkeys(key[0] for key in right)), sorted({key[1] for key in right})
    figures = {"corrupted": over(lambda name, severity: True), "clean": mean_figure(clean, seed=seed)}
    figures |= {f"severity_{one}": over(lambda name, severity, one=one: severity == one) for one in severities}
    figures |= {one: over(lambda name, severity, one=one: name == one) for one in names}
    parameters = {
        "corruptions": {name: list(CORRUPTIONS[name][1]) for name in names},
        "severities": severities,
        "strengths_from": "Hendrycks and Dietterich, ICLR 2019",
        "pixels_meant_for": SIDE,
        "test_images": len(clean),
        "seed": seed,
        "interval": INTERVAL,
    }
    return Result("robustness", figures, parameters)
