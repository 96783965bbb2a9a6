"""The revisited Oxford and Paris protocol: easy, medium and hard, with junk (Radenovic et al., CVPR 2018)."""

import io
import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from massl_ray.errors import UserError
from massl_ray.evaluation.bootstrap import INTERVAL, mean_figure
from massl_ray.evaluation.checks import unit
from massl_ray.evaluation.ranking import precision_at, ranked, trapezoid_precision
from massl_ray.evaluation.results import Figure, Result
from massl_ray.storage import Folder, reason

SETUPS = {  # what is relevant and what counts neither way
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
    "easy": (("easy",), ("junk", "hard")),
}
LARGEST = 64 * 2**20  # bytes of a ground-truth file; Oxford's and Paris's have less than 1 MB


@dataclass(frozen=True)
class GroundTruth:
    gallery: Sequence[str]  # image names, without extension
    queries: Sequence[str]
    relevance: Sequence[dict[str, np.ndarray]]  # of each query: places in the gallery, (j,) int64, under easy, hard and junk
    boxes: Sequence[Sequence[float] | None] = ()  # of each query: left, top, right, bottom, in pixels; it is cropped to it


def revisited(
    gallery: np.ndarray, queries: np.ndarray, truth: GroundTruth, *, ks: Sequence[int] = (1, 5, 10), seed: int = 0
) -> Result:
    """Mean average precision (trapezoids) and mean precision@k for gallery (m, D) and query (n, D) vectors in the order of the
    ground truth. A query without relevant images in a setup counts not in it. Judged by the medium setup."""
    for name, rows, names in (("gallery", gallery, truth.gallery), ("query", queries, truth.queries)):
        if len(rows) != len(names):
            raise UserError(f"revisited: {len(rows)} {name} vectors for the {len(names)} {name} images of the ground truth")
    scores: dict[str, list[float]] = {
        f"{figure}_{setup}": [] for figure in ("map", *(f"mp_at_{k}" for k in ks)) for setup in SETUPS
    }
    for part, orders in ranked(unit(queries), unit(gallery)):
        for order, known in zip(orders, truth.relevance[part], strict=True):
            for setup, (wanted, ignored) in SETUPS.items():
                relevant, junk = (np.isin(order, np.concatenate([known[kind] for kind in kinds])) for kinds in (wanted, ignored))
                scores[f"map_{setup}"].append(trapezoid_precision(relevant, junk))
                for k in ks:
                    scores[f"mp_at_{k}_{setup}"].append(precision_at(relevant, k, junk))
    figures: dict[str, Figure] = {}
    for name, values in scores.items():
        asked = np.array(values)[~np.isnan(values)]
        if len(asked):
            figures[name] = mean_figure(asked, seed=seed)
    if not figures:
        raise UserError("revisited: no query of the ground truth has a relevant image")
    parameters: dict[str, Any] = {
        "mode": "revisited Oxford/Paris",
        "setups": {setup: {"relevant": list(wanted), "junk": list(ignored)} for setup, (wanted, ignored) in SETUPS.items()},
        "average_precision": "trapezoids under the precision-recall curve, junk taken out of the ranking",
        "ks": list(ks),
        "similarity": "cosine",
        "gallery_images": len(gallery),
        "queries": len(queries),
        "queries_of_setup": {setup: int((~np.isnan(scores[f"map_{setup}"])).sum()) for setup in SETUPS},
        "seed": seed,
        "interval": INTERVAL,
    }
    return Result("revisited", figures, parameters)


