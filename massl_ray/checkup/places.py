"""The places a run reads and writes: run.dir, the cache of remote images, the images themselves."""

import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from massl_ray.config import Config
from massl_ray.data.decode import Decoding
from massl_ray.data.demo import cache_folder
from massl_ray.data.examine import Report, look_at_all, report, to_table
from massl_ray.data.listing import Listing
from massl_ray.data.making import ViewMaker
from massl_ray.data.sources import open_source
from massl_ray.errors import UserError
from massl_ray.planning.checks import Finding
from massl_ray.shown import redacted
from massl_ray.storage import Folder

TIMED = 16  # images whose views are timed
LARGE_SIDE = 512  # pixels
SLOW_S = 5e-3  # for an image's views, above which its size is looked at


def check_source(config: Config) -> tuple[Listing | None, list[Finding]]:
    """The images, if they can be listed."""
    try:
        images = open_source(config.data.source, cache_gb=config.data.cache_gb)
    except UserError as error:
        return None, [
            Finding("images", "error", str(error), "Training could not start: give another --data.source, or mend this one.")
        ]
    return images, []


def look_at_images(images: Listing, config: Config) -> tuple[Report, list[Finding]]:
    """Every image decoded, with progress on stderr."""
    from massl_ray.reporting.progress import counted

    rows = []
    looks = look_at_all(images, os.cpu_count() or 1, Decoding.of(config.data))
    for _ in counted((rows.append(row) or 1 for row in looks), len(images)):
        pass
    found = report(images, to_table(rows))
    return found, [check_images(found, config.data.max_skipped)]


def check_images(found: Report, max_skipped: float) -> Finding:
    source = redacted(found.source)
    if found.images < 2:
        return Finding(
            "images", "error", f"There is 1 image in {source}, and training needs at least 2.", "Give a --data.source of more."
        )
    broken = f"{len(found.broken):,} of {found.images:,} images cannot be read"
    if len(found.broken) > max_skipped * found.images:
        return Finding(
            "images",
            "error",
            f"{broken}, and data.max_skipped is {max_skipped:g}: training would stop.",
            "Mend or remove them, or raise data.max_skipped.",
        )
    if found.broken:
        return Finding("images", "warning", f"{broken}: training would leave them out.", "Mend or remove them.")
    return Finding("images", "ok", f"All {found.images:,} images in {source} can be read.")


def check_views(images: Listing, config: Config, shorter_side: int) -> tuple[float, Finding]:
    """Seconds of one CPU for the views of an image, the median of a few. `shorter_side`: of half of the images, in pixels."""
    make = ViewMaker(images, config, batch_size=1, start_step=0, first=0, share=1)
    seconds = []
    for row in range(TIMED + 1):
        started = time.thread_time()
        make({"id": np.array([row])})
        seconds.append(time.thread_time() - started)
    cpu_s = statistics.median(seconds[1:])  # the first one also imports
    text = f"A CPU here takes {cpu_s * 1e3:.{2 if cpu_s < 0.01 else 0}f} ms an image to decode it and make its views"
    if cpu_s > SLOW_S and shorter_side > 2 * LARGE_SIDE:
        return cpu_s, Finding(
            "views",
            "note",
            f"{text}: the images are large, half of them with a shorter side over {shorter_side:,} px.",
            f"massl-ray prepare SOURCE DEST --max-side {LARGE_SIDE} writes smaller copies once.",
        )
    return cpu_s, Finding("views", "ok", f"{text}.")


def check_storage(where: str) -> Finding:
    """Write a tiny file in run.dir and delete it; folders that this makes go again."""
    folder = Folder(where)
    made = []
    if folder.is_local:
        made = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
    try:
        folder.check_writable()
    except UserError as error:
        return Finding("storage", "error", f"run.dir: {error}", "Choose another --run.dir, or mend this one.")
    finally:
        for path in made:
            with suppress(OSError):  # another run began there meanwhile
                path.rmdir()
    return Finding("storage", "ok", f"run.dir {redacted(str(folder))} can be written to.")


def check_disk(config: Config, state_bytes: int) -> Iterator[Finding]:
    """Room for checkpoints in a run.dir on this machine, and for copies of images that lie at a URI."""
    folder = Folder(config.run.dir)
    if folder.is_local:
        number = config.checkpoint.keep + 2  # the one with the best accuracy, and one that is being written
        what = f"{number} checkpoints of {state_bytes / 1e9:.2f} GB"
        yield _room("disk", folder.path, number * state_bytes, what, "Choose another --run.dir, or lower checkpoint.keep.")
    if "://" in config.data.source:
        wanted = config.data.cache_gb * 1e9
        what = f"up to {config.data.cache_gb:g} GB of images (data.cache_gb)"
        yield _room("image cache", cache_folder(), wanted, what, "Lower data.cache_gb, or move the cache with MASSL_RAY_CACHE.")


def _room(check: str, folder: Path, wanted: float, what: str, remedy: str) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"{folder} has {free / 1e9:.1f} GB free and needs {wanted / 1e9:.1f} GB for {what}."
    return Finding(check, "error", text, remedy) if free < wanted else Finding(check, "ok", text)
