"""A run before it starts: images found, settings resolved, directory claimed. Everything that can be refused is refused here."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from massl_ray.config import IMAGENET_GRAY, Config, Resolved, decided_as, fill, keys, recorded_toml, resolve, to_toml
from massl_ray.data.decode import Decoding
from massl_ray.data.demo import cache_folder
from massl_ray.data.listing import Listing
from massl_ray.data.order import Windows
from massl_ray.data.sources import hold_out, open_source, probe
from massl_ray.errors import UserError
from massl_ray.method.network import check_backbone
from massl_ray.storage import Folder, reason
from massl_ray.training.mirror import Mirror

IMAGES = "images.json"
FREE_TO_CHANGE = (
    "run.dir",
    "data.cache_gb",
    "data.max_skipped",
    "train.steps",
    "train.stop_at",
    "train.epochs",
    "train.log_every",
    "train.checkpoint_every",
    "checkpoint.",
    "eval.",
    "monitor.",
    "elastic.m",
    "elastic.view_tasks",
    "elastic.timeout_seconds",
)
"""Settings that may differ when a run is continued: all but its length leave the result alone, and schedules follow that."""


@dataclass(frozen=True)
class Run:
    """Plain values: sent to every worker as it is."""

    config: Config  # with every 'auto' that the data set decides filled in
    resolved: Resolved
    images: Listing
    bank: Listing | None  # k-NN: labelled images to compare with, None without labels
    queries: Listing | None  # k-NN: labelled images to classify

    @property
    def folder(self) -> Folder:
        """The run directory, on this machine's disk or at a URI."""
        return Folder(self.config.run.dir)

    @property
    def dir(self) -> Path:
        """The run directory, or where this machine keeps the small files of one at a URI (`training.mirror`)."""
        if self.folder.is_local:
            return self.folder.path
        return cache_folder() / "runs" / hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]

    @property
    def checkpoints(self) -> Folder:
        return self.folder / "checkpoints"


def prepare_run(config: Config) -> Run:
    """Find and probe the images, resolve the settings, check the model's name and the directory.

    Raises:
        UserError: anything that is the user's to mend. No worker has started and nothing was written then.
    """
    check_backbone(config)
    folder = Folder(config.run.dir)
    earlier = _earlier_start(folder)
    if earlier:
        config = decided_as(earlier, config)
    images = training_images(config)
    probe(images, config.data.max_skipped, Decoding.of(config.data))
    config = _normalized(config, images)
    resolved = resolve(config, len(images))
    filled = fill(config, resolved)
    bank, queries = _knn_sides(config, images)
    if config.elastic.min_workers > resolved.num_micro_batches:
        raise UserError(
            f"elastic.min_workers is {config.elastic.min_workers}, but a batch of {resolved.batch_size} images has only "
            f"{resolved.num_micro_batches} micro-batches to share out: lower it, or lower train.micro_batch_size "
            f"({resolved.micro_batch_size})."
        )
    run = Run(filled, resolved, images, bank, queries)
    if earlier:
        _check_same(run, earlier)
    return run


def training_images(config: Config) -> Listing:
    """The images of data.source in the order that training sees them in. Raises UserError."""
    return _windowed(open_source(config.data.source, cache_gb=config.data.cache_gb), config.data.window)


