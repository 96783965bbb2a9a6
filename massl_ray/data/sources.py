"""What `data.source` may be, and how each becomes a `Listing`."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from massl_ray.data.decode import PLAIN, UNREADABLE, Decoding, Encoded, reason
from massl_ray.data.demo import demo_folder
from massl_ray.data.files import SUFFIXES, by_folder, find, from_list, is_pattern, matches, suffix
from massl_ray.data.listing import Listing
from massl_ray.errors import UserError
from massl_ray.keyed import Stream, generator
from massl_ray.storage import Folder
from massl_ray.storage import reason as storage_reason

PARQUET, TAR = ".parquet", ".tar"


def open_source(source: str, part: str = "train", cache_gb: float = 50.0) -> Listing:
    """List a source: 'demo', or at a path or URI a folder, a pattern of files, a list of paths, Parquet files, WebDataset shards,
    a data set that Hugging Face saved, or what `massl-ray prepare` wrote. The same source always gives the same order.

    Class folders are the folders directly under the source, if every image lies in one and there are at least two.

    Args:
        part: of sources that come in parts, 'train' or 'test'.
        cache_gb: what this machine may keep of prepared images that lie elsewhere.

    Raises:
        UserError: there is nothing, it cannot be read, or it holds no images.
    """
    where = str(demo_folder(part)) if source == "demo" else os.path.expanduser(source)
    try:
        images = _open(where, part, cache_gb)
    except FileNotFoundError as error:
        raise UserError(f"data.source: there is no {error.filename or where}.") from None
    except OSError as error:
        at = error.filename if isinstance(error.filename, str) else where
        raise UserError(
            f"data.source: {at} cannot be read ({storage_reason(error)}). Mend the address, its permissions or its credentials."
        ) from None
    if not len(images):
        raise UserError(f"data.source: there are no images in {where}.")
    return images


def probe(images: Listing, max_unreadable: float, how: Decoding = PLAIN, at_most: int = 256) -> None:
    """Decode a spread-out few of the images before any work starts.

    Raises UserError if more than `max_unreadable` (a share) of them cannot be read, naming the first.
    """
    tried = np.unique(np.linspace(0, len(images) - 1, min(at_most, len(images))).astype(np.int64))
    with ThreadPoolExecutor(4) as pool:
        faults = list(pool.map(lambda sample: fault(images, sample, how), tried))
    broken = [(images.path(sample), reason) for sample, reason in zip(tried, faults, strict=True) if reason]
    if len(broken) > max_unreadable * len(tried):
        path, reason = broken[0]
        what = "none of" if len(broken) == len(tried) else f"{len(broken)} of"
        can = "can" if what == "none of" else "cannot"
        raise UserError(
            f"data.source: {what} the {len(tried)} images tried in {images.root} {can} be read, more than data.max_skipped "
            f"{max_unreadable:g} allows (first: {path}: {reason}). Mend or remove them, or raise data.max_skipped."
        )


def fault(images: Listing, sample: int, how: Decoding = PLAIN) -> str | None:
    """Why an image cannot be read, or None."""
    try:
        Encoded(images.read(sample), how).pixels()
    except UNREADABLE as error:
        return reason(error)
    return None


def hold_out(images: Listing, share: float = 0.1) -> tuple[Listing, Listing]:
    """Split into (bank, queries) for k-NN: every image's side is drawn by its number, the same in every run."""
    draws = generator(Stream.HOLD_OUT, 0).random(len(images))
    queries = draws < share
    return images.take(np.flatnonzero(~queries)), images.take(np.flatnonzero(queries))


def _open(where: str, part: str, cache_gb: float) -> Listing:
    place = Folder(where)
    kind = None if "://" in where and is_pattern(where) else place.kind()
    if kind == "folder":
        return _open_folder(place, part, cache_gb)
    if kind == "file":
        return _open_file(place)
    if is_pattern(where):
        folder, names = matches(where)
        if not names:
            raise UserError(f"data.source: no file matches {where}.")
        return _open_names(folder, names)
    raise UserError(
        f"data.source: there is no folder or file {place}. Give images (a folder, a pattern, a list of paths, Parquet files, "
        "WebDataset shards), or 'demo'."
    )


def _open_folder(folder: Folder, part: str, cache_gb: float) -> Listing:
    """By what lies in it: prepared images, a saved data set, image files, and only then tables and archives of images."""
    from massl_ray.data import shards, tables  # late: tasks that read plain files need not wait for them

    if folder.kind(shards.MANIFEST) and folder.kind(shards.INDEX):
        return shards.open_shards(folder, cache_gb)
    if folder.kind(tables.INFO) or folder.kind(tables.SPLITS):
        return tables.open_saved(folder, part)
    found = find(folder, {*SUFFIXES, PARQUET, TAR})
    for suffixes in (SUFFIXES, {PARQUET}, {TAR}):
        names = [name for name in found if suffix(name) in suffixes]
        if names:
            return _open_names(folder, names)
    raise UserError(
        f"data.source: no image files in {folder}; looked for {', '.join(sorted(SUFFIXES))}, {PARQUET} and {TAR} at any depth."
    )


def _open_names(folder: Folder, names: list[str]) -> Listing:
    """Files that are alike."""
    kinds = {suffix(name) for name in names}
    if kinds == {PARQUET}:
        from massl_ray.data.tables import open_parquet

        return open_parquet(folder, names)
    if kinds == {TAR}:
        from massl_ray.data.tars import open_tars

        return open_tars(folder, names)
    return by_folder(folder, names)


def _open_file(place: Folder) -> Listing:
    kind = suffix(place.name)
    if kind in (PARQUET, TAR):
        return _open_names(place.parent, [place.name])
    text = b"" if kind in SUFFIXES else place.read_bytes()
    if kind in SUFFIXES or b"\0" in text[:4096]:
        raise UserError(
            f"data.source: {place} is neither a folder nor a text file with a path a line, nor does it end in {PARQUET} or {TAR}. "
            "Give one of these."
        )
    return from_list(place.parent, text, str(place))
