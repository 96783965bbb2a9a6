"""Prepared images: Arrow files of encoded images, an index of their names and labels, and a manifest with the hash of each."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from massl_ray.data.cache import hash_of, mapped
from massl_ray.data.decode import PLAIN
from massl_ray.data.listing import Listing, Parts, Recent, joined
from massl_ray.errors import UserError
from massl_ray.storage import Folder, reason

MANIFEST, INDEX = "manifest.json", "index.arrow"
FORMAT = "massl-ray shards 1"
SCHEMA = pa.schema([("image", pa.large_binary()), ("label", pa.int64()), ("path", pa.large_binary())])
MAPPED = 1 << 30  # bytes of remote shards that a process keeps mapped, beyond the cache's limit
GB = 1_000_000_000


@dataclass(frozen=True)
class Shard:
    """A file of images."""

    name: str
    count: int  # images
    size: int  # bytes of the file
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was prepared."""

    source: str  # what the paths are below
    names_sha256: str  # of the source's images, as in a run's images.json
    max_side: int | None  # pixels; None: images as they were
    shard_mb: int
    max_pixels: int  # of images that were taken
    count: int  # images
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of the channels, in 0..1
    std: tuple[float, ...]
    index_sha256: str
    shards: tuple[Shard, ...]
    channels: int = PLAIN.channels  # that they were decoded to
    white: int = PLAIN.white  # level of more than 8 bits that became 255
    format: str = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """Raises ValueError where it is none."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"its format is not '{FORMAT}'")
        if missing := {item.name for item in fields(Manifest) if item.default is MISSING} - set(values):
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        for shard in shards:
            if not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # copies are called so
                raise ValueError(f"{shard.sha256!r} is no sha256")
        tuples = {key: tuple(values.pop(key)) for key in ("classes", "mean", "std")}
        return Manifest(shards=shards, **tuples, **values)


@dataclass(frozen=True)
class Shards(Parts):
    """Prepared images, mapped into memory: on this machine's disk where they lie, from elsewhere through its cache."""

    source: str
    shards: tuple[Shard, ...]
    names_held: pa.LargeBinaryArray  # (n,)
    cache_bytes: int
    recent: Recent = field(default_factory=lambda: Recent(MAPPED), compare=False, repr=False)

    def name(self, place: int) -> str:
        return os.fsdecode(self.names_held[place].as_py())

    def path(self, place: int) -> str:
        return joined(self.source, self.name(place))

    def read(self, place: int) -> bytes:
        number, row = self.find(place)
        return self.recent.get(number, lambda: self._map(self.shards[number]))[row].as_py()

    def _map(self, shard: Shard) -> pa.Array:
        if self.folder.is_local:
            file = pa.memory_map(str(self.folder.path / shard.name))
        else:
            file = mapped(self.folder, shard.name, shard.sha256, self.cache_bytes)
        column = pa.ipc.open_file(file).get_batch(0).column("image")
        _check_type(column.type, "image")
        column.validate(full=True)  # else a damaged file may point anywhere in memory
        return column


def open_shards(folder: Folder, cache_gb: float) -> Listing:
    """Raises OSError, and UserError where the manifest or the index is damaged."""
    try:
        manifest = Manifest.from_json(folder.read_text(MANIFEST))
        index = folder.read_bytes(INDEX)
        if hashlib.sha256(index).hexdigest() != manifest.index_sha256:
            raise ValueError(f"{INDEX} does not have its hash")
        table = pa.ipc.open_file(pa.py_buffer(index)).read_all()
        for name in ("label", "path"):
            _check_type(table.schema.field(name).type, name)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"data.source: {folder / MANIFEST} is damaged ({reason(error)}). Run massl-ray prepare again.") from None
    starts = np.cumsum([0, *(shard.count for shard in manifest.shards)], dtype=np.int64)
    names = table.column("path").combine_chunks()
    store = Shards(folder, starts, manifest.source, manifest.shards, names, int(cache_gb * GB))
    labels = table.column("label").to_numpy() if manifest.classes else None
    return Listing(store, labels, manifest.classes, mean=manifest.mean, std=manifest.std)


def _check_type(kind: pa.DataType, name: str) -> None:
    """Others make types of bytes that are read by unpickling them, which may do anything. Raises ValueError."""
    if kind != SCHEMA.field(name).type:
        raise ValueError(f"its column '{name}' is {kind}, not {SCHEMA.field(name).type}")


def write_shard(folder: Folder, name: str, images: Sequence[bytes], labels: Sequence[int | None], names: Sequence[str]) -> Shard:
    """Write one shard. The same images always make the same bytes."""
    columns = {"image": images, "label": labels, "path": [os.fsencode(text) for text in names]}
    size, sha256 = write_table(folder, name, columns, SCHEMA)
    return Shard(name, len(images), size, sha256)


def write_index(folder: Folder, names: pa.Array, labels: np.ndarray | None) -> str:
    """Names and labels of all images; returns the file's sha256."""
    columns = {"label": pa.nulls(len(names), pa.int64()) if labels is None else labels, "path": names}
    return write_table(folder, INDEX, columns, pa.schema([SCHEMA.field("label"), SCHEMA.field("path")]))[1]


def write_table(folder: Folder, name: str, columns: Mapping[str, Any], schema: pa.Schema) -> tuple[int, str]:
    """An Arrow file of one batch, written on this machine and then taken to the folder; returns its bytes and sha256."""
    batch = pa.record_batch([pa.array(columns[item.name], item.type) for item in schema], schema)
    with TemporaryDirectory(prefix="massl-ray-") as scratch:
        path = Path(scratch) / "table"
        with pa.ipc.new_file(path, schema) as writer:
            writer.write_batch(batch)
        folder.upload(path, name)
        return path.stat().st_size, hash_of(path)
