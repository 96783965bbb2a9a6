"""Retrieval: instance mode against a loop over queries, copy detection against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from massl_ray.errors import UserError
from massl_ray.evaluation.results import Split
from massl_ray.evaluation.retrieval import copies, micro_average_precision, retrieval
from tests.splits import clouds


def angles(degrees: list[float], labels: list[int], paths: tuple[str, ...] = ()) -> Split:
    turned = np.radians(degrees)
    return Split(3 * np.stack([np.cos(turned), np.sin(turned)], axis=1).astype(np.float32), np.array(labels), (), paths)


def values(result) -> dict[str, float]:
    return {name: figure.value for name, figure in result.figures.items()}


def test_by_hand():
    # seen from 0 degrees: 10 (0), 20 (1), 30 (0), 40 (1); from 50 degrees the other way round
    gallery = angles([10, 20, 30, 40], [0, 1, 0, 1])
    result = values(retrieval(gallery, angles([0, 0, 50], [0, 1, 0]), recall_at=(1, 2)))
    precisions = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2, (1 / 2 + 2 / 4) / 2]
    assert result == pytest.approx({"map": np.mean(precisions), "recall_at_1": 1 / 3, "recall_at_2": 1})


def test_agrees_with_a_loop():
    train, test = clouds(60, apart=0.4), clouds(25, apart=0.4, seed=1)
    result = retrieval(train, test)
    precisions, firsts = [], []
    for query, label in zip(test.vectors.astype(float), test.labels, strict=True):
        close = train.vectors @ query / np.linalg.norm(train.vectors, axis=1)
        precisions.append(average_precision_score(train.labels == label, close))
        firsts.append(list(train.labels[np.argsort(-close)]).index(label))
    assert result.figures["map"].value == pytest.approx(np.mean(precisions))
    for k in (1, 5, 10):
        assert result.figures[f"recall_at_{k}"].value == pytest.approx(np.mean(np.array(firsts) < k))
    assert result.figures["map"].low < result.figures["map"].value < result.figures["map"].high


def test_a_query_does_not_find_itself():
    gallery = angles([0, 5, 10, 20], [0, 1, 0, 1], ("a", "b", "c", "d"))
    result = retrieval(gallery, gallery, recall_at=(1,))
    # a: b, c+; b: a, c, d+ (a and c as near, in the gallery's order); c: b, a+ ... of 5 and 10 degrees; d: c, b+, a
    assert values(result) == pytest.approx({"map": (1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4, "recall_at_1": 0})
    assert result.parameters["queries_in_gallery"] == 4
    without_paths = Split(gallery.vectors, gallery.labels)
    assert values(retrieval(without_paths, without_paths, recall_at=(1,)))["recall_at_1"] == 1


def test_a_query_with_nothing_to_find_counts_not():
    gallery = angles([0, 5, 10], [0, 1, 0], ("a", "b", "c"))
    result = retrieval(gallery, gallery, recall_at=(1,))  # b is alone in its class
    assert result.parameters["queries"] == 2 and result.parameters["queries_without_relevant_images"] == 1
    assert values(result) == pytest.approx({"map": 1 / 2, "recall_at_1": 0})


def test_copies_by_hand():
    gallery = angles([0, 30, 60, 90], [0, 1, 2, 3])
    queries = angles([1, 40, 80], [0, 1, 9])  # the last one is a copy of nothing, and 10 degrees from image 3
    result = copies(gallery, queries, candidates=1)
    # by similarity: query 0 (1 degree, right), queries 1 (right) and 2 (wrong) both at 10 degrees
    assert result.figures["map"].value == 1 and result.figures["recall_at_1"].value == 1
    assert result.parameters["queries_without_original"] == 1
    further = copies(gallery, angles([1, 44, 80], [0, 1, 9]), candidates=1)  # the right one is further than the wrong one
    assert further.figures["micro_ap"].value == pytest.approx((1 + 2 / 3) / 2)
    missed = copies(gallery, angles([1, 50], [0, 1]), candidates=1)  # nearer to image 2
    assert values(missed) == pytest.approx({"micro_ap": 1 / 2, "map": (1 + 1 / 2) / 2, "recall_at_1": 1 / 2})


def test_micro_average_precision_agrees_with_scikit_learn():
    random = np.random.default_rng(0)
    hits, scores = random.random(200) < 0.2, random.integers(0, 30, 200) / 30  # many equal scores
    assert micro_average_precision(hits, scores, hits.sum()) == pytest.approx(average_precision_score(hits, scores))
    times = random.integers(0, 4, 200)
    assert micro_average_precision(hits, scores, (hits * times).sum(), times) == pytest.approx(
        average_precision_score(hits, scores, sample_weight=times)
    )


def test_an_interval_for_micro_average_precision():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(60, 8)).astype(np.float32)
    noisy = vectors + random.normal(size=(60, 8)).astype(np.float32)
    figure = copies(Split(vectors, np.arange(60)), Split(noisy, np.arange(60))).figures["micro_ap"]
    assert 0.2 < figure.low < figure.value < figure.high < 1


def test_refused():
    with pytest.raises(UserError, match="k must be 1 or more"):
        retrieval(clouds(20), clouds(20), recall_at=())
    with pytest.raises(UserError, match="several images in the train set"):
        copies(clouds(20), clouds(20))
    with pytest.raises(UserError, match="no copy to find"):
        copies(angles([0, 1], [0, 1]), angles([0], [2]))
    alone = angles([0, 5], [0, 1], ("a", "b"))
    with pytest.raises(UserError, match="no test image has another image of its class"):
        retrieval(alone, alone)
