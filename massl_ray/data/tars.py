"""WebDataset shards: tar files whose members 0001.jpg and 0001.cls are one sample. Indexed once, then read by offset and size."""

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from massl_ray.data.files import SUFFIXES
from massl_ray.data.listing import Listing, joined, labelled
from massl_ray.errors import UserError
from massl_ray.storage import Folder

READAHEAD = 1 << 20  # bytes: headers lie between images, so an index of a shard at a URI reads most of it, in few requests


@dataclass(frozen=True)
class Tars:
    """Members of tar files."""

    folder: Folder
    shards: tuple[str, ...]  # below the folder
    shard_of: np.ndarray  # (n,) int32 into shards
    members: pa.LargeBinaryArray  # (n,) names in the shard
    offsets: np.ndarray  # (n,) int64, bytes into the shard
    sizes: np.ndarray  # (n,) int64, bytes

    @property
    def root(self) -> str:
        return str(self.folder).partition("?")[0]

    @property
    def starts(self) -> np.ndarray:
        return np.searchsorted(self.shard_of, np.arange(len(self.shards) + 1))

    def __len__(self) -> int:
        return len(self.members)

    def name(self, place: int) -> str:
        return f"{self.shards[self.shard_of[place]]}/{os.fsdecode(self.members[place].as_py())}"

    def path(self, place: int) -> str:
        return joined(str(self.folder), self.name(place))

    def read(self, place: int) -> bytes:
        size = int(self.sizes[place])
        data = self.folder.read_bytes(self.shards[self.shard_of[place]], int(self.offsets[place]), size)
        if len(data) < size:
            raise OSError(f"the tar file ends within it: {len(data):,} of {size:,} bytes")
        return data


@dataclass(frozen=True)
class Member:
    """An image in a tar file."""

    name: str
    offset: int
    size: int
    label: str | None


def open_tars(folder: Folder, shards: list[str]) -> Listing:
    """Every image of the shards, in their order; labelled if all have a label. Raises OSError, and UserError for other files."""
    with ThreadPoolExecutor(8) as pool:
        indexes = list(pool.map(lambda shard: _index(folder, shard), shards))
    found = [member for index in indexes for member in index]
    store = Tars(
        folder,
        tuple(shards),
        np.repeat(np.arange(len(shards), dtype=np.int32), [len(index) for index in indexes]),
        pa.array([os.fsencode(member.name) for member in found], pa.large_binary()),
        np.array([member.offset for member in found], np.int64),
        np.array([member.size for member in found], np.int64),
    )
    return labelled(store, (member.label for member in found))


def _index(folder: Folder, shard: str) -> list[Member]:
    with folder.open_file(shard) as file:
        buffered = io.BufferedReader(file, READAHEAD)  # type: ignore[type-var]  # Arrow's files are raw files to Python
        try:
            with tarfile.open(fileobj=buffered, mode="r:", errorlevel=2) as tar:
                return list(_members(tar))
        except tarfile.TarError as error:
            raise UserError(
                f"data.source: {shard} in {folder} is no plain tar file ({error}). Mend it, or unpack it if it is compressed."
            ) from None


def _members(tar: tarfile.TarFile) -> Iterator[Member]:
    """The first image of each sample. A sample's members lie together and are alike up to the first dot of their name."""
    key: str | None = None
    image: tarfile.TarInfo | None = None
    label: str | None = None
    for member in tar:
        if not member.isfile():
            continue
        directory, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if f"{directory}/{stem}" != key:
            if image:
                yield Member(image.name, image.offset_data, image.size, label)
            key, image, label = f"{directory}/{stem}", None, None
        if extension == "cls":
            content = tar.extractfile(member)
            label = content.read().decode(errors="replace").strip() if content else None
        elif image is None and os.path.splitext(base)[1].lower() in SUFFIXES:
            image = member
    if image:
        yield Member(image.name, image.offset_data, image.size, label)
