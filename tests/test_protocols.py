"""Which protocols there are, what they are given, and what is refused before any feature is computed."""

import numpy as np
import pytest

from massl_ray.data.sources import open_source
from massl_ray.errors import UserError
from massl_ray.evaluation.protocols import PROTOCOLS, check_labels, check_neighbours, read_protocols, run_protocol
from massl_ray.evaluation.results import Result, Split
from tests.images import write_images


def split(number: int) -> Split:
    """Three classes, each around its own axis."""
    labels = np.arange(number) % 3
    vectors = np.eye(3, 5, dtype=np.float32)[labels] + np.random.default_rng(number).normal(0, 0.02, (number, 5)).astype(np.float32)
    return Split(vectors, labels.astype(np.int64), ("a", "b", "c"), [f"{number}/{place}" for place in range(number)])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_is_there_and_sees_separate_classes(name):
    train, test = split(150), split(30)
    options = {"ks": [3, 10], "temperature": 0.07, "augment": 0, "views_of": lambda side, alteration: test, "seed": 1}
    if not PROTOCOLS[name].alike:  # one image of each class
        train = Split(train.vectors[:3], train.labels[:3], train.classes)
    result = run_protocol(name, train, test, options)
    assert isinstance(result, Result) and result.protocol == name
    first = next(iter(result.figures.values()))
    if PROTOCOLS[name].needs_labels:
        assert first.value == pytest.approx(1.0)
    assert result.parameters["seed"] == 1


def test_options_go_to_those_that_take_them():
    parameters = run_protocol("knn", split(60), split(30), {"ks": [4], "temperature": 0.5, "seed": 3, "other": 1}).parameters
    assert parameters["ks"] == [4] and parameters["temperature"] == 0.5 and parameters["seed"] == 3
    figures = run_protocol("retrieval", split(60), split(30), {"ks": [4], "seed": 3}).figures
    assert "recall_at_1" in figures and "recall_at_4" not in figures  # --ks is of knn


def test_names():
    assert read_protocols("linear, knn,linear") == ["linear", "knn"]
    assert read_protocols("all") == [name for name in PROTOCOLS if name != "copies"]
    with pytest.raises(UserError, match="There is no protocol 'lineer'; the nearest is 'linear'"):
        read_protocols("knn,lineer")
    with pytest.raises(UserError, match="names none"):
        read_protocols(",")


def test_labels(tmp_path):
    both = open_source(str(write_images(tmp_path / "three", 9)))
    plain = open_source(str(tmp_path / "three" / "spots"))
    check_labels(["knn"], both, both)
    check_labels(["quality"], plain, plain)
    with pytest.raises(UserError, match="knn needs labels, and .*spots has none: .*quality"):
        check_labels(["quality", "knn"], both, plain)
    lacking = both.take(np.flatnonzero(both.labels != 1))
    with pytest.raises(UserError, match=r"\(spots\).* train"):
        check_labels(["linear"], lacking, both)
    with pytest.raises(UserError, match="each original and each distractor needs a class alone"):
        check_labels(["copies"], both, both)
    check_labels(["copies"], both.take(np.unique(both.labels, return_index=True)[1]), both)
    with pytest.raises(UserError, match="copies needs labels"):
        check_labels(["copies"], plain, both)
    one = both.take(np.flatnonzero(both.labels == 0))
    with pytest.raises(UserError, match="two classes or more"):
        check_labels(["linear"], one, one)


def test_neighbours(tmp_path):
    images = open_source(str(write_images(tmp_path / "three", 12)))
    check_neighbours(["linear"], [200], images)
    with pytest.raises(UserError, match="200 neighbours are asked for, .* has 12 train images. Try --ks 10"):
        check_neighbours(["knn"], [10, 20, 200], images)
