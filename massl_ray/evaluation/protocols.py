"""The protocols by name."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from massl_ray.config.loading import nearest
from massl_ray.data.listing import Listing
from massl_ray.errors import UserError
from massl_ray.evaluation.checks import labelled
from massl_ray.evaluation.results import Result, Split


@dataclass(frozen=True)
class Protocol:
    """massl_ray.evaluation.NAME.NAME(train, test, *, ...) -> Result"""

    words: str  # what it does, for --help
    needs_labels: bool = True
    takes: tuple[str, ...] = ("seed",)  # options of the command that are its own

    def function(self, name: str) -> Callable[..., Result]:
        return getattr(importlib.import_module(f"massl_ray.evaluation.{name}"), name)


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol("k-nearest-neighbour classification by cosine similarity", takes=("ks", "temperature", "seed")),
    "linear": Protocol("a linear classifier on frozen features, its learning rate chosen on a held-out part of train"),
    "lowshot": Protocol("logistic regression on a few labelled images"),
    "retrieval": Protocol("images of the same class found again: mean average precision and recall"),
    "clustering": Protocol("k-means against the classes"),
    "quality": Protocol("spread and rank of the features, without labels", needs_labels=False),
}


def read_protocols(text: str) -> list[str]:
    """Names divided by commas, or 'all'; each once. Raises UserError, with the nearest, for one that there is not."""
    there_are = f"Protocols: {', '.join(PROTOCOLS)}, or all."
    names = list(PROTOCOLS) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PROTOCOLS:
            raise UserError(f"There is no protocol '{name}'{nearest(name, list(PROTOCOLS))}. {there_are}")
    if not names:
        raise UserError(f"--protocols names none. {there_are}")
    return list(dict.fromkeys(names))


def run_protocol(name: str, train: Split, test: Split, options: Mapping[str, Any]) -> Result:
    """With those of the options that the protocol takes. Raises UserError."""
    protocol = PROTOCOLS[name]
    return protocol.function(name)(train, test, **{key: value for key, value in options.items() if key in protocol.takes})


def check_labels(names: Sequence[str], train: Listing, test: Listing) -> None:
    """Before any feature is computed. Raises UserError where a protocol could not be run with these classes."""
    needing = [name for name in names if PROTOCOLS[name].needs_labels]
    if not needing:
        return
    for images in (train, test):
        if images.labels is None:
            others = ", ".join(name for name in PROTOCOLS if not PROTOCOLS[name].needs_labels)
            raise UserError(
                f"{needing[0]} needs labels, and {images.root} has none: put the images of each class in a folder of its own, or "
                f"choose a protocol that needs none ({others})."
            )
    splits = [Split(np.zeros((len(images), 1), np.float32), images.labels, images.classes) for images in (train, test)]
    labelled(*splits, needing[0])  # type: ignore[misc]


def check_neighbours(names: Sequence[str], ks: Sequence[int], train: Listing) -> None:
    if "knn" in names and max(ks) > len(train):
        fitting = ",".join(str(k) for k in ks if k <= len(train)) or str(len(train))
        raise UserError(
            f"knn: {max(ks)} neighbours are asked for, and {train.root} has {len(train)} train images. Try --ks {fitting}."
        )
