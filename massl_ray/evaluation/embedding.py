"""Embeddings of any number of images, in files of Parquet that may be made in any order: what comes out depends on the backbone,
the images and the settings only.

A folder has `_embedding.json`, which says what is in it, `part-00000.parquet` and so on, and at the end `_skipped.jsonl`. A part is
written aside and renamed, and names its unreadable images itself: one that is there is whole, and the same command again makes only
those that are missing. Parquet readers pass over names that begin with an underscore, so they take the folder as one table.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from massl_ray.data.decode import UNREADABLE, Decoding, Encoded, reason
from massl_ray.data.listing import Listing
from massl_ray.errors import UserError
from massl_ray.evaluation.subjects import Subject
from massl_ray.evaluation.tokens import as_map, prefix_tokens
from massl_ray.storage import Folder

SETTINGS, SKIPPED = "_embedding.json", "_skipped.jsonl"
TOKENS, DTYPES = ("pooled", "class", "patch"), ("float32", "float16")
PART_ROWS, PART_BYTES = 2048, 64_000_000  # of a part, at most


@dataclass(frozen=True)
class Plan:
    """What is made of which images."""

    subject: str
    backbone_sha256: str
    view: Mapping[str, Any]  # settings of the subject
    names_sha256: str
    count: int  # images of the source
    labelled: bool
    max_pixels: int
    white: int
    tokens: str
    dtype: str
    shape: tuple[int, ...]  # of an image's embedding: (D,), or (h, w, D) of patch tokens
    batch: int  # images that go through the backbone together: another number may change last bits
    rows: int  # images of the source a part, a multiple of `batch`

    @property
    def parts(self) -> int:
        return -(-self.count // self.rows)

    @property
    def batches(self) -> int:
        return -(-self.count // self.batch)

    @property
    def width(self) -> int:
        """Numbers an image."""
        return int(np.prod(self.shape))

    def batches_of(self, part: int) -> range:
        each = self.rows // self.batch
        return range(part * each, min((part + 1) * each, self.batches))

    def samples(self, batch: int) -> range:
        return range(batch * self.batch, min((batch + 1) * self.batch, self.count))

    def to_json(self) -> str:
        return json.dumps({"format": 1, **asdict(self)}, indent=2) + "\n"


def plan_embedding(subject: Subject, images: Listing, how: Decoding, tokens: str, dtype: str, batch: int) -> Plan:
    """Raises UserError where the backbone has no such tokens."""
    try:
        blank = torch.zeros(1, subject.size, subject.size, subject.channels, dtype=torch.uint8)
        shape = tuple(embedded(subject, blank, tokens).shape[1:])
    except (ValueError, AttributeError) as error:
        raise UserError(f"--tokens {tokens} are not to be had of {subject.name}: {error}.") from None
    row_bytes = int(np.prod(shape)) * (4 if dtype == "float32" else 2)
    rows = max(1, min(PART_ROWS, PART_BYTES // row_bytes) // batch) * batch
    view = json.loads(json.dumps(subject.settings))
    of_images: dict[str, Any] = images.identity() | {"labelled": images.labels is not None}
    of_decoding = {"max_pixels": how.max_pixels, "white": how.white}
    made = {"tokens": tokens, "dtype": dtype, "shape": shape, "batch": batch, "rows": rows}
    return Plan(subject.name, subject.sha256, view, **of_images, **of_decoding, **made)


def begin(folder: Folder, plan: Plan) -> list[int]:
    """Write what will be in the folder. Returns the parts that are still to be made, in order.

    Raises:
        OSError: the folder cannot be read or written.
        UserError: it holds something else.
    """
    names = [name for name in folder.entries() if name[0] != "."]
    if not names:
        folder.write_text(SETTINGS, plan.to_json())
    elif SETTINGS not in names:
        raise UserError(f"{folder} holds something else already. Choose another folder.")
    else:
        _check_same(folder, plan)
    return [part for part in range(plan.parts) if part_name(part) not in names]


def _check_same(folder: Folder, plan: Plan) -> None:
    try:
        there = json.loads(folder.read_text(SETTINGS))
        differing = [key for key, value in json.loads(plan.to_json()).items() if there.get(key) != value]
    except (ValueError, RecursionError, AttributeError):
        raise UserError(f"{folder / SETTINGS} is damaged. Remove the folder, or choose another one.") from None
    if differing:
        raise UserError(f"{folder} holds other embeddings: {', '.join(differing)} differ. Choose another folder, or remove it.")


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


# ---- a batch ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """The images of a batch."""

    samples: np.ndarray  # (n,) int64, places in the listing of those that can be read
    views: np.ndarray  # (n, H, W, C) uint8
    skipped: tuple[str, ...]  # "path: reason" of the others


@dataclass(frozen=True)
class Embedded:
    samples: np.ndarray  # (n,) int64
    vectors: np.ndarray  # (n, width) of the dtype
    skipped: tuple[str, ...]


def decode(subject: Subject, images: Listing, how: Decoding, samples: Sequence[int], threads: int = 1) -> Decoded:
    """Cut to the subject's view, by a few threads."""

    def load(sample: int) -> np.ndarray | str:
        try:
            return subject.view(Encoded(images.read(sample), how).pixels()[0])
        except UNREADABLE as error:
            return f"{images.path(sample)}: {reason(error)}"

    with ThreadPoolExecutor(threads) as pool:
        loaded = list(pool.map(load, samples) if threads > 1 else map(load, samples))
    good = [(sample, found) for sample, found in zip(samples, loaded, strict=True) if isinstance(found, np.ndarray)]
    none = np.empty((0, subject.size, subject.size, subject.channels), np.uint8)
    views = np.stack([found for _, found in good]) if good else none
    skipped = tuple(found for found in loaded if isinstance(found, str))
    return Decoded(np.array([sample for sample, _ in good], np.int64), views, skipped)


