"""Images that are a file each: a folder, a pattern, or a list of paths; on disk or at a URI."""

import heapq
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
from fsspec.utils import glob_translate

from massl_ray.data.listing import Listing, joined, labelled
from massl_ray.errors import UserError
from massl_ray.shown import redacted
from massl_ray.storage import Folder

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".npy"})


@dataclass(frozen=True)
class Files:
    """A file an image. Paths are held in one Arrow array: as small as their letters, in memory and on the way to a task."""

    folder: Folder
    names_held: pa.LargeBinaryArray  # (n,) below the folder, or whole paths and URIs; any bytes that the file system takes
    starts: None = None

    @property
    def root(self) -> str:
        return str(self.folder).partition("?")[0]

    def __len__(self) -> int:
        return len(self.names_held)

    def name(self, place: int) -> str:
        """Of signed addresses all but the signature, which is another one tomorrow."""
        return redacted(self._where(place))

    def path(self, place: int) -> str:
        return joined(str(self.folder), self.name(place))

    def read(self, place: int) -> bytes:
        name = self._where(place)
        elsewhere = "://" in name or os.path.isabs(name)
        return Folder(name).read_bytes() if elsewhere else self.folder.read_bytes(name)

    def _where(self, place: int) -> str:
        return os.fsdecode(self.names_held[place].as_py())


def files(folder: Folder, names: Iterable[str | bytes]) -> Files:
    return Files(folder, pa.array([os.fsencode(name) for name in names], pa.large_binary()))


def by_folder(folder: Folder, names: list[str]) -> Listing:
    """Labelled by their first folder, where that makes at least two classes of two images on average."""
    store = files(folder, names)
    folders = (name.partition("/")[0] if "/" in name else None for name in names)
    found = labelled(store, folders)
    return found if len(found.classes) <= len(names) / 2 else Listing(store)


def from_list(folder: Folder, text: bytes, where: str) -> Listing:
    """A path a line, below `folder` or whole, in the order of the list; after a tab its label, if every line has one.

    Raises UserError for a list of which only some lines have labels.
    """
    lines = [line for line in text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n") if line]
    if not lines or b"\t" not in lines[0]:
        return Listing(files(folder, lines))
    labels, known = [], {}
    for number, line in enumerate(lines):
        lines[number], tab, label = line.rpartition(b"\t")  # in place: a million lines are 100 MB
        if not tab:
            raise UserError(
                f"data.source: the list {where} has labels, but none for {os.fsdecode(line)!r}. Give every line one, "
                "after a tab, or none of them."
            )
        labels.append(known.setdefault(label, label))
    return labelled(files(folder, lines), map(os.fsdecode, labels))


def find(folder: Folder, suffixes: Iterable[str]) -> list[str]:
    """Files with one of these endings, at any depth, sorted: paths below the folder. Raises OSError."""
    wanted = tuple(suffixes)
    return sorted(name for name in _every(folder) if suffix(name) in wanted)


def matches(pattern: str) -> tuple[Folder, list[str]]:
    """The files that a pattern means, sorted, and the folder that they are named below: the last one without a wildcard.

    `*` and `?` stand for letters within a name, `**` for any depth, `[...]` for one of some letters; at a URI `?` begins the
    options, as everywhere.
    """
    address, mark, options = pattern.partition("?") if "://" in pattern else (os.path.abspath(pattern), "", "")
    parts = address.split("/")
    fixed = next(index for index, part in enumerate(parts) if is_pattern(part))
    folder = Folder(("/".join(parts[:fixed]) or "/") + mark + options)
    matching = re.compile(glob_translate("/".join(parts[fixed:]))).match
    return folder, sorted(name for name in _every(folder) if matching(name))


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_pattern(source: str) -> bool:
    address = source.partition("?")[0] if "://" in source else source
    return any(letter in address for letter in ("*[" if "://" in source else "*?["))


def _every(folder: Folder) -> Iterable[str]:
    if not folder.is_local:
        return folder.files()
    root = folder.uri.rstrip("/") + "/"
    return (path.removeprefix(root) for path in _local_files(folder.uri))


def _local_files(root: str) -> Iterator[str]:
    """Every folder is searched once, links to folders in the order of their names and after what lies there itself: links that
    lead back end, and the same folder always gives the same files."""
    searched: set[tuple[int, int]] = set()
    links = [root]
    while links:
        pending = [heapq.heappop(links)]
        while pending:
            folder = pending.pop()
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in searched:
                continue
            searched.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        heapq.heappush(links, entry.path)
                    else:
                        yield entry.path
