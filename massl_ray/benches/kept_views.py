"""Views of a run's first steps, made once: every method and every try of `bench learn` is given the same ones."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from massl_ray.data.demo import cache_folder
from massl_ray.data.making import ViewMaker
from massl_ray.training.loop import Views
from massl_ray.training.run import Run

KEPT = 2000  # steps whose views are kept on disk, up to 2 GB a set and seed; those after them are made anew each time
ABANDONED_S = 3600.0  # after which nobody is still writing
COLUMNS = ("global_views", "local_views")


def view_batches(run: Run, content: str, steps: int) -> Iterator[Views]:
    """The views of each of a run's first `steps` steps. `content` says which images they are of (`LabelledSet.content`)."""
    batch, kept = run.resolved.batch_size, min(steps, KEPT)
    folder = _kept_folder(run, content, kept)
    columns = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS]
    for step in range(kept):
        rows = slice(step * batch, (step + 1) * batch)
        yield Views(*(torch.from_numpy(np.array(column[rows])) for column in columns), skipped=[])
    yield from made_batches(run, kept, steps)


def made_batches(run: Run, first: int, end: int) -> Iterator[Views]:
    """The views of the steps from `first` to before `end`, made on the spot."""
    make = _maker(run)
    for step in range(first, end):
        yield Views(*(torch.from_numpy(views) for views in _made(make, step, run.resolved.batch_size)), skipped=[])


def _kept_folder(run: Run, content: str, steps: int) -> Path:
    """Named by all that the views depend on. Written aside, then renamed."""
    config = run.config
    depends = [content, config.run.seed, run.resolved.batch_size, config.views.model_dump(), config.data.channels, steps]
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "learn-views" / key
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob("*.unfinished-*"):  # by processes that were killed; they are large
        if time.time() - left.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{key}.unfinished-"))
    try:
        _write(unfinished, run, steps)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(folder: Path, run: Run, steps: int) -> None:
    make, batch, views = _maker(run), run.resolved.batch_size, run.config.views
    shapes = [(2, views.global_size), (views.num_local, views.local_size)]
    files = [
        np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", np.uint8, (steps * batch, number, side, side, run.config.data.channels)
        )
        for name, (number, side) in zip(COLUMNS, shapes, strict=True)
    ]
    for step in range(steps):
        for file, made in zip(files, _made(make, step, batch), strict=True):
            file[step * batch : (step + 1) * batch] = made
    for file in files:
        file.flush()


def _maker(run: Run) -> ViewMaker:
    return ViewMaker(run.images, run.config, run.resolved.batch_size, 0, 0, run.resolved.batch_size)


def _made(make: ViewMaker, step: int, batch: int) -> list[np.ndarray]:
    made = make({"id": np.arange(step * batch, (step + 1) * batch)})
    return [made[name] for name in COLUMNS]
