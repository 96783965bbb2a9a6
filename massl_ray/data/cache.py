"""Copies of remote files on this machine: each fetched once for all of its processes, the least recently used given up first."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from massl_ray.data.demo import cache_folder
from massl_ray.storage import Folder

TRIES = 2  # fetches of a file before it is refused
REFUSED_S = 600.0  # before a refused file is tried again: each of its images asks for it


def mapped(folder: Folder, name: str, sha256: str, limit: int) -> pa.MemoryMappedFile:
    """The copy on this machine of a file of that hash, in memory; fetched, and checked, unless it is there already.

    Args:
        limit: bytes that all copies may take once this one is there; the one asked for is kept whatever its size.

    Raises:
        OSError: it cannot be fetched, or does not have the hash however often it is.
    """
    store = cache_folder() / "shards"
    copy = store / f"{sha256}.arrow"
    with suppress(FileNotFoundError):
        return _used(copy)
    store.mkdir(parents=True, exist_ok=True)
    with _alone(store / f"{sha256}.lock"):
        with suppress(FileNotFoundError):  # another process was faster
            return _used(copy)
        file = _fetch(folder, name, sha256, copy)
    with _alone(store / "room.lock"):
        _make_room(store, limit, copy)
    return file


def hash_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _used(copy: Path) -> pa.MemoryMappedFile:
    os.utime(copy)
    return pa.memory_map(str(copy))


def _fetch(folder: Folder, name: str, sha256: str, copy: Path) -> pa.MemoryMappedFile:
    refused = copy.with_suffix(".refused")
    aside = copy.with_suffix(".part")  # of the one process that holds the lock
    if not refused.exists() or time.time() - refused.stat().st_mtime > REFUSED_S:
        try:
            for _ in range(TRIES):
                folder.download(name, aside)
                if hash_of(aside) == sha256:
                    file = pa.memory_map(str(aside))  # before it has a name under which another process may give it up
                    aside.replace(copy)
                    refused.unlink(missing_ok=True)
                    return file
        finally:
            aside.unlink(missing_ok=True)
        refused.touch()
    raise OSError(f"{folder / name} does not have the sha256 of its manifest, fetched {TRIES} times")


def _make_room(store: Path, limit: int, newest: Path) -> None:
    """Give up other copies until all take at most `limit` bytes. Who has one mapped keeps it until it lets go."""
    copies = []
    for path in store.glob("*.arrow"):
        with suppress(FileNotFoundError):
            status = path.stat()
            copies.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in copies)
    for _, size, path in sorted(copies):
        if total > limit and path != newest:
            path.unlink(missing_ok=True)
            total -= size


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that the system lets go of when the process ends, however it does."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
