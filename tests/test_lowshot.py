"""Low-shot: against scikit-learn on the same draws, stratified and keyed draws, and what cannot be filled."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from massl_ray.errors import UserError
from massl_ray.evaluation.draws import Purpose, keyed, some_of_each
from massl_ray.evaluation.lowshot import lowshot
from massl_ray.evaluation.results import Split
from tests.splits import clouds

FEW = {"shares": (), "per_class": (5,), "draws": 3}


def test_agrees_with_scikit_learn_on_the_same_images():
    train, test = clouds(300, apart=0.6), clouds(400, apart=0.6, seed=1)
    result = lowshot(train, test, strengths=(1.0,), **FEW)
    scaler = StandardScaler().fit(train.vectors)
    expected = []
    for draw in range(3):
        chosen = some_of_each(train.labels, np.full(4, 5), keyed(Purpose.SUBSET, 0, 0, draw))
        assert np.bincount(train.labels[chosen]).tolist() == [5] * 4
        model = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(train.vectors[chosen]), train.labels[chosen])
        expected.append(model.score(scaler.transform(test.vectors), test.labels))
    assert result.parameters["settings"]["5_per_class"]["top1"] == pytest.approx(expected, abs=0.005)
    assert result.figures["top1_5_per_class"].value == pytest.approx(np.mean(expected), abs=0.005)
    assert len(set(expected)) > 1


def test_more_images_are_better_and_counted():
    train, test = clouds(1000, apart=0.5), clouds(300, apart=0.5, seed=1)
    result = lowshot(train, test, draws=3, per_class=(1, 10), strengths=(0.01, 1.0))
    settings = result.parameters["settings"]
    assert list(result.figures) == ["top1_1_percent", "top1_10_percent", "top1_1_per_class", "top1_10_per_class"]
    assert settings["1_per_class"]["images"] == 4 and settings["10_per_class"]["images"] == 40
    assert settings["10_percent"]["images"] == pytest.approx(100, abs=2)
    values = [figure.value for figure in result.figures.values()]
    assert values[2] < values[3] < values[1] and values[0] < values[1]
    assert all(figure.low < figure.value < figure.high for figure in result.figures.values())


def test_penalty_is_chosen_without_the_test_images():
    train, test = clouds(300, apart=0.4), clouds(100, apart=0.4, seed=1)
    other = Split(test.vectors, np.roll(test.labels, 1), test.classes)
    chosen = [
        lowshot(train, split, strengths=(0.01, 1.0), **FEW).parameters["settings"]["5_per_class"]["C"] for split in (test, other)
    ]
    assert chosen[0] == chosen[1]


def test_a_useless_penalty_is_not_chosen():
    train, test = clouds(300, apart=0.6), clouds(100, apart=0.6, seed=1)
    labels = np.where(np.arange(300) % 2, train.labels, 0)  # class 0 is the most frequent by far: a huge penalty predicts only it
    vectors = np.where(labels[:, None] == train.labels[:, None], train.vectors, train.vectors[:1])
    result = lowshot(Split(vectors, labels, train.classes), test, shares=(0.5,), per_class=(), draws=1, strengths=(1e-9, 0.1))
    assert result.parameters["settings"]["50_percent"]["C"] == 0.1


def test_skipped_with_a_reason():
    train = clouds(60)
    few = Split(train.vectors[:12], train.labels[:12], train.classes)
    result = lowshot(few, clouds(30, seed=1), draws=2, per_class=(1, 9))
    assert list(result.figures) == ["top1_1_per_class"]
    skipped = result.parameters["skipped"]
    assert "1 % of 12 images is less than one for each of 4 classes" in skipped["1_percent"]
    assert "fewer than 9" in skipped["9_per_class"]


def test_refused():
    with pytest.raises(UserError, match="no setting can be filled by 20 train images"):
        lowshot(clouds(20), clouds(20), shares=(0.01,), per_class=(20,))
    with pytest.raises(UserError, match="shares over 0"):
        lowshot(clouds(20), clouds(20), shares=(0.0,))
