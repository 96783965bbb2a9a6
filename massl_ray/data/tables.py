"""Images in a column of a table: Parquet files, read a row group at a time, and data sets that Hugging Face saved to disk."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from massl_ray.data.listing import Listing, Parts, Recent, joined, labelled
from massl_ray.errors import UserError
from massl_ray.storage import Folder, reason

IMAGE_COLUMNS = ("image", "img", "bytes", "image_bytes", "content", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "category", "target")
GROUPS_HELD = 256 << 20  # bytes of row groups that a process keeps
INFO, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class Chunk:
    """Rows that are read together."""

    file: str  # below the folder
    number: int  # in the file
    row: int  # in the file, of its first row


@dataclass(frozen=True)
class Rows(Parts):
    """An image a row."""

    chunks: tuple[Chunk, ...]
    column: str
    recent: Recent = field(default_factory=lambda: Recent(GROUPS_HELD), compare=False, repr=False)

    def name(self, place: int) -> str:
        number, row = self.find(place)
        return f"{self.chunks[number].file}:{self.chunks[number].row + row}"

    def path(self, place: int) -> str:
        return joined(str(self.folder), self.name(place))

    def read(self, place: int) -> bytes:
        number, row = self.find(place)
        return self._bytes(self.recent.get(number, lambda: self._load(self.chunks[number]))[row].as_py())

    def _load(self, chunk: Chunk) -> pa.ChunkedArray:
        """A row group of a Parquet file."""
        with self.folder.open_file(chunk.file) as file:
            return pq.ParquetFile(file).read_row_group(chunk.number, columns=[self.column]).column(self.column)

    def _bytes(self, value: Any) -> bytes:
        """Of plain bytes, or of Hugging Face's {bytes, path}."""
        path = None
        if isinstance(value, dict):
            value, path = value["bytes"], value["path"]
        if value is None and path:
            return self.folder.read_bytes(_below(self.folder, path))
        if value is None:
            raise ValueError("there is no image in this row")
        return value


def _below(folder: Folder, path: str) -> str:
    """The path as one below the folder. Raises ValueError for one that leads elsewhere: a table from a stranger must not make a run
    read this machine's other files."""
    root = os.path.abspath(folder.uri) if folder.is_local else "/"
    inside = os.path.relpath(os.path.normpath(os.path.join(root, path)), root)
    leads_elsewhere = "://" in path or inside.split("/")[0] == ".." or (os.path.isabs(path) and not folder.is_local)
    if leads_elsewhere:
        raise ValueError(f"the row names {path[:200]!r}, which lies outside the table's own folder and is not read")
    return inside


class SavedRows(Rows):
    """Arrow files on this disk, mapped into memory: any row in microseconds."""

    def _load(self, chunk: Chunk) -> pa.ChunkedArray:
        column = _mapped(self.folder, chunk.file).column(self.column)
        column.validate(full=True)  # else a damaged file may point anywhere in memory
        return column


