"""A folder on this machine's disk or at a URI: the little that images, checkpoints, locks and mirrors ask of a file system."""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import fsspec.core
from pyarrow import ArrowInvalid, NativeFile
from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, LocalFileSystem, PyFileSystem, copy_files

from massl_ray.errors import UserError
from massl_ray.shown import redacted


class Folder:
    """A folder, there or not yet: a path, file://, or any URI that Arrow (s3, gs, abfs, hdfs) or fsspec opens.

    A plain value that can be pickled: the file system is opened at first use. Options of a URI (`?endpoint_override=...`) go
    with every folder below it. Names may be paths of several parts. Every method but the constructor and `path` raises
    OSError, FileNotFoundError among them, where the storage fails. As text it has no secrets: those are in `uri`.
    """

    def __init__(self, where: "Place"):
        text = where.uri if isinstance(where, Folder) else str(where)
        if text.startswith("file:"):
            text = FileSystem.from_uri(text)[1]
        base, mark, options = text.partition("?")
        self.uri = base.rstrip("/") + mark + options if "://" in text else os.path.abspath(text)

    def __str__(self) -> str:
        return redacted(self.uri)

    def __repr__(self) -> str:
        return f"Folder({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __truediv__(self, name: str) -> "Folder":
        base, mark, options = self._parts()
        return Folder(f"{base}/{name}{mark}{options}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._parts()[0].rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Folder":
        base, mark, options = self._parts()
        return Folder((base.rpartition("/")[0] or "/") + mark + options)

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def path(self) -> Path:
        """Of a local folder. Raises ValueError for one at a URI."""
        if not self.is_local:
            raise ValueError(f"{self} is not on this machine's disk")
        return Path(self.uri)

    def kind(self, name: str = "") -> str | None:
        """'folder', 'file', or None where there is nothing."""
        with self._opened(name) as (system, path):
            found = system.get_file_info(path).type
        return {FileType.Directory: "folder", FileType.NotFound: None}.get(found, "file")

    def entries(self) -> list[str]:
        """Names of what lies directly in the folder, sorted; none where there is no folder."""
        with self._opened() as (system, path):
            return sorted(info.base_name for info in system.get_file_info(FileSelector(path, allow_not_found=True)))

    def files(self) -> list[str]:
        """Every file at any depth, as a path below the folder, sorted."""
        with self._opened() as (system, path):
            found = system.get_file_info(FileSelector(path, allow_not_found=True, recursive=True))
        return sorted(info.path.removeprefix(path).lstrip("/") for info in found if info.type == FileType.File)

    def read_text(self, name: str) -> str:
        """UTF-8 text. Raises UnicodeDecodeError where it is none."""
        if self.is_local:
            return self.read_bytes(name).decode()
        with self._opened(name) as (system, path), system.open_input_stream(path, compression=None) as stream:
            data = stream.read()
        return data.decode()

    def read_bytes(self, name: str = "", offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `offset` on, or all there are; of a file at a URI only these are fetched. Without a name, the folder
        is taken for a file."""
        if self.is_local:
            with open(os.path.join(self.uri, name) if name else self.uri, "rb", opener=regular_only) as file:
                file.seek(offset)
                return file.read() if size is None else file.read(size)
        if size is None and not offset:
            with self._opened(name) as (system, path), system.open_input_stream(path, compression=None) as stream:
                return stream.read()
        with self.open_file(name) as file:
            file.seek(offset)
            return file.read(size)

    @contextmanager
    def open_file(self, name: str = "") -> Iterator[NativeFile]:
        """A file to read at any place, as Arrow has them."""
        with self._opened(name) as (system, path), system.open_input_file(path) as file:
            yield file

    def write_text(self, name: str, text: str) -> None:
        """Readers see the old text or the new one, never half of it."""
        if self.is_local:
            _replace(self.path / name, lambda aside: aside.write_bytes(text.encode()))
            return
        with self._opened(name, parents=True) as (system, path), system.open_output_stream(path, compression=None) as stream:
            stream.write(text.encode())

    def upload(self, local: Path, name: str) -> None:
        """Copy a file of this machine into the folder."""
        if self.is_local:
            _replace(self.path / name, lambda aside: shutil.copyfile(local, aside))
            return
        with self._opened(name, parents=True) as (system, path):
            copy_files(str(local), path, source_filesystem=LocalFileSystem(), destination_filesystem=system)

    def download(self, name: str, local: Path) -> None:
        """Copy a file of the folder to this machine: all of it or nothing."""

        def fetch(aside: Path) -> None:
            with self._opened(name) as (system, path):
                copy_files(path, str(aside), source_filesystem=system, destination_filesystem=LocalFileSystem())

        _replace(local, fetch)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it. What is not there is fine."""
        with self._opened(name) as (system, path):
            kind = system.get_file_info(path).type
            if kind == FileType.Directory:
                system.delete_dir(path)
            elif kind != FileType.NotFound:
                system.delete_file(path)

    def check_writable(self) -> None:
        """Write and delete a tiny file. Raises UserError, one sentence, where that cannot be done."""
        name = f".writable_{uuid.uuid4().hex[:8]}"
        try:
            self.write_text(name, "")
            self.delete(name)
        except OSError as error:
            raise UserError(
                f"{self} cannot be written to ({reason(error)}). Choose another place, or mend its permissions or credentials."
            ) from None

    def _parts(self) -> tuple[str, str, str]:
        """Address, "?" and options of a URI."""
        return (self.uri, "", "") if self.is_local else self.uri.partition("?")

    @contextmanager
    def _opened(self, name: str = "", parents: bool = False) -> Iterator[tuple[FileSystem, str]]:
        """The file system and the path of `name` in it; whatever they raise becomes an OSError."""
        try:
            if self.is_local:
                yield LocalFileSystem(), os.path.join(self.uri, name).rstrip("/") or "/"
                return
            base, mark, options = self._parts()
            scheme, _, address = base.partition("://")
            root, _, path = address.partition("/")
            system, start = _connect(f"{scheme}://{root}{mark}{options}")
            start, mark, options = start.partition("?")  # of a web server, which wants them with every file
            path = "/".join([start.rstrip("/"), *filter(None, [path, name])]) + mark + options
            if parents and isinstance(system, PyFileSystem):  # object stores have no folders, but fsspec opens others too
                system.create_dir(path.rpartition("/")[0], recursive=True)
            yield system, path
        except OSError as error:
            if redacted(str(error)) == str(error):
                raise
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            raise kind(redacted(str(error))) from None
        except Exception as error:  # Arrow and the file systems of fsspec raise what they like
            raise OSError(redacted(f"{type(error).__name__}: {error}")) from error


Place = Folder | Path | str


def reason(error: BaseException) -> str:
    """An exception as part of a sentence: in one line, without secrets, a full stop, or the file name that the sentence has."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return redacted(" ".join(text.split())).rstrip(".")


GCS_PATIENCE = "retry_limit_seconds=60"  # Arrow's own is a quarter of an hour, also where there are only no credentials


@cache  # a connection a place, shared by all folders below it
def _connect(root: str) -> tuple[FileSystem, str]:
    if root.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in root:
        root += ("&" if "?" in root else "?") + GCS_PATIENCE
    try:
        return FileSystem.from_uri(root)
    except ArrowInvalid as unknown:
        try:
            system, path = fsspec.core.url_to_fs(root, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise OSError(f"{reason(unknown)}; {error}") from None
        return PyFileSystem(FSSpecHandler(system)), path


def _replace(target: Path, fill: Callable[[Path], object]) -> None:
    """Write aside, wait for the disk, rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        fill(aside)
        to_disk(aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)  # still there only where something failed


def regular_only(path: str, flags: int) -> int:
    """An opener for `open` that takes no device, pipe or socket, which may have no end or keep a reader waiting. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return descriptor


def to_disk(path: Path) -> None:
    """Return once a local file, or the names in a local folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
