"""Frozen features of a subject over a listing, computed once: kept by content on this machine."""

import hashlib
import inspect
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from massl_ray.config import DataSection
from massl_ray.data.decode import Decoding
from massl_ray.data.demo import cache_folder
from massl_ray.data.listing import Listing
from massl_ray.errors import UserError
from massl_ray.evaluation.features import decoded
from massl_ray.evaluation.results import Split
from massl_ray.evaluation.subjects import Subject

VERSION = 1  # of what features are; another one leaves the cache behind

Rows = tuple[np.ndarray, np.ndarray]  # places in the listing (n,) int64, and features (n, D) float32, of readable images
Compute = Callable[[Subject, Listing, Decoding], Iterator[tuple[int, Rows]]]  # parts in order, each with its number of images


def here(device: torch.device) -> Compute:
    """Computes on this machine."""

    def compute(subject: Subject, listing: Listing, how: Decoding) -> Iterator[tuple[int, Rows]]:
        moved, done = subject.to(device), 0
        for places, views in decoded(listing, subject.view, how):
            rows = moved.embedded(views.to(device)).cpu().numpy()
            end = int(places[-1]) + 1
            yield end - done, (places.numpy(), rows)
            done = end
        yield len(listing) - done, _none()

    return compute


def split_features(
    subject: Subject,
    listing: Listing,
    data: DataSection,
    compute: Compute,
    *,
    counted: Callable[[Iterator[int], int], Iterator[int]] = lambda amounts, total: amounts,
    fresh: bool = False,
    keep: bool = True,
) -> tuple[Split, list[str]]:
    """Features of every readable image, and the paths of the others. They are read from this machine's cache if it has them.

    Args:
        counted: shows how far it is; takes amounts of images and their total.
        fresh: compute them anew.
        keep: in that cache.

    Raises:
        UserError: none of the images can be read.
    """
    how = Decoding(data.max_pixels, subject.channels, data.white)
    path = cache_folder() / "features" / f"{features_key(subject, listing, how)}.npz"
    rows = None if fresh else _kept(path)
    if rows is None:
        rows = _computed(subject, listing, how, compute, counted)
        if keep and len(rows[0]):
            _keep(path, rows)
    places, vectors = rows
    if not len(places):
        raise UserError(f"None of the {len(listing):,} images of {listing.root} can be read as {subject.channels} channels.")
    bad = sorted(set(range(len(listing))) - set(places.tolist()))
    labels = None if listing.labels is None else listing.labels[places]
    paths = [listing.path(int(place)) for place in places]
    return Split(vectors, labels, listing.classes, paths), [listing.path(place) for place in bad]


def features_key(subject: Subject, listing: Listing, how: Decoding) -> str:
    """What features depend on, as one hash: tensors and code of the backbone, view, decoding, and the images: their names and, of
    files on this machine, sizes and times of change."""
    from massl_ray.method.resampling import resizer

    depends: dict[str, Any] = {
        "version": VERSION,
        "backbone": subject.sha256,
        "code": hashlib.sha256(f"{subject.backbone}{_source(subject)}".encode()).hexdigest(),
        "view": subject.settings,
        "resizer": resizer(),
        "decoding": asdict(how),
        "images": listing.identity() | {"root": listing.root, "files": _files_hash(listing)},
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _source(subject: Subject) -> str:
    """Of a foreign model: the file of its class."""
    if "python" not in subject.facts:
        return ""
    try:
        return Path(inspect.getfile(type(next(subject.backbone.children())))).read_text()
    except (OSError, TypeError, StopIteration):
        return uuid.uuid4().hex  # nobody can tell whether it is the same


def _files_hash(listing: Listing) -> str:
    digest, seen = hashlib.sha256(), set()
    for sample in range(len(listing)):
        path = listing.path(sample)
        path = path if "://" in path or os.path.exists(path) else listing.root
        if path not in seen:
            seen.add(path)
            try:
                status = os.stat(path)
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:  # elsewhere: the names have to do
                pass
    return digest.hexdigest()


def _computed(
    subject: Subject,
    listing: Listing,
    how: Decoding,
    compute: Compute,
    counted: Callable[[Iterator[int], int], Iterator[int]],
) -> Rows:
    parts: list[Rows] = []

    def amounts() -> Iterator[int]:
        for amount, rows in compute(subject, listing, how):
            parts.append(rows)
            yield amount

    for _ in counted(amounts(), len(listing)):
        pass
    filled = [rows for rows in parts if len(rows[0])] or [_none()]
    return np.concatenate([places for places, _ in filled]), np.concatenate([vectors for _, vectors in filled])


def _none() -> Rows:
    return np.empty(0, np.int64), np.empty((0, 0), np.float32)


def _kept(path: Path) -> Rows | None:
    try:
        with np.load(path, allow_pickle=False) as found:
            return found["places"], found["vectors"]
    except FileNotFoundError:
        return None
    except Exception:  # damaged: zip and numpy raise what they like
        path.unlink(missing_ok=True)
        return None


def _keep(path: Path, rows: Rows) -> None:
    """Aside, then renamed. What cannot be kept is computed again next time."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(aside, places=rows[0], vectors=rows[1])
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
