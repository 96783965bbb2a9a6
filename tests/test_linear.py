"""The linear probe: against scikit-learn's logistic regression, against its own gradient, and what chooses the rate."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

from massl_ray.errors import UserError
from massl_ray.evaluation.alterations import RandomCrop
from massl_ray.evaluation.draws import Purpose, keyed
from massl_ray.evaluation.linear import RATES, Heads, Schedule, _scores, fit_heads, held_out, linear
from massl_ray.evaluation.results import Split
from tests.splits import clouds

SHORT = {"epochs": 1, "rates": (0.001, 0.01, 0.1)}


def test_as_good_as_logistic_regression():
    train, test = clouds(1500, apart=0.5), clouds(1500, apart=0.5, seed=1)
    result = linear(train, test, epochs=20)
    reference = LogisticRegression(max_iter=1000).fit(train.vectors, train.labels).score(test.vectors, test.labels)
    assert 0.5 < reference < 0.95
    assert result.figures["top1"].value == pytest.approx(reference, abs=0.005)
    assert result.figures["top1"].low < result.figures["top1"].value < result.figures["top1"].high
    assert len(result.parameters["held_out_top1"]) == len(RATES) == 13


def test_steps_are_those_of_a_plain_optimizer():
    """Two heads in two steps against torch.optim.SGD and autograd, one head after the other."""
    split = clouds(40, classes=3)
    rows, labels = torch.from_numpy(split.vectors), torch.from_numpy(split.labels)
    heads = fit_heads(rows[None], labels, [0.3, 0.05], 3, Schedule(epochs=2, batch=40, min_steps=2), seed=0)
    x = (rows - rows.mean(0)) / rows.std(0, correction=0)
    for head, rate in enumerate((0.3, 0.05)):
        plain = torch.nn.Linear(16, 3)
        torch.nn.init.zeros_(plain.weight), torch.nn.init.zeros_(plain.bias)
        optimizer = torch.optim.SGD(plain.parameters(), lr=rate, momentum=0.9)
        for share in (1.0, 0.5):  # cosine: 1 at the start, 1/2 halfway
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.zero_grad()
            cross_entropy(plain(x), labels).backward()
            optimizer.step()
        torch.testing.assert_close(heads.logits(rows)[:, head], plain(x), atol=1e-4, rtol=1e-4)


def test_units_of_features_do_not_count():
    train, test = clouds(200, apart=0.5), clouds(200, apart=0.5, seed=1)
    units = np.geomspace(1e-3, 1e3, 16).astype(np.float32)
    scaled = [Split(split.vectors * units + 5 * units, split.labels, split.classes) for split in (train, test)]
    assert linear(*scaled, **SHORT).figures["top1"].value == pytest.approx(
        linear(train, test, **SHORT).figures["top1"].value, abs=0.011
    )


def test_constant_features_are_left_out():
    train, test = clouds(200), clouds(100, seed=1)
    wider = [
        Split(np.concatenate([split.vectors, np.full((len(split), 1), value, np.float32)], axis=1), split.labels, split.classes)
        for split, value in ((train, 7.0), (test, 1e6))
    ]
    assert linear(*wider, **SHORT).figures == linear(train, test, **SHORT).figures


def test_test_labels_choose_nothing():
    train, test = clouds(300, apart=0.4), clouds(100, apart=0.4, seed=1)
    shuffled = Split(test.vectors, np.roll(test.labels, 1), test.classes)
    first, second = linear(train, test, **SHORT), linear(train, shuffled, **SHORT)
    assert first.parameters == second.parameters
    assert first.figures["top1"].value > second.figures["top1"].value + 0.1


def test_a_rate_that_runs_away_is_not_chosen():
    result = linear(clouds(200), clouds(100, seed=1), epochs=1, rates=(0.01, 1e38))
    assert result.parameters["rate"] == 0.01
    assert result.figures["top1"].value > 0.8


def test_a_head_of_no_numbers_is_the_worst_even_where_class_0_is_right():
    bias = torch.tensor([[torch.nan, torch.nan], [0.0, 1.0]])
    heads = Heads(torch.zeros(3, 2, 2), bias, torch.zeros(3), torch.ones(3))
    lost, wrong = _scores(heads, torch.ones(5, 3), torch.zeros(5, dtype=torch.long))
    assert heads.logits(torch.ones(5, 3))[:, 0].argmax(1).tolist() == [0] * 5
    assert lost < wrong < (1.0, 0.0)


def test_keyed_and_without_the_last_fit():
    train, test = clouds(200, apart=0.4), clouds(100, apart=0.4, seed=1)
    assert linear(train, test, **SHORT) == linear(train, test, **SHORT)
    assert linear(train, test, refit=False, **SHORT).parameters["refit"] is False


def test_a_tenth_of_each_class_is_held_out():
    labels = np.repeat([0, 1, 2, 3], [100, 30, 2, 1])
    assert np.bincount(labels[held_out(labels, 0)], minlength=4).tolist() == [10, 3, 1, 0]
    assert held_out(labels, 0).tolist() != held_out(labels, 1).tolist()


def test_refused():
    with pytest.raises(UserError, match="every class has one train image"):
        linear(clouds(4), clouds(20, seed=1))
    with pytest.raises(UserError, match="learning rates must be over 0"):
        linear(clouds(20), clouds(20), rates=(0.0,))


def test_random_crops_are_trained_on_instead_of_centred_views():
    """Centred views of train tell nothing of the classes; crops do, each of them a little."""
    train, test = clouds(400, apart=0.8), clouds(200, apart=0.8, seed=1)
    plain = linear(train, test, epochs=20).figures["top1"].value
    random = np.random.default_rng(5)
    blank = Split(random.normal(size=train.vectors.shape).astype(np.float32), train.labels, train.classes)
    asked = []

    def views_of(side, alteration):
        asked.append((side, alteration))
        noise = np.random.default_rng(alteration.number).normal(size=train.vectors.shape)
        return Split((train.vectors + noise).astype(np.float32), train.labels, train.classes)

    result = linear(blank, test, epochs=20, augment=3, views_of=views_of, seed=7)
    assert asked == [("train", RandomCrop(number, 7)) for number in range(3)]
    assert result.figures["top1"].value > plain - 0.1 > linear(blank, test, epochs=20).figures["top1"].value + 0.2
    assert result.parameters["augmentation"] == "3 random crops of each image"


def test_an_epoch_takes_any_one_view_of_each_image():
    """One step on all images: the gradient is of the views that were drawn, each image's own."""
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 50, 4)).astype(np.float32))
    labels = torch.arange(50) % 2
    heads = fit_heads(rows, labels, [0.1], 2, Schedule(epochs=1, batch=50, min_steps=1), seed=2)
    random = keyed(Purpose.EPOCH, 2, 0)
    random.permutation(50)
    view = random.integers(3, size=50)
    assert {*view} == {0, 1, 2}
    chosen = ((rows - rows.mean((0, 1))) / rows.std((0, 1), correction=0))[torch.from_numpy(view), torch.arange(50)]
    truth = torch.nn.functional.one_hot(labels, 2).float()
    torch.testing.assert_close(heads.weight[:, 0], 0.1 * chosen.T @ (truth - 0.5) / 50, atol=1e-6, rtol=1e-5)