def open_parquet(folder: Folder, names: Sequence[str]) -> Listing:
    """Every row of the files, in their order. Raises OSError, and UserError for files that are no Parquet or have no images."""

    def footer(name: str) -> tuple[pa.Schema, list[int]]:
        try:
            with folder.open_file(name) as file:
                parquet = pq.ParquetFile(file)
                return parquet.schema_arrow, [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        except OSError as error:
            if "ArrowInvalid" not in str(error):
                raise
            raise UserError(
                f"data.source: {name} in {folder} is no whole Parquet file ({_short(error)}). Mend or remove it."
            ) from None

    with ThreadPoolExecutor(8) as pool:
        footers = list(pool.map(footer, names))
    schema = footers[0][0]
    column = image_column(schema, f"{names[0]} in {folder}")
    for name, (other, _) in zip(names, footers, strict=True):
        _check_column(other, column, name, names[0], folder)
    store = Rows(folder, *_chunks(names, [sizes for _, sizes in footers]), column)
    label = label_column(schema)

    def labels(name: str) -> list[Any]:
        with folder.open_file(name) as file:
            return pq.ParquetFile(file).read(columns=[label]).column(0).to_pylist()

    if label is None or not all(_holds_labels(other, label) for other, _ in footers):
        return Listing(store)
    with ThreadPoolExecutor(8) as pool:
        return _named(store, [value for part in pool.map(labels, names) for value in part], schema, label)


def open_saved(folder: Folder, part: str) -> Listing:
    """What `datasets.save_to_disk` wrote; of several splits `part`. Raises OSError and UserError."""
    if not folder.is_local:
        raise UserError(
            f"data.source: {folder} is a data set saved by Hugging Face, and those are read from a disk. Copy it to one."
        )
    if folder.kind(SPLITS):
        splits = _said(folder, SPLITS, lambda said: list(map(str, said["splits"])))
        if part not in splits:
            raise UserError(f"data.source: {folder} has no split '{part}'. Give the folder of one: {', '.join(splits)}.")
        folder = folder / part
    names = _said(folder, INFO, lambda said: [str(entry["filename"]) for entry in said["_data_files"]])
    tables = [_mapped(folder, name) for name in names]
    schema = tables[0].schema
    column = image_column(schema, str(folder))
    for name, table in zip(names, tables, strict=True):
        _check_column(table.schema, column, name, names[0], folder)
    store = SavedRows(folder, *_chunks(names, [[len(table)] for table in tables]), column, Recent(1 << 62))
    label = label_column(schema)
    if label is None or not all(_holds_labels(table.schema, label) for table in tables):
        return Listing(store)
    return _named(store, [value for table in tables for value in table.column(label).to_pylist()], schema, label)


def _said(folder: Folder, name: str, read: Callable[[Any], list[str]]) -> list[str]:
    try:
        return read(json.loads(folder.read_text(name)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"data.source: {folder / name} is damaged ({type(error).__name__}: {reason(error)}). Save it anew."
        ) from None


def image_column(schema: pa.Schema, where: str) -> str:
    """The column of encoded images. Raises UserError where there is none, or no telling which of several."""
    able = [name for name, kind in zip(schema.names, schema.types, strict=True) if _holds_images(kind)]
    named = [name for name in IMAGE_COLUMNS if name in able]
    if named or len(able) == 1:
        return (named or able)[0]
    what = f"several columns of bytes ({', '.join(able)})" if able else "no column of image bytes"
    raise UserError(
        f"data.source: {where} has {what}; its columns are {', '.join(schema.names)}. Name the one with encoded images 'image'."
    )


def label_column(schema: pa.Schema) -> str | None:
    """The column of classes, by its name."""
    for name in LABEL_COLUMNS:
        if _holds_labels(schema, name):
            return name
    return None


def _check_column(schema: pa.Schema, column: str, name: str, first: str, folder: Folder) -> None:
    if column not in schema.names or not _holds_images(schema.field(column).type):
        raise UserError(f"data.source: {name} in {folder} has no column '{column}', as {first} has. Give alike files only.")


def _holds_images(kind: pa.DataType) -> bool:
    """Not what others have made of bytes: Ray Data reads a type of its own by unpickling it, which may do anything."""
    if pa.types.is_struct(kind):
        parts = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        return {"bytes", "path"} <= set(parts) and _is_bytes(parts["bytes"]) and _is_text(parts["path"])
    return not pa.types.is_null(kind) and _is_bytes(kind)


def _holds_labels(schema: pa.Schema, name: str) -> bool:
    if name not in schema.names:
        return False
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return any(is_one(kind) for is_one in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null))


def _is_text(kind: pa.DataType) -> bool:
    return any(is_one(kind) for is_one in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null))


def _named(store: Rows, labels: list[Any], schema: pa.Schema, column: str) -> Listing:
    """With the names that Hugging Face keeps for numbered classes."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names")
    if names and all(isinstance(value, int) and 0 <= value < len(names) for value in labels):
        labels = [names[value] for value in labels]
    return labelled(store, labels)


def _chunks(names: Sequence[str], sizes: Sequence[Sequence[int]]) -> tuple[np.ndarray, tuple[Chunk, ...]]:
    """Where the chunks of files start, given the rows of each, and the chunks, in order."""

    def chunks() -> Iterator[Chunk]:
        for name, rows in zip(names, sizes, strict=True):
            firsts = accumulate(rows, initial=0)
            yield from (Chunk(name, number, row) for number, row in zip(range(len(rows)), firsts, strict=False))

    return np.cumsum([0, *(size for rows in sizes for size in rows)], dtype=np.int64), tuple(chunks())


def _mapped(folder: Folder, name: str) -> pa.Table:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(folder.path / name))).read_all()
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise OSError(f"{name} is no whole Arrow file: {_short(error)}") from None


def _short(error: BaseException) -> str:
    return str(error).removeprefix("ArrowInvalid: ").split(". ")[0].rstrip(".")
