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
from massl_ray.evaluation.retrieval import originals


@dataclass(frozen=True)
class Protocol:
    """massl_ray.evaluation.MODULE.NAME(train, test, *, ...) -> Result; the module has its name, if not another."""

    words: str  # what it does, for --help
    takes: tuple[str, ...] = ("seed",)  # of the options, those that it has a use for
    module: str = ""
    needs_labels: bool = True
    alike: bool = True  # train and test have the same classes, each with several images
    usual: bool = True  # one of 'all'

    def function(self, name: str) -> Callable[..., Result]:
        return getattr(importlib.import_module(f"massl_ray.evaluation.{self.module or name}"), name)


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol("k-nearest-neighbour classification by cosine similarity", ("seed", "ks", "temperature")),
    "linear": Protocol("a linear classifier, its learning rate chosen on a part of train", ("seed", "augment", "views_of")),
    "lowshot": Protocol("logistic regression on a few labelled images"),
    "retrieval": Protocol("images of the same class found again: mean average precision and recall"),
    "copies": Protocol("altered copies and their originals", module="retrieval", alike=False, usual=False),
    "clustering": Protocol("k-means against the classes"),
    "robustness": Protocol("a linear classifier under corruptions of the test images", ("seed", "views_of")),
    "quality": Protocol("spread and rank of the features, without labels", ("seed", "views_of"), needs_labels=False),
}


SINGLES = "give a list of paths, each with its original's name after a tab"  # folders of one image each are no classes


def read_protocols(text: str) -> list[str]:
    """Names divided by commas, or 'all'; each once. Raises UserError, with the nearest, for one that there is not."""
    there_are = f"Protocols: {', '.join(PROTOCOLS)}, or all."
    usual = [name for name, protocol in PROTOCOLS.items() if protocol.usual]
    names = usual if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
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
            how = "put the images of each class in a folder of its own" if PROTOCOLS[needing[0]].alike else SINGLES
            raise UserError(
                f"{needing[0]} needs labels, and {images.root} has none: {how}, or choose a protocol that needs none ({others})."
            )
    one, other = (Split(np.zeros((len(images), 1), np.float32), images.labels, images.classes) for images in (train, test))
    for name in needing:
        if PROTOCOLS[name].alike:
            labelled(one, other, name)
        else:
            originals(one, other)


def check_neighbours(names: Sequence[str], ks: Sequence[int], train: Listing) -> None:
    if "knn" in names and max(ks) > len(train):
        fitting = ",".join(str(k) for k in ks if k <= len(train)) or str(len(train))
        raise UserError(
            f"knn: {max(ks)} neighbours are asked for, and {train.root} has {len(train)} train images. Try --ks {fitting}."
        )
