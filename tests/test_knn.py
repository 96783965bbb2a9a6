"""k-NN: the weighted vote against a plain loop over queries and neighbours."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_ray.errors import UserError
from massl_ray.evaluation.knn import knn, knn_accuracy, knn_figures, knn_predict, knn_votes, uneven
from massl_ray.evaluation.results import Split
from tests.splits import clouds


def votes(bank: np.ndarray, labels: np.ndarray, query: np.ndarray, k: int, temperature: float, num_classes: int) -> list[float]:
    """What each class gets, in Python floats."""
    similarities = []
    for row in bank.astype(float):
        similarities.append(float(row @ query) / (math.sqrt(row @ row) * math.sqrt(query.astype(float) @ query)))
    nearest = sorted(range(len(bank)), key=lambda index: -similarities[index])[:k]
    result = [0.0] * num_classes
    for index in nearest:
        result[labels[index]] += math.exp(similarities[index] / temperature)
    return result


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 40),
    dims=st.integers(2, 8),
    k=st.integers(1, 50),
    temperature=st.sampled_from([0.07, 0.2, 1.0]),
    num_classes=st.integers(1, 5),
)
def test_agrees_with_a_plain_loop(seed, size, dims, k, temperature, num_classes):
    random = np.random.default_rng(seed)
    bank, queries = (random.normal(size=(rows, dims)).astype(np.float32) * random.uniform(0.1, 9, (rows, 1)) for rows in (size, 12))
    labels = random.integers(0, num_classes, size)
    predicted = knn_predict(
        torch.tensor(bank), torch.tensor(labels), torch.tensor(queries), k=k, temperature=temperature, num_classes=num_classes
    )
    assert predicted.shape == (12,)
    for prediction, query in zip(predicted.tolist(), queries, strict=True):
        expected = votes(bank, labels, query, k, temperature, num_classes)
        assert expected[prediction] >= max(expected) * (1 - 1e-3)  # the winner, or as good as


LINE = torch.tensor([[1.0, 0.0], [0.96, 0.28], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
KINDS = torch.tensor([0, 1, 1, 1, 1])
EAST = torch.tensor([[1.0, 0.0]])  # cosine similarities 1, 0.96, 0.8, 0.6, 0


def predict(**changes) -> int:
    arguments = {"bank": LINE, "labels": KINDS, "queries": EAST, "k": 5, "temperature": 0.07, "num_classes": 2} | changes
    return int(knn_predict(arguments.pop("bank"), arguments.pop("labels"), arguments.pop("queries"), **arguments))


def test_votes_by_hand():
    # class 0 has exp(1 / T); class 1 has exp(0.96 / T) + exp(0.8 / T) + exp(0.6 / T) + exp(0 / T)
    assert predict(temperature=0.01) == 0  # 1 against 0.018
    assert predict(temperature=0.07) == 0  # 1 against 0.565 + 0.057 + 0.003
    assert predict(temperature=0.2) == 1  # 1 against 0.819 + 0.368 + 0.135
    assert predict(temperature=0.2, k=2) == 0  # 1 against 0.819
    assert predict(k=1, temperature=100) == 0
    assert predict(k=3, temperature=100) == 1


def test_lengths_do_not_count():
    lengths = torch.tensor([[0.01], [100.0], [1.0], [1.0], [1.0]])
    assert predict(bank=LINE * lengths, queries=EAST * 1e-3) == 0
    assert predict(bank=LINE * lengths, queries=EAST * 1e3, k=1) == 0


def test_low_temperatures_do_not_overflow():
    assert predict(temperature=1e-3) == 0
    assert predict(temperature=1e-3, queries=-LINE[4:]) == 0  # all similarities are -1 or more, none over 0


def test_k_is_lowered_to_the_bank():
    assert predict(k=1000, temperature=0.2) == predict(k=5, temperature=0.2) == 1


def test_more_queries_than_a_chunk():
    random = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(30, 4, generator=random), torch.randn(2500, 4, generator=random)
    labels = torch.arange(30) % 3
    whole = knn_predict(bank, labels, queries, k=5, temperature=0.1, num_classes=3)
    parts = [knn_predict(bank, labels, queries[i : i + 7], k=5, temperature=0.1, num_classes=3) for i in range(0, 2500, 7)]
    assert torch.equal(whole, torch.cat(parts)) and len(whole.unique()) == 3


def test_half_precision_features_are_compared_in_full():
    random = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(size, 8, generator=random).bfloat16() for size in (40, 60))
    labels = torch.arange(40) % 4
    arguments = {"k": 7, "temperature": 0.07, "num_classes": 4}
    assert torch.equal(
        knn_predict(bank, labels, queries, **arguments), knn_predict(bank.float(), labels, queries.float(), **arguments)
    )


def test_accuracy_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.01]])
    truth = torch.tensor([0, 1, 0, 1])
    assert knn_accuracy(LINE, KINDS, queries, truth, k=1, temperature=0.07) == 0.5
    assert knn_accuracy(LINE, KINDS, queries[:3], truth[:3], k=1, temperature=0.07) == pytest.approx(2 / 3)


def test_classes_that_the_bank_lacks_are_misses():
    assert knn_accuracy(LINE, KINDS, LINE[:2], torch.tensor([0, 7]), k=1, temperature=0.07) == 0.5


def test_a_bank_finds_itself_at_k_1():
    rows = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(50) % 10
    assert knn_accuracy(rows, labels, rows, labels, k=1, temperature=0.07) == 1.0
    assert knn_accuracy(rows, labels, rows, (labels + 1) % 10, k=1, temperature=0.07) == 0.0


def test_all_k_in_one_pass_agree_with_a_plain_loop():
    train, test = clouds(80, apart=0.5), clouds(40, apart=0.5, seed=1)
    result = knn(train, test, ks=(1, 7, 20, 80))
    for k in (1, 7, 20, 80):
        plain = [np.argmax(votes(train.vectors, train.labels, query, k, 0.07, 4)) for query in test.vectors]
        assert result.figures[f"top1_k{k}"].value == pytest.approx((plain == test.labels).mean())
    figures = result.figures.values()
    assert len({figure.value for figure in figures}) > 1  # k matters here
    assert all(figure.low < figure.value < figure.high for figure in figures)


def test_judged_by_the_k_that_was_said_whatever_is_best():
    train, test = clouds(300, apart=0.4), clouds(60, apart=0.4, seed=1)
    ks = ["k20", "k1", "k10", "k100", "k200"]
    assert list(knn(train, test).figures) == [f"top1_{k}" for k in ks] + [f"per_class_{k}" for k in ks]
    result = knn(train, test, ks=(20, 1), judged=1)
    assert list(result.figures) == ["top1_k1", "top1_k20", "per_class_k1", "per_class_k20"]
    assert result.parameters["judged_by"] == "top1_k1" and result.parameters["best_k"] == 20
    assert result.figures["top1_k20"].value > result.figures["top1_k1"].value


def nearest(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The class of the nearest row by cosine, by numpy in float64."""
    one, other = (rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1, keepdims=True) for rows in (bank, queries))
    return labels[(other @ one.T).argmax(1)]


