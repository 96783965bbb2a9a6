"""Average precision on rankings made by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from massl_ray.evaluation.ranking import average_precision, precision_at, ranked, trapezoid_precision

flags = st.lists(st.booleans(), min_size=1, max_size=30)


def bits(text: str) -> np.ndarray:
    return np.array([mark == "+" for mark in text])


def test_by_hand():
    assert average_precision(bits("+++--")) == 1
    assert average_precision(bits("+-+--")) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(bits("--+")) == pytest.approx(1 / 3)
    assert average_precision(bits("+-+--"), total=4) == pytest.approx((1 + 2 / 3) / 4)  # two were never found
    assert np.isnan(average_precision(bits("---")))


def test_trapezoids_by_hand():
    assert trapezoid_precision(bits("++-")) == 1
    assert trapezoid_precision(bits("-+")) == pytest.approx((0 + 1 / 2) / 2)
    # first at rank 1: (1 + 1) / 2; second at rank 3: (1/2 + 2/3) / 2
    assert trapezoid_precision(bits("+-+--")) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert np.isnan(trapezoid_precision(bits("--")))


def test_junk_counts_neither_way():
    relevant, junk = bits("-+-+-"), bits("+-+--")
    assert average_precision(relevant, junk) == average_precision(bits("++-")) == 1
    assert trapezoid_precision(relevant, junk) == 1
    assert average_precision(relevant) < 1 and trapezoid_precision(relevant) < 1
    assert precision_at(relevant, 1, junk) == 1 and precision_at(relevant, 1) == 0


def test_precision_at_k_by_hand():
    assert precision_at(bits("+-+-----"), 1) == 1
    assert precision_at(bits("-++-----"), 2) == 1 / 2
    assert precision_at(bits("+++-----"), 5) == 1  # only three there are, all in front
    assert precision_at(bits("+-+-----"), 5) == pytest.approx(2 / 3)  # up to the last relevant one
    assert precision_at(bits("+-----+-"), 5) == 1 / 5


@settings(max_examples=50, deadline=None)
@given(flags)
def test_agrees_with_scikit_learn(relevant):
    if any(relevant):
        assert average_precision(np.array(relevant)) == pytest.approx(average_precision_score(relevant, -np.arange(len(relevant))))


@settings(max_examples=50, deadline=None)
@given(flags, st.randoms(use_true_random=False))
def test_junk_may_be_anywhere(relevant, random):
    """The same figures with junk put at any places."""
    mixed, junk = list(relevant), [False] * len(relevant)
    for _ in range(5):
        place = random.randrange(len(mixed) + 1)
        mixed.insert(place, random.random() < 0.5)
        junk.insert(place, True)
    for figure in (average_precision, trapezoid_precision):
        assert figure(np.array(mixed), np.array(junk)) == pytest.approx(figure(np.array(relevant)), nan_ok=True)


def test_ranked_in_chunks(monkeypatch):
    random = np.random.default_rng(0)
    queries, gallery = random.normal(size=(7, 3)).astype(np.float32), random.normal(size=(20, 3)).astype(np.float32)
    monkeypatch.setattr("massl_ray.evaluation.ranking.SIMILARITIES", 45)
    parts = list(ranked(queries, gallery))
    assert [part.stop - part.start for part, _ in parts] == [2, 2, 2, 1]
    order = np.concatenate([places for _, places in parts])
    assert (order == np.argsort(-(queries @ gallery.T), axis=1)).all()
