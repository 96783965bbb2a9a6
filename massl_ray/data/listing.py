"""A source as training sees it: images in one fixed order, read by number, whatever they lie in."""

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from massl_ray.data.order import Windows
from massl_ray.shown import redacted
from massl_ray.storage import Folder


class Store(Protocol):
    """What images lie in. A plain value: sent to tasks pickled, so it holds no open files and is small beside the images."""

    @property
    def root(self) -> str:
        """Where it is, for people."""
        ...

    @property
    def starts(self) -> np.ndarray | None:
        """(shards + 1,) int64: places at which files, or what else is best read together, begin, and the number of places. None
        where every image is a file."""
        ...

    def __len__(self) -> int: ...

    def name(self, place: int) -> str:
        """Which image lies there, the same in any copy of the store: part of a run's identity."""
        ...

    def path(self, place: int) -> str:
        """Where a person finds it."""
        ...

    def read(self, place: int) -> bytes:
        """The encoded image. Raises what it likes where it is gone or broken."""
        ...


@dataclass(frozen=True)
class Parts:
    """What the stores have in common whose images lie together in parts."""

    folder: Folder
    starts: np.ndarray  # (parts + 1,) int64, places of their first images, and the number of images

    @property
    def root(self) -> str:
        return str(self.folder).partition("?")[0]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find(self, place: int) -> tuple[int, int]:
        """The part that holds an image, and its number there."""
        part = int(np.searchsorted(self.starts, place, "right")) - 1
        return part, place - int(self.starts[part])


@dataclass(frozen=True)
class Listing:
    """Images in a fixed order; a sample's number is its place here."""

    store: Store
    labels: np.ndarray | None = None  # (n,) int64 into classes
    classes: tuple[str, ...] = ()
    places: np.ndarray | None = None  # (n,) int64 into the store; None: all of it, in its order
    windows: Windows | None = None  # in which training shuffles; None: all at once
    mean: tuple[float, ...] = ()  # of the channels, in 0..1, where they were measured
    std: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.store) if self.places is None else len(self.places)

    @property
    def root(self) -> str:
        return self.store.root

    def name(self, sample: int) -> str:
        return self.store.name(self._place(sample))

    def path(self, sample: int) -> str:
        return self.store.path(self._place(sample))

    def identity(self) -> dict[str, object]:
        """Which image comes when depends on their number and order, so these are part of a run."""
        digest = hashlib.sha256()
        for sample in range(len(self)):
            digest.update(os.fsencode(self.name(sample)) + b"\0")
        return {"count": len(self), "names_sha256": digest.hexdigest()}

    def read(self, sample: int) -> bytes:
        """The encoded image. Raises OSError or ValueError where it cannot be had."""
        try:
            return self.store.read(self._place(sample))
        except (OSError, ValueError, MemoryError):
            raise
        except Exception as error:  # Arrow and file systems raise what they like
            raise OSError(f"{type(error).__name__}: {error}") from error

    def take(self, samples: np.ndarray) -> "Listing":
        places = samples if self.places is None else self.places[samples]
        return Listing(self.store, None if self.labels is None else self.labels[samples], self.classes, places)

    def _place(self, sample: int) -> int:
        return int(sample if self.places is None else self.places[sample])


def labelled(store: Store, labels: Iterable[Any] | None) -> Listing:
    """A listing whose classes are the labels there are, numbers in order of size and then words of the alphabet. A label may be
    of any type; None among them, or fewer than two classes, leave the listing without labels."""
    if labels is None:
        return Listing(store)
    number: dict[Any, int] = {}
    numbers = np.fromiter((number.setdefault(label, len(number)) for label in labels), np.int64)
    if None in number or len(number) < 2:
        return Listing(store)
    ordered = sorted(number, key=_numbers_first)
    rank = np.empty(len(ordered), np.int64)
    rank[[number[label] for label in ordered]] = np.arange(len(ordered))
    return Listing(store, rank[numbers], tuple(map(str, ordered)))


def _numbers_first(label: Any) -> tuple[int, int, str]:
    text = str(label)
    return (0, int(text), text) if re.fullmatch(r"-?[0-9]{1,18}", text) else (1, 0, text)


def joined(root: str, name: str) -> str:
    """A name below a folder, for people; one that is a whole path or URI of its own as it is, but for its secrets."""
    return redacted(name) if "://" in name else os.path.join(root.partition("?")[0] if "://" in root else root, name)


class Recent:
    """What was made last, up to a number of bytes and at least one. Pickles empty: every process fills its own."""

    def __init__(self, limit: int):
        self.limit = limit
        self.held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()  # values and their bytes
        self.size = 0
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self.limit,)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned for `key`: something with `nbytes`."""
        with self.lock:
            if key not in self.held:
                value = make()
                self.held[key] = value, value.nbytes
                self.size += value.nbytes
                while self.size > self.limit and len(self.held) > 1:
                    self.size -= self.held.popitem(last=False)[1][1]
            self.held.move_to_end(key)
            return self.held[key][0]