def embed(subject: Subject, plan: Plan, decoded: Decoded) -> Embedded:
    """With the backbone where it is."""
    if not len(decoded.samples):
        return Embedded(decoded.samples, np.empty((0, plan.width), plan.dtype), decoded.skipped)
    device = next(subject.backbone.parameters(), torch.empty(0)).device
    views = torch.from_numpy(decoded.views).to(device)
    vectors = embedded(subject, views, plan.tokens).flatten(1).to(getattr(torch, plan.dtype)).cpu().numpy()
    return Embedded(decoded.samples, vectors, decoded.skipped)


@torch.inference_mode()
def embedded(subject: Subject, views: Tensor, tokens: str) -> Tensor:
    """Float32 on the device of `views` (n, H, W, C) uint8: what the backbone gives, (n, D); its class token, (n, D); or its patch
    tokens, (n, h, w, D), of a conv net its last map. Raises ValueError or AttributeError where it has none."""
    if tokens == "pooled":
        return subject.embedded(views)
    backbone: Any = subject.backbone
    if not hasattr(backbone, "forward_features"):
        raise ValueError("it gives one vector an image and nothing else")
    if tokens == "class" and (not prefix_tokens(backbone) or getattr(backbone, "cls_token", None) is None):
        raise ValueError("it has no class token")
    with torch.autocast(views.device.type, dtype=torch.bfloat16, enabled=subject.precision == "bf16"):
        found = backbone.forward_features(subject.normalized(views))
    return (found[:, 0] if tokens == "class" else as_map(backbone, found)).float()


# ---- a part ----------------------------------------------------------------------------------------------------------


def schema(plan: Plan) -> pa.Schema:
    value = pa.float32() if plan.dtype == "float32" else pa.float16()
    fields = [pa.field("path", pa.string()), pa.field("vector", pa.list_(value, plan.width))]
    return pa.schema([fields[0], *([pa.field("label", pa.string())] if plan.labelled else []), fields[1]])


def write_part(folder: Folder, plan: Plan, part: int, images: Listing, batches: Iterator[Embedded]) -> Iterator[int]:
    """Write the batches of a part as they come; gives the number of images of each."""
    skipped: list[str] = []
    with tempfile.TemporaryDirectory(prefix="massl-ray-") as scratch:
        path = Path(scratch) / "part.parquet"
        options: dict[str, Any] = {"compression": "snappy", "use_dictionary": ["label"]}  # pyarrow's stubs know a bool only
        with pq.ParquetWriter(path, schema(plan), **options) as file:
            for number in plan.batches_of(part):
                batch = next(batches)
                skipped += batch.skipped
                if len(batch.samples):
                    file.write_batch(_table(plan, images, batch))
                yield len(plan.samples(number))
            file.add_key_value_metadata({"shape": json.dumps(plan.shape), "skipped": json.dumps(skipped)})
        folder.upload(path, part_name(part))


def finish(folder: Folder, plan: Plan) -> list[str]:
    """Write the list of the images that could not be read, "path: reason", in their order; returns it."""

    def skipped(part: int) -> list[str]:
        with folder.open_file(part_name(part)) as file:
            return json.loads((pq.read_metadata(file).metadata or {}).get(b"skipped", b"[]"))

    with ThreadPoolExecutor(16) as pool:
        found = [image for images in pool.map(skipped, range(plan.parts)) for image in images]
    folder.write_text(SKIPPED, "".join(json.dumps({"image": image}) + "\n" for image in found))
    return found


def _table(plan: Plan, images: Listing, batch: Embedded) -> pa.RecordBatch:
    paths = [os.fsencode(images.path(int(sample))).decode("utf-8", "backslashreplace") for sample in batch.samples]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(batch.vectors.reshape(-1)), plan.width)
    columns = [pa.array(paths, pa.string()), vectors]
    if plan.labelled and images.labels is not None:
        columns.insert(1, pa.array([images.classes[images.labels[sample]] for sample in batch.samples], pa.string()))
    return pa.record_batch(columns, schema=schema(plan))
