"""What protocols refuse, and labels matched by name."""

import numpy as np
import pytest

from massl_ray.errors import UserError
from massl_ray.evaluation.checks import labelled
from massl_ray.evaluation.draws import Purpose, keyed, some_of_each
from massl_ray.evaluation.results import Split


def split(labels: list[int] | None, classes: tuple[str, ...] = (), dims: int = 3, fill: float = 1.0) -> Split:
    n = 4 if labels is None else len(labels)
    return Split(np.full((n, dims), fill, np.float32), None if labels is None else np.array(labels, dtype=np.int64), classes)


def test_labels_are_matched_by_name():
    both = labelled(split([0, 1, 2, 2], ("ant", "bee", "cat")), split([0, 1], ("cat", "ant")), "knn")
    assert both.classes == ("ant", "bee", "cat")
    assert both.train.tolist() == [0, 1, 2, 2] and both.test.tolist() == [2, 0]


def test_classes_without_images_do_not_count():
    both = labelled(split([0, 2], ("ant", "bee", "cat")), split([1], ("ant", "cat", "dog")), "knn")
    assert both.classes == ("ant", "cat") and both.test.tolist() == [1]


def test_numbers_do_for_names():
    both = labelled(split([0, 10, 2]), split([10]), "knn")
    assert both.classes == ("0", "2", "10") and both.test.tolist() == [2]


@pytest.mark.parametrize(
    "train, test, sentence",
    [
        (split([0, 1]), split(None), "knn needs labels and the test set has none"),
        (split([0, 1]), split([2, 3, 0]), "no images of 2 of the test set's 3 classes .2, 3."),
        (split([0, 0], ("ant", "bee")), split([0], ("ant",)), "all 2 train images are of class ant"),
        (split([0, 1]), split([0], dims=4), "different lengths, 3 and 4"),
        (split([0, 1]), split([]), "the test set has no readable image"),
        (split([0, 1], fill=np.nan), split([0]), "2 of 2 train features are not finite"),
        (split([0, 7], ("ant", "bee")), split([0]), "labels 0 to 7 and 2 classes"),
    ],
)
def test_refused(train, test, sentence):
    with pytest.raises(UserError, match=sentence):
        labelled(train, test, "knn")


def test_some_of_each_class():
    labels = np.array([0] * 50 + [1] * 5 + [2] * 20)
    chosen = some_of_each(labels, np.array([7, 9, 1]), keyed(Purpose.SUBSET, 0))
    assert np.bincount(labels[chosen]).tolist() == [7, 5, 1]
    assert (np.diff(chosen) > 0).all()
    other = some_of_each(labels, np.array([7, 9, 1]), keyed(Purpose.SUBSET, 0, 1))
    assert chosen.tolist() != other.tolist()