def test_figures_while_training_agree_with_numpy():
    train, test = clouds(300, apart=0.4), clouds(60, apart=0.4, seed=1)
    sides = [torch.from_numpy(part) for part in (train.vectors, train.labels, test.vectors, test.labels)]
    figures = knn_figures(*sides, k=20, temperature=0.07)
    assert list(figures) == ["top1", "top1_k1", "mean_per_class"] and len({round(value, 6) for value in figures.values()}) == 3
    assert figures["top1_k1"] == pytest.approx((nearest(train.vectors, train.labels, test.vectors) == test.labels).mean())
    plain = np.array([np.argmax(votes(train.vectors, train.labels, query, 20, 0.07, 4)) for query in test.vectors])
    assert figures["top1"] == pytest.approx((plain == test.labels).mean())
    by_class = [(plain[test.labels == kind] == kind).mean() for kind in range(4)]
    assert figures["mean_per_class"] == pytest.approx(np.mean(by_class))
    found = knn(train, test, ks=(1, 20)).figures
    assert found["per_class_k20"].value == pytest.approx(np.mean(by_class))
    assert found["top1_k1"].value == pytest.approx(figures["top1_k1"])


def test_even_classes_have_no_mean_per_class():
    train, labels = clouds(80), np.arange(40) % 4
    test = Split(clouds(40, seed=1).vectors, labels, train.classes)
    sides = [torch.from_numpy(part) for part in (train.vectors, train.labels, test.vectors, labels)]
    assert list(knn_figures(*sides, k=5, temperature=0.07)) == ["top1", "top1_k1"]
    assert list(knn(train, test, ks=(5,)).figures) == ["top1_k5"]


@pytest.mark.parametrize(
    ("counts", "expected"), [([5, 5], False), ([4, 2], False), ([5, 2], True), ([0, 3, 3], False), ([1, 0, 9], True)]
)
def test_uneven_is_more_than_twice_as_many(counts, expected):
    assert uneven(np.repeat(np.arange(len(counts)), counts)) is expected


def test_chunks_change_nothing(monkeypatch):
    train, test = clouds(50), clouds(30, seed=1)
    arguments = train.vectors, train.labels, test.vectors
    whole = knn_votes(*arguments, ks=(3, 9), temperature=5.0)
    monkeypatch.setattr("massl_ray.evaluation.knn.VOTES", 350)
    parts = knn_votes(*arguments, ks=(3, 9), temperature=5.0)
    assert all((whole[k] == parts[k]).all() for k in (3, 9))


@pytest.mark.parametrize(
    "ks, train, sentence",
    [
        ((10, 200), clouds(50), "k = 200 asks for more neighbours than the 50 train images"),
        ((0,), clouds(50), "each k must be 1 or more"),
        ((), clouds(50), "got none"),
        ((5,), Split(clouds(50).vectors, None), "needs labels and the train set has none"),
    ],
)
def test_what_cannot_be(ks, train, sentence):
    with pytest.raises(UserError, match=sentence):
        knn(train, clouds(20), ks=ks)
