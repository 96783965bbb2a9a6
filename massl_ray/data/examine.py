"""A look at every image before training: which are broken, tiny, of one colour, or there twice, and how large they all are."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image

from massl_ray.data.bands import NUMPY, TIFF
from massl_ray.data.decode import PLAIN, UNREADABLE, Decoding, Encoded, reason
from massl_ray.data.listing import Listing
from massl_ray.shown import in_a_line

TINY = 32  # pixels: images with a shorter side below it have little to show
SHOWN = 5  # names of each kind, for people

LOOK = pa.schema(
    {
        "sample": pa.int64(),
        "path": pa.string(),
        "error": pa.string(),  # null: it can be read; otherwise what follows is null
        "size": pa.int64(),  # bytes
        "sha256": pa.binary(32),
        "format": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "constant": pa.bool_(),  # all pixels are alike
        "mean": pa.list_(pa.float64()),  # of the channels, in 0..1
        "square": pa.list_(pa.float64()),  # mean of the squares
    }
)
"""What a look at an image finds."""


@dataclass(frozen=True)
class Report:
    """What is in a source. Lists are complete; paths are as people find them."""

    source: str
    images: int
    broken: list[dict[str, str]]  # path, reason
    bytes: int
    formats: dict[str, int]
    shorter_side: dict[str, int]  # smallest, median, largest, in pixels
    longer_side: dict[str, int]
    tiny: list[str]
    constant: list[str]
    duplicates: list[list[str]]  # groups of files with the same bytes
    labels: dict[str, int] | None
    mean: list[float] | None  # of the channels, every image counting alike
    std: list[float] | None


def look(images: Listing, sample: int, how: Decoding = PLAIN) -> tuple[dict[str, Any], bytes, np.ndarray | None]:
    """What there is to know of an image as a row of LOOK, with its bytes and pixels (h, w, channels); without them where it cannot
    be read."""
    path = images.path(sample).encode(errors="backslashreplace").decode()
    try:
        data = images.read(sample)
        pixels, _ = Encoded(data, how).pixels()
    except UNREADABLE as error:
        return {"sample": sample, "path": path, "error": reason(error)}, b"", None
    height, width, _ = pixels.shape
    counts = [cv2.calcHist([pixels], [channel], None, [256], [0, 256]).ravel() for channel in range(how.channels)]
    shares = np.array(counts, dtype=np.float64) / (width * height)
    values = np.arange(256) / 255
    row = {
        "sample": sample,
        "path": path,
        "size": len(data),
        "sha256": hashlib.sha256(data).digest(),
        "format": file_format(data),
        "width": width,
        "height": height,
        "constant": bool((shares.max(axis=1) == 1).all()),
        "mean": shares @ values,
        "square": shares @ values**2,
    }
    return row, data, pixels


def look_at_all(images: Listing, threads: int, how: Decoding = PLAIN) -> Iterator[dict[str, Any]]:
    """Rows of LOOK in the order of the listing, decoded by a few threads."""
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(images), 256):
            samples = range(first, min(first + 256, len(images)))
            yield from pool.map(lambda sample: look(images, sample, how)[0], samples)


def to_table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), LOOK)


def report(images: Listing, looks: pa.Table) -> Report:
    """What all looks together say."""
    good = looks.filter(looks["error"].is_null())
    bad = looks.filter(looks["error"].is_valid())
    sides = np.sort(np.stack([good["width"].to_numpy(), good["height"].to_numpy()]), axis=0)
    mean = std = None
    if len(good):
        mean, square = (_rows(good[name]).mean(axis=0) for name in ("mean", "square"))
        std = np.sqrt(np.maximum(square - mean**2, 0))
    return Report(
        source=images.root,
        images=len(looks),
        broken=[{"path": path, "reason": why} for path, why in zip(bad["path"].to_pylist(), bad["error"].to_pylist(), strict=True)],
        bytes=int(good["size"].to_numpy().sum()),
        formats=_counts(good["format"].to_pylist()),
        shorter_side=_spread(sides[0]),
        longer_side=_spread(sides[1]),
        tiny=good.filter(pa.array(sides[0] < TINY))["path"].to_pylist(),
        constant=good.filter(good["constant"])["path"].to_pylist(),
        duplicates=_duplicates(good),
        labels=_label_counts(images, looks),
        mean=None if mean is None else mean.round(4).tolist(),
        std=None if std is None else std.round(4).tolist(),
    )


def describe(found: Report) -> str:
    """For people, the worst last."""
    lines = [f"Images    {found.images:,} in {found.source}, {found.bytes / 1e6:,.1f} MB"]
    if found.formats:
        lines.append(f"Formats   {', '.join(f'{name} {count:,}' for name, count in found.formats.items())}")
        shorter, longer = (
            f"{side['smallest']:,} to {side['largest']:,} px, half under {side['median']:,}"
            for side in (found.shorter_side, found.longer_side)
        )
        lines += [f"Sides     shorter {shorter}; longer {longer}"]
    if found.labels:
        fewest, most = min(found.labels.values()), max(found.labels.values())
        lines.append(f"Labels    {len(found.labels):,} classes of {fewest:,} to {most:,} images")
    if found.mean and found.std:
        lines.append(f"Channels  --data.mean {','.join(map(str, found.mean))} --data.std {','.join(map(str, found.std))}")
    extra = sum(len(group) - 1 for group in found.duplicates)
    lines += _named("Twice", extra, "copies of others", [" = ".join(group[:2]) for group in found.duplicates])
    lines += _named("Tiny", len(found.tiny), f"with a side under {TINY} px", found.tiny)
    lines += _named("Constant", len(found.constant), "of one colour", found.constant)
    lines += _named("Broken", len(found.broken), "cannot be read", [f"{each['path']}: {each['reason']}" for each in found.broken])
    return "\n".join(lines)


def file_format(data: bytes) -> str:
    """As Pillow calls it: JPEG, PNG, ... Of bytes that can be decoded."""
    if data.startswith(NUMPY):
        return "NumPy"
    if data.startswith(TIFF):
        return "TIFF"
    with Image.open(io.BytesIO(data)) as image:
        return image.format or "unknown"


def _named(kind: str, count: int, what: str, names: list[str]) -> list[str]:
    if not count:
        return []
    more = [f"          ... {len(names) - SHOWN:,} more"] if len(names) > SHOWN else []
    return [f"{kind:<10}{count:,} {what}", *(f"          {in_a_line(name)}" for name in names[:SHOWN]), *more]


def _counts(values: list[Any]) -> dict[Any, int]:
    """The most frequent first."""
    names, counts = np.unique(values, return_counts=True)
    return {str(names[index]): int(counts[index]) for index in np.argsort(-counts, kind="stable")}


def _spread(sides: np.ndarray) -> dict[str, int]:
    if not len(sides):
        return {}
    return {"smallest": int(sides.min()), "median": int(np.median(sides)), "largest": int(sides.max())}


def _rows(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)


def _duplicates(good: pa.Table) -> list[list[str]]:
    groups = pa.table({"sha256": good["sha256"], "path": good["path"]}).group_by("sha256", use_threads=False)
    alike = groups.aggregate([("path", "list"), ("path", "count")])
    return alike.filter(pa.array(alike["path_count"].to_numpy() > 1))["path_list"].to_pylist()


def _label_counts(images: Listing, looks: pa.Table) -> dict[str, int] | None:
    if images.labels is None:
        return None
    counts = np.bincount(images.labels[looks["sample"].to_numpy()], minlength=len(images.classes))
    return {name: int(count) for name, count in zip(images.classes, counts, strict=True)}
