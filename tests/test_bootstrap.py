"""Intervals: known standard errors, how often they hold the truth, and one seed one interval."""

import math

import numpy as np
import pytest

from massl_ray.evaluation.bootstrap import (
    accuracy_figures,
    counts_figure,
    draws_figure,
    jackknife_figure,
    mean_figure,
    statistic_figure,
)


@pytest.mark.parametrize("kind", ["right or wrong", "any number"])
def test_mean_has_the_interval_of_the_normal_law(kind):
    random = np.random.default_rng(0)
    scores = (random.random(4000) < 0.8).astype(float) if kind == "right or wrong" else random.normal(3, 2, 4000)
    figure = mean_figure(scores)
    error = scores.std() / math.sqrt(len(scores))
    assert figure.value == pytest.approx(scores.mean())
    assert figure.low == pytest.approx(scores.mean() - 1.96 * error, abs=0.25 * error)
    assert figure.high == pytest.approx(scores.mean() + 1.96 * error, abs=0.25 * error)


def test_intervals_hold_the_truth_about_95_times_of_100():
    held = 0
    for seed in range(200):
        scores = np.random.default_rng(seed).random(150) < 0.7
        figure = mean_figure(scores, seed=seed)
        held += figure.low <= 0.7 <= figure.high
    assert 180 <= held <= 198


def test_keyed():
    scores = np.random.default_rng(0).normal(size=50)
    assert mean_figure(scores, seed=3) == mean_figure(scores, seed=3) != mean_figure(scores, seed=4)


def test_chunks_change_no_mean(monkeypatch):
    scores = np.random.default_rng(0).normal(size=50)
    whole = mean_figure(scores)
    monkeypatch.setattr("massl_ray.evaluation.bootstrap.CHUNK", 170)
    assert mean_figure(scores) == whole


def test_constant_scores_have_no_width():
    figure = mean_figure(np.ones(30))
    assert (figure.value, figure.low, figure.high) == (1, 1, 1)


def test_counts_and_places_agree():
    random = np.random.default_rng(0)
    kinds = random.integers(0, 3, 500)
    by_counts = counts_figure(np.bincount(kinds), lambda drawn: drawn[:, 1] / drawn.sum(axis=1))
    by_places = statistic_figure(lambda places: float((kinds[places] == 1).mean()), 500)
    assert by_counts.value == by_places.value
    assert by_counts.low == pytest.approx(by_places.low, abs=0.006) and by_counts.high == pytest.approx(by_places.high, abs=0.006)


def test_jackknife_of_a_mean_is_its_standard_error():
    scores = np.random.default_rng(0).normal(size=20)  # groups of one image
    figure = jackknife_figure(lambda places: float(scores[places].mean()), 20)
    error = scores.std(ddof=1) / math.sqrt(20)
    assert figure.high - figure.value == pytest.approx(2.093 * error, rel=1e-3)  # Student's t, 19 degrees of freedom
    assert figure.value - figure.low == pytest.approx(2.093 * error, rel=1e-3)


def test_draws_by_hand():
    figure = draws_figure(np.array([0.5, 0.6, 0.7, 0.6, 0.6]))
    reach = 2.776 * math.sqrt(0.02 / 4) / math.sqrt(5)
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.6, 0.6 - reach, 0.6 + reach), abs=1e-4)
    assert draws_figure(np.array([0.4])).low is None
    assert draws_figure(np.array([0.9, 1.0])).high == 1


def test_mean_of_classes():
    truth = np.array([5] * 90 + [2] * 10)
    predicted = np.where(truth == 5, 5, 9)
    predicted[:9] = 2
    figures = accuracy_figures(predicted, truth)
    assert figures["top1"].value == pytest.approx(0.81)
    assert figures["per_class"].value == pytest.approx(0.45)  # 0.9 of one, none of the other
    assert figures["per_class"].low < 0.45 < figures["per_class"].high