def read_ground_truth(path: str | Path | Folder) -> GroundTruth:
    """Of `gnd_roxford5k.pkl`, `gnd_rparis6k.pkl` or a JSON file of the same content, here or at a URI: `imlist`, `qimlist` and
    `gnd`, a list of {easy, hard, junk, bbx}. The pickle is read without running anything in it: see `_Plain`."""
    try:
        data = Folder(path).read_bytes(size=LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if len(data) > LARGEST:
        raise UserError(f"{path} has more than {LARGEST // 2**20} MB, too much for a ground-truth file")
    try:
        content = json.loads(data) if data.lstrip()[:1] == b"{" else _Plain(io.BytesIO(data), encoding="latin1").load()
        return _ground_truth(content)
    except Exception as error:  # whatever unpickling makes of broken files
        raise UserError(
            f"{path} is no ground truth of the revisited Oxford/Paris benchmark ({type(error).__name__}: {error}); "
            f"give gnd_roxford5k.pkl, gnd_rparis6k.pkl or the same as JSON"
        ) from None


def _ground_truth(content: Any) -> GroundTruth:
    gallery, queries = [str(name) for name in content["imlist"]], [str(name) for name in content["qimlist"]]
    relevance = []
    for entry in content["gnd"]:
        known = {kind: _places(entry[kind]) for kind in ("easy", "hard", "junk")}
        if any(len(places) and not 0 <= places.min() <= places.max() < len(gallery) for places in known.values()):
            raise ValueError(f"places beyond the {len(gallery)} images of imlist")
        relevance.append(known)
    if len(relevance) != len(queries):
        raise ValueError(f"{len(queries)} queries and {len(relevance)} entries of gnd")
    boxes = [None if entry.get("bbx") is None else _box(entry["bbx"]) for entry in content["gnd"]]
    return GroundTruth(gallery, queries, relevance, boxes)


def _box(values: Any) -> list[float]:
    sides = [float(side) for side in _list(values)]
    if len(sides) != 4 or not all(map(math.isfinite, sides)):
        raise ValueError("a box has to be four numbers: left, top, right, bottom")
    return sides


def _list(values: Any) -> list[Any]:
    return values.values() if isinstance(values, _Array) else list(values)


def _places(values: Any) -> np.ndarray:
    found = np.array(_list(values))
    if found.size and not (found == found.astype(np.int64)).all():
        raise ValueError("places have to be whole numbers")
    return found.astype(np.int64).reshape(-1)


class _Kind:
    """Stands for a numpy dtype: a name, and a byte order that comes afterwards."""

    KNOWN = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8")

    def __init__(self, name: str, *_: Any):
        if name not in self.KNOWN:
            raise pickle.UnpicklingError(f"arrays of {name}")
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.name)


class _Array:
    """Stands for a numpy array: its bytes, read as plain numbers."""

    def __init__(self, *_: Any):
        self.kind, self.data = _Kind("f8"), b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, _, self.kind, _, data = state
        self.data = data.encode("latin1") if isinstance(data, str) else data

    def values(self) -> list[Any]:
        return np.frombuffer(self.data, self.kind.dtype).tolist()


def _from_buffer(data: bytes, kind: _Kind, *_: Any) -> _Array:
    array = _Array()
    array.kind, array.data = kind, bytes(data)
    return array


def _scalar(kind: _Kind, data: bytes | str) -> Any:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, kind.dtype)[0].item()


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding}")
    return text.encode("latin1")


def _nothing() -> bytes:
    return b""


class _Plain(pickle.Unpickler):
    """Containers, strings and numbers only. A pickle names functions to call; here the few names that arrays of numbers need
    lead to this module's own stand-ins, which keep bytes and read them as numbers, and any other name is refused. So nothing
    outside this module is called, numpy's own unpickling included."""

    STANDS = {"_reconstruct": _Array, "ndarray": _Array, "dtype": _Kind, "scalar": _scalar, "_frombuffer": _from_buffer}
    MODULES = ("numpy", *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray", "numeric")))

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name in self.MODULES and global_name in self.STANDS:
            return self.STANDS[global_name]
        if (module_name, global_name) == ("_codecs", "encode"):
            return _encoded
        if module_name in ("builtins", "__builtin__") and global_name == "bytes":
            return _nothing  # no bytes at all; others come encoded
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which is not needed for lists of images")
