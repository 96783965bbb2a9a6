"""Robustness: the linear probe under corruptions, figures by kind and severity."""

import numpy as np
import pytest

from massl_ray.evaluation.alterations import Corrupted
from massl_ray.evaluation.corruptions import CORRUPTIONS
from massl_ray.evaluation.linear import linear
from massl_ray.evaluation.results import Split
from massl_ray.evaluation.robustness import robustness, under_corruptions
from tests.splits import clouds


def test_figures_by_kind_and_severity():
    right = {
        ("brightness", 1): np.array([1, 1, 1, 1], bool),
        ("brightness", 5): np.array([0, 0, 1, 1], bool),
        ("contrast", 1): np.array([1, 1, 1, 1], bool),
        ("contrast", 5): np.array([1, 1, 1, 1], bool),
    }
    result = under_corruptions(np.ones(4, bool), right)
    figures = {name: figure.value for name, figure in result.figures.items()}
    assert figures == {"corrupted": 0.875, "clean": 1, "severity_1": 1, "severity_5": 0.75, "brightness": 0.75, "contrast": 1}
    assert result.parameters["test_images"] == 4 and result.figures["corrupted"].low < 0.875
    assert result.parameters["severities"] == [1, 5] and list(result.parameters["corruptions"]) == ["brightness", "contrast"]


def test_the_probe_of_clean_images_under_each_corruption():
    train, test = clouds(300, apart=0.6), clouds(120, apart=0.6, seed=1)
    asked = []

    def views_of(side: str, alteration: Corrupted) -> Split:
        asked.append((side, alteration))
        if alteration.kind == "fog":  # every image looks like the first one
            return Split(np.repeat(test.vectors[:1], len(test), axis=0), test.labels, test.classes)
        if alteration.severity == 5:  # nothing is left
            return Split(np.zeros_like(test.vectors), test.labels, test.classes)
        return test

    result = robustness(train, test, views_of=views_of, seed=3)
    figures = {name: figure.value for name, figure in result.figures.items()}
    clean = linear(train, test, seed=3).figures["top1"].value
    assert 0.6 < clean < 1 and figures["clean"] == clean
    first = (test.labels == test.labels[0]).mean()  # the first image is seen rightly
    assert figures["fog"] == pytest.approx(first, abs=1e-6)
    assert figures["severity_2"] == pytest.approx((9 * clean + first) / 10, abs=1e-6)
    assert figures["severity_5"] < 0.5 < figures["severity_4"]
    assert asked == [("test", Corrupted(kind, severity, 3)) for kind in CORRUPTIONS for severity in range(1, 6)]
    assert result.parameters["classifier"]["train_images"] == 300