def claim_directory(run: Run) -> Run:
    """Create the run directory, fetch the small files of one at a URI, and write config.toml."""
    run.folder.check_writable()
    try:
        if run.folder.is_local:
            run.checkpoints.path.mkdir(exist_ok=True)
        else:
            shutil.rmtree(run.dir, ignore_errors=True)
            Mirror(run.dir, run.folder).pull()
        (run.dir / "eval").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir: {run.dir} cannot be created ({reason(error)}). Choose another --run.dir.") from None
    write_atomically(run.dir / "config.toml", to_toml(run.config))
    write_json(run.dir / IMAGES, run.images.identity())
    if not run.folder.is_local:
        Mirror(run.dir, run.folder).push()
    return run


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write aside, then rename: readers see the old file or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """As JSON: all of them or, with OSError, none."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def write_json(path: Path, value: object) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def differing_keys(earlier: Config, later: Config) -> list[str]:
    """Settings that differ and matter to the result."""
    before, after = keys(earlier), keys(later)
    return [key for key in before if before[key] != after[key] and not key.startswith(FREE_TO_CHANGE)]


def _earlier_start(folder: Folder) -> Config | None:
    """The configuration in the run directory; None where there is no run yet. Raises UserError where something else is."""
    try:
        names = [name for name in folder.entries() if name[0] != "."]
        if "config.toml" in names:
            return recorded_toml(folder.read_text("config.toml"), str(folder / "config.toml"))
    except OSError as error:
        raise UserError(f"run.dir: {folder} cannot be read ({reason(error)}). Choose another --run.dir.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / 'config.toml'} is not valid TOML: {error}.") from None
    if names:
        raise UserError(f"run.dir: {folder} exists and is not a run of massl-ray. Choose another --run.dir.")
    return None


def _check_same(run: Run, earlier: Config) -> None:
    """What is continued must be the same run: settings and images. Raises UserError."""
    different = differing_keys(earlier, run.config)
    if different:
        before, after = keys(earlier), keys(run.config)
        shown = ", ".join(f"{key} is {before[key]} there and {after[key]} now" for key in different[:5])
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise UserError(
            f"run.dir: {run.folder} belongs to another configuration: {shown}{more}. "
            f"Choose another --run.dir, or continue that run with --config {run.folder / 'config.toml'}."
        )
    try:
        before = json.loads(run.folder.read_text(IMAGES))
    except FileNotFoundError:  # the earlier start ended before it wrote them
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{run.folder / IMAGES} is damaged ({reason(error)}). Choose another --run.dir.") from None
    now = run.images.identity()
    if before != now:
        names = "the same number, but other names" if before["count"] == now["count"] else f"{now['count']:,} of them now"
        raise UserError(
            f"data.source: {run.images.root} no longer holds the images that the run in {run.folder} began with: "
            f"{before['count']:,} then, {names}. Put them back, or choose another --run.dir."
        )


def _windowed(images: Listing, width: int) -> Listing:
    if not width:
        return images
    if images.store.starts is None:
        raise UserError(
            f"data.window is {width} shards, but every image in {images.root} is a file: leave it out, or massl-ray prepare them."
        )
    return replace(images, windows=Windows(images.store.starts, width))


def _normalized(config: Config, images: Listing) -> Config:
    """With data.mean and data.std where they were left empty."""
    data = config.data
    found = {"mean": images.mean, "std": images.std} if len(images.mean) == data.channels else {}
    if not found and data.channels == 1:
        found = IMAGENET_GRAY
    missing = [key for key in ("mean", "std") if not getattr(data, key)]
    if missing and not found:
        raise UserError(
            f"data.{missing[0]} is not known for {data.channels} channels: give {data.channels} values, or run massl-ray prepare "
            f"--channels {data.channels}, which measures them, and train on what it writes."
        )
    return config.model_copy(update={"data": data.model_copy(update={key: found[key] for key in missing})}) if missing else config


def _knn_sides(config: Config, images: Listing) -> tuple[Listing | None, Listing | None]:
    if images.labels is None:
        if config.data.test_source:
            raise UserError(
                f"data.test_source is given, but {images.root} has no labels to compare with: leave it out, or "
                "sort the images into folders."
            )
        return None, None
    if config.data.source == "demo" and not config.data.test_source:
        bank, queries = images, open_source("demo", "test")
    elif config.data.test_source:
        bank, queries = images, _same_classes(_test_images(config), images)
    else:
        bank, queries = hold_out(images)
        if not len(bank) or not len(queries):  # of a few images, the tenth that is held out may be none
            return None, None
    return _at_most(bank, config.eval.max_images), _at_most(queries, config.eval.max_images)


def _test_images(config: Config) -> Listing:
    try:
        return open_source(config.data.test_source or "", "test", config.data.cache_gb)
    except UserError as error:
        raise UserError(str(error).replace("data.source", "data.test_source", 1)) from None


def _same_classes(test: Listing, images: Listing) -> Listing:
    unknown = sorted(set(test.classes) - set(images.classes))
    if test.labels is None or unknown:
        what = f"the class '{unknown[0]}', which data.source lacks" if unknown else "no labels"
        raise UserError(f"data.test_source: {test.root} has {what}. Its classes must be named as those of {images.root}.")
    number = {name: index for index, name in enumerate(images.classes)}
    labels = [number[test.classes[label]] for label in test.labels]
    return replace(test, labels=np.array(labels, dtype=np.int64), classes=images.classes)


def _at_most(listing: Listing, number: int) -> Listing:
    if len(listing) <= number:
        return listing
    return listing.take(np.linspace(0, len(listing) - 1, number).astype(np.int64))
