"""Where images come from. A source becomes a `Listing`: paths in one fixed order, and labels where there are class folders."""

import heapq
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from massl_ray.data.decode import MAX_PIXELS, UNREADABLE, read, reason
from massl_ray.data.demo import demo_folder
from massl_ray.errors import UserError
from massl_ray.keyed import Stream, generator

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"})


@dataclass(frozen=True)
class Listing:
    """Images in a fixed order; a sample's number is its place here."""

    root: str
    paths: np.ndarray  # (n,) str, relative to root
    labels: np.ndarray | None  # (n,) int64 into classes
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, sample: int) -> str:
        return os.path.join(self.root, str(self.paths[sample]))

    def take(self, samples: np.ndarray) -> "Listing":
        return Listing(self.root, self.paths[samples], None if self.labels is None else self.labels[samples], self.classes)


def open_source(source: str, part: str = "train") -> Listing:
    """List a source: 'demo' or a folder, searched at any depth. Sorted, so the same folder always gives the same order.

    Class folders are the folders directly under the source, if every image lies in one and there are at least two.

    Raises:
        UserError: the folder is missing or cannot be searched, or no file in it looks like an image.
    """
    root = demo_folder(part) if source == "demo" else Path(source).expanduser()
    if not root.is_dir():
        raise UserError(f"data.source: there is no folder {root}. Give a folder that holds images (at any depth), or 'demo'.")
    try:
        paths = sorted(_image_files(str(root)))
    except OSError as error:
        raise UserError(f"data.source: the folder {error.filename} cannot be searched ({error.strerror}).") from None
    if not paths:
        raise UserError(f"data.source: no image files in {root}; looked for {', '.join(sorted(SUFFIXES))} at any depth.")
    return listing(str(root), paths)


def listing(root: str, paths: list[str]) -> Listing:
    """Paths relative to `root`, labelled by their first folder where that makes at least two classes of two images on average."""
    folders = [path.split(os.sep, 1)[0] if os.sep in path else "" for path in paths]
    classes = tuple(sorted(set(folders)))
    if "" in classes or not 2 <= len(classes) <= len(paths) / 2:
        return Listing(root, np.array(paths), None, ())
    number = {name: index for index, name in enumerate(classes)}
    return Listing(root, np.array(paths), np.array([number[folder] for folder in folders]), classes)


def probe(images: Listing, max_unreadable: float, max_pixels: int = MAX_PIXELS, at_most: int = 256) -> None:
    """Decode a spread-out few of the images before any work starts.

    Raises UserError if more than `max_unreadable` (a share) of them cannot be read, naming the first.
    """
    tried = np.unique(np.linspace(0, len(images) - 1, min(at_most, len(images))).astype(np.int64))
    with ThreadPoolExecutor(4) as pool:
        faults = list(pool.map(lambda sample: fault(images.path(sample), max_pixels), tried))
    broken = [(images.path(sample), reason) for sample, reason in zip(tried, faults, strict=True) if reason]
    if len(broken) > max_unreadable * len(tried):
        path, reason = broken[0]
        what = "none of" if len(broken) == len(tried) else f"{len(broken)} of"
        can = "can" if what == "none of" else "cannot"
        raise UserError(
            f"data.source: {what} the {len(tried)} images tried in {images.root} {can} be read, more than data.max_skipped "
            f"{max_unreadable:g} allows (first: {path}: {reason}). Mend or remove them, or raise data.max_skipped."
        )


def fault(path: str, max_pixels: int = MAX_PIXELS) -> str | None:
    """Why an image cannot be read, or None."""
    try:
        read(path, max_pixels)
    except UNREADABLE as error:
        return reason(error)
    return None


def hold_out(images: Listing, share: float = 0.1) -> tuple[Listing, Listing]:
    """Split into (bank, queries) for k-NN: every image's side is drawn by its number, the same in every run."""
    draws = generator(Stream.HOLD_OUT, 0).random(len(images))
    queries = draws < share
    return images.take(np.flatnonzero(~queries)), images.take(np.flatnonzero(queries))


def _image_files(root: str) -> Iterator[str]:
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
                    elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                        yield os.path.relpath(entry.path, root)
