"""From any source to shards, in parts that may be done anywhere and in any order: what comes out depends on the source only.

Each part writes its shard and, last, a note that it is done. `finish` makes the index and, last of all, the manifest: a folder
without one is not finished, and the same command again does only what is missing.
"""

import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
from PIL import Image

from massl_ray.data.decode import PLAIN, Decoding, to_image
from massl_ray.data.examine import LOOK, Report, look, report, to_table
from massl_ray.data.listing import Listing
from massl_ray.data.shards import MANIFEST, Manifest, Shard, write_index, write_shard, write_table
from massl_ray.errors import UserError
from massl_ray.storage import Folder

WORK, PLAN, REPORT = ".work", "plan.json", "report.json"
TRIED = 64  # images whose sizes say how many go into a shard
MB = 1_000_000


@dataclass(frozen=True)
class Plan:
    """What is made of which images."""

    names_sha256: str
    count: int  # images of the source
    max_side: int | None  # pixels that larger images are shrunk to
    shard_mb: int
    max_pixels: int  # of images that are taken
    channels: int = 3  # that they are decoded to
    white: int = PLAIN.white  # level of more than 8 bits that becomes 255
    rows: int = 0  # images of the source a shard

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.max_pixels, self.channels, self.white)

    @property
    def parts(self) -> int:
        return -(-self.count // self.rows)

    def samples(self, part: int) -> range:
        return range(part * self.rows, min((part + 1) * self.rows, self.count))


def begin(images: Listing, folder: Folder, max_side: int | None, shard_mb: int, how: Decoding = PLAIN) -> Plan | None:
    """The plan that an earlier start wrote into the folder, or a new one; None where all is done.

    Raises:
        OSError: the folder cannot be read or written.
        UserError: it holds something else.
    """
    form = {"max_side": max_side, "shard_mb": shard_mb, **asdict(how)}
    wanted = Plan(**images.identity(), **form)  # type: ignore[arg-type]
    names = [name for name in folder.entries() if name != WORK]
    if MANIFEST in names:
        made = {"channels": PLAIN.channels, "white": PLAIN.white} | json.loads(
            folder.read_text(MANIFEST)
        )  # the first ones did not say
        if all(made.get(key) == value for key, value in asdict(wanted).items() if key not in ("rows", "count")):
            return None
    elif (folder / WORK).kind(PLAN):
        begun = Plan(**json.loads((folder / WORK).read_text(PLAN)))
        if replace(begun, rows=0) == wanted:
            return begun
    elif not names:
        plan = replace(wanted, rows=_rows(images, wanted))
        (folder / WORK).write_text(PLAN, json.dumps(asdict(plan)))
        return plan
    raise UserError(
        f"{folder} holds something else already, or images prepared from another source or in another way. Choose another "
        "folder, or remove it."
    )


def missing(folder: Folder, plan: Plan) -> Iterator[int]:
    """Parts that are still to be done."""
    done = set((folder / WORK).entries())
    return (part for part in range(plan.parts) if _note(part) not in done)


def do_part(images: Listing, folder: Folder, plan: Plan, part: int) -> None:
    """Write a shard of the images that can be read, what was found of all of them, and that it is done."""
    rows, encoded, good = [], [], []
    for sample in plan.samples(part):
        row, data, pixels = look(images, sample, plan.decoding)
        rows.append(row)
        if pixels is not None:
            encoded.append(shrunk(data, pixels, plan.max_side, row["format"]))
            good.append(sample)
    labels = [None if images.labels is None else int(images.labels[sample]) for sample in good]
    name = f"shard-{part:05d}.arrow"
    shard = write_shard(folder, name, encoded, labels, [images.name(sample) for sample in good]) if good else None
    looks = to_table(rows)
    write_table(folder / WORK, _looks(part), {name: looks[name].combine_chunks() for name in looks.column_names}, LOOK)
    (folder / WORK).write_text(_note(part), json.dumps(shard and asdict(shard)))


def finish(images: Listing, folder: Folder, plan: Plan) -> Report:
    """Put together what the parts have written, and say what was found."""

    def collect(part: int) -> tuple[pa.Table, Shard | None]:
        shard = json.loads((folder / WORK).read_text(_note(part)))
        looks = pa.ipc.open_file(pa.py_buffer((folder / WORK).read_bytes(_looks(part)))).read_all()
        return looks, shard and Shard(**shard)

    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(collect, range(plan.parts)))
    looks = pa.concat_tables([looks for looks, _ in parts])
    found = report(images, looks)
    good = looks.filter(looks["error"].is_null())["sample"].to_numpy()
    names = pa.array([os.fsencode(images.name(sample)) for sample in good], pa.large_binary())
    manifest = Manifest(
        source=images.root,
        names_sha256=plan.names_sha256,
        max_side=plan.max_side,
        shard_mb=plan.shard_mb,
        max_pixels=plan.max_pixels,
        channels=plan.channels,
        white=plan.white,
        count=len(good),
        classes=images.classes,
        mean=tuple(found.mean or ()),
        std=tuple(found.std or ()),
        index_sha256=write_index(folder, names, None if images.labels is None else images.labels[good]),
        shards=tuple(shard for _, shard in parts if shard),
    )
    folder.write_text(REPORT, json.dumps(asdict(found), indent=2) + "\n")
    folder.write_text(MANIFEST, manifest.to_json())
    folder.delete(WORK)
    return found


def shrunk(data: bytes, pixels: np.ndarray, max_side: int | None, kind: str) -> bytes:
    """The encoded image as it is, or if a side is longer than `max_side` pixels smaller and encoded anew: what may have been
    lossy as JPEG of high quality, bands that are no colours as an array, the rest as PNG."""
    height, width, channels = pixels.shape
    if max_side is None or max(height, width) <= max_side:
        return data
    buffer = io.BytesIO()
    if channels not in (1, 3):
        planes = [to_image(pixels[..., channel, np.newaxis]) for channel in range(channels)]
        for plane in planes:
            plane.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        np.save(buffer, np.stack([np.asarray(plane) for plane in planes], axis=2))
        return buffer.getvalue()
    image = to_image(pixels)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    if kind in ("JPEG", "MPO", "WEBP"):
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def _rows(images: Listing, plan: Plan) -> int:
    """By the mean size of a spread-out few."""
    tried = np.unique(np.linspace(0, len(images) - 1, min(TRIED, len(images))).astype(np.int64))
    sizes = []
    for sample in tried:
        row, data, pixels = look(images, int(sample), plan.decoding)
        if pixels is not None:
            sizes.append(len(shrunk(data, pixels, plan.max_side, row["format"])))
    return max(1, int(plan.shard_mb * MB / np.mean(sizes))) if sizes else len(images)


def _note(part: int) -> str:
    return f"shard-{part:05d}.json"


def _looks(part: int) -> str:
    return f"looks-{part:05d}.arrow"
