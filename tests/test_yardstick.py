"""Sentences about a run that gave nothing over pixels or random weights, for made-up summaries."""

import math

import pytest

from massl_ray.reporting.yardstick import gain, knn_summary, sentences, untrained_name

FINE = {
    "knn_pixels": 0.36,
    "knn_untrained": 0.575,
    "knn_final": 0.64,
    "knn1_pixels": 0.28,
    "knn1_untrained": 0.55,
    "knn1_final": 0.6,
    "knn_adapted": True,
    "knn_queries": 1500,
}


def test_nothing_is_said_where_training_helped():
    assert sentences(FINE, 20) == [] and gain(FINE) == pytest.approx(6.5)


def test_pixels_are_better():
    assert sentences(FINE | {"knn_pixels": 0.785}, 20) == [
        "Raw pixels are better than the trained backbone: 78.5% for 64.0% at k = 20."
    ]
    assert sentences(FINE | {"knn1_pixels": 0.601}, 20) == [
        "Raw pixels are better than the trained backbone: 60.1% for 60.0% at k = 1."
    ]
    (both,) = sentences(FINE | {"knn_pixels": 0.785, "knn1_pixels": 0.7}, 10)
    assert both.endswith(": 78.5% for 64.0% at k = 10 and 70.0% for 60.0% at k = 1.")
    (once,) = sentences(FINE | {"knn_pixels": 0.7, "knn1_pixels": 0.7, "knn1_final": 0.64}, 1)
    assert once.endswith(": 70.0% for 64.0% at k = 1.")
    assert sentences(FINE | {"knn_pixels": 0.64, "knn1_pixels": 0.6}, 20) == []  # as good is not better


def test_no_more_than_chance_over_the_untrained_backbone():
    (said,) = sentences(FINE | {"knn_final": 0.595}, 20)
    assert said == (
        "The trained backbone is not better than the untrained (statistics adapted) one by more than chance: +2.0 points, "
        "and two standard errors of such a difference on 1,500 images are 3.6."
    )
    (said,) = sentences(FINE | {"knn_final": 0.5, "knn1_final": 0.5, "knn_adapted": False}, 20)
    assert "than the untrained one by more than chance: -7.5 points" in said


@pytest.mark.parametrize("n", [100, 400, 10_000])
def test_the_bound_is_two_standard_errors(n):
    before = 0.5
    reach = 2 * math.sqrt(2 * 0.25 / n)  # both shares near one half
    for factor, expected in ((0.95, 1), (1.05, 0)):
        assert len(sentences({"knn_untrained": before, "knn_final": before + factor * reach, "knn_queries": n}, 20)) == expected


def test_what_is_not_known_says_nothing():
    assert sentences({}, 20) == [] and gain({}) is None
    assert sentences({"knn_final": 0.2, "knn_pixels": None, "knn_untrained": 0.3, "knn_queries": None}, 20) == []


def test_figures_of_records():
    records = [
        {"features": "pixels", "top1": 0.1, "top1_k1": 0.2},
        {"features": "untrained", "top1": 0.3, "top1_k1": 0.4, "adapted": False},
        {"features": "step_4", "top1": 0.5, "query_images": 9},
        {"features": "step_8", "top1": 0.6, "top1_k1": 0.7, "query_images": 8},
    ]
    assert knn_summary(records, 8) == {
        "knn_pixels": 0.1,
        "knn_untrained": 0.3,
        "knn_final": 0.6,
        "knn1_pixels": 0.2,
        "knn1_untrained": 0.4,
        "knn1_final": 0.7,
        "knn_adapted": False,
        "knn_queries": 8,
    }
    assert knn_summary(records, 4)["knn_final"] == 0.5 and knn_summary(records, 4)["knn1_final"] is None
    assert set(knn_summary([], None).values()) == {None}


def test_names():
    assert untrained_name(True) == "untrained, statistics adapted" and untrained_name(False) == untrained_name(None) == "untrained"
