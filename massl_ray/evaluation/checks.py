"""What protocols need of features and labels; what is missing is the user's to mend."""

from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from massl_ray.errors import UserError
from massl_ray.evaluation.results import Split


@dataclass(frozen=True)
class Labelled:
    """Train and test labels that mean the same: places in `classes`, the classes that train or test has images of."""

    train: np.ndarray  # (m,) int64
    test: np.ndarray  # (n,) int64
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def finite(split: Split, name: str, protocol: str) -> None:
    """At least one image, and numbers that are numbers."""
    if len(split) == 0:
        raise UserError(f"{protocol}: the {name} set has no readable image")
    bad = np.flatnonzero(~np.isfinite(split.vectors).all(axis=1))
    if len(bad):
        where = f", the first one of {split.paths[bad[0]]}" if len(split.paths) == len(split) else ""
        raise UserError(f"{protocol}: {len(bad)} of {len(split)} {name} features are not finite{where}; the weights may be damaged")


def same_width(train: Split, test: Split, protocol: str) -> None:
    finite(train, "train", protocol)
    finite(test, "test", protocol)
    if train.vectors.shape[1] != test.vectors.shape[1]:
        widths = f"{train.vectors.shape[1]} and {test.vectors.shape[1]}"
        raise UserError(f"{protocol}: train and test features have different lengths, {widths}; both must be from one model")


def names_of(split: Split, name: str, protocol: str) -> np.ndarray:
    """The class name of each image (n,)."""
    if split.labels is None:
        raise UserError(
            f"{protocol} needs labels and the {name} set has none; give a source with labels, "
            f"such as a folder with one folder for each class"
        )
    labels = np.asarray(split.labels)
    classes = np.array(split.classes or [str(label) for label in range(int(labels.max(initial=-1)) + 1)], dtype=object)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(f"{protocol}: the {name} set has the labels {labels.min()} to {labels.max()} and {len(classes)} classes")
    return classes[labels]


def labelled(train: Split, test: Split, protocol: str) -> Labelled:
    """Labels of both sets by class name, so that two sources may number their classes differently."""
    same_width(train, test, protocol)
    train_names, test_names = names_of(train, "train", protocol), names_of(test, "test", protocol)
    known = list(dict.fromkeys(train.classes)) or sorted(set(train_names), key=int)
    here = set(train_names)
    classes = tuple(name for name in known if name in here)
    lacking = sorted(set(test_names) - here)
    if lacking:
        shown = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        raise UserError(
            f"{protocol}: the train set has no images of {len(lacking)} of the test set's {len(set(test_names))} classes "
            f"({shown}); test on classes that train has"
        )
    if len(classes) < 2:
        raise UserError(f"{protocol} needs two classes or more, and all {len(train)} train images are of class {train_names[0]}")
    place = {name: index for index, name in enumerate(classes)}
    return Labelled(
        np.array([place[name] for name in train_names], dtype=np.int64),
        np.array([place[name] for name in test_names], dtype=np.int64),
        classes,
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, D) float32 rows of length 1; rows of zeros stay."""
    rows = np.asarray(vectors, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def calm(numbers: int) -> threadpool_limits:
    """One thread for scikit-learn where there is little to compute: more wait for each other, many times as long."""
    return threadpool_limits(1 if numbers < 2**20 else None)
