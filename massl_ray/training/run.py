"""A run before it starts: images found, settings resolved, directory claimed. Everything that can be refused is refused here."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from massl_ray.config import Config, Resolved, fill, keys, read_toml, resolve, to_toml, validate
from massl_ray.data.sources import Listing, hold_out, open_source, probe
from massl_ray.errors import UserError
from massl_ray.method.network import check_backbone

FREE_TO_CHANGE = (
    "run.dir",
    "data.max_skipped",
    "train.log_every",
    "train.checkpoint_every",
    "checkpoint.",
    "eval.knn_every",
    "elastic.",
)
"""Settings that leave the result alone, so that a run may be continued with others."""


@dataclass(frozen=True)
class Run:
    """Plain values: sent to every worker as it is."""

    config: Config  # with every 'auto' that the data set decides filled in
    resolved: Resolved
    images: Listing
    bank: Listing | None  # k-NN: labelled images to compare with, None without labels
    queries: Listing | None  # k-NN: labelled images to classify

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir).absolute()

    @property
    def checkpoints(self) -> Path:
        return self.dir / "checkpoints"


def prepare_run(config: Config) -> Run:
    """Find and probe the images, resolve the settings, check the model's name and the directory.

    Raises:
        UserError: anything that is the user's to mend. No worker has started and nothing was written then.
    """
    check_backbone(config)
    images = open_source(config.data.source)
    probe(images, config.data.max_skipped)
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
    _check_directory(run)
    return run


def claim_directory(run: Run) -> None:
    """Create the run directory and write config.toml, unless an earlier start did."""
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        (run.dir / "eval").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir: {run.dir} cannot be created ({error.strerror}). Choose another --run.dir.") from None
    write_atomically(run.dir / "config.toml", to_toml(run.config))


def write_atomically(path: Path, text: str) -> None:
    """Write aside, then rename: readers see the old file or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


def write_json(path: Path, value: object) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def differing_keys(earlier: Config, later: Config) -> list[str]:
    """Settings that differ and matter to the result."""
    before, after = keys(earlier), keys(later)
    return [key for key in before if before[key] != after[key] and not key.startswith(FREE_TO_CHANGE)]


def _check_directory(run: Run) -> None:
    path = run.dir / "config.toml"
    if not path.exists():
        if run.dir.exists() and (not run.dir.is_dir() or any(entry.name[0] != "." for entry in run.dir.iterdir())):
            raise UserError(f"run.dir: {run.dir} exists and is not a run of massl-ray. Choose another --run.dir.")
        return
    earlier = validate(read_toml(path))
    different = differing_keys(earlier, run.config)
    if different:
        before, after = keys(earlier), keys(run.config)
        shown = ", ".join(f"{key} is {before[key]} there and {after[key]} now" for key in different[:5])
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise UserError(
            f"run.dir: {run.dir} belongs to another configuration: {shown}{more}. "
            f"Choose another --run.dir, or continue that run with --config {path}."
        )


def _knn_sides(config: Config, images: Listing) -> tuple[Listing | None, Listing | None]:
    if images.labels is None:
        if config.data.test_source:
            raise UserError(
                f"data.test_source is given, but {images.root} has no class folders to compare with: leave it out, or "
                "sort the images into folders."
            )
        return None, None
    if config.data.source == "demo" and not config.data.test_source:
        bank, queries = images, open_source("demo", "test")
    elif config.data.test_source:
        bank, queries = images, _same_classes(open_source(config.data.test_source), images)
    else:
        bank, queries = hold_out(images)
        if not len(bank) or not len(queries):  # of a few images, the tenth that is held out may be none
            return None, None
    return _at_most(bank, config.eval.max_images), _at_most(queries, config.eval.max_images)


def _same_classes(test: Listing, images: Listing) -> Listing:
    unknown = sorted(set(test.classes) - set(images.classes))
    if test.labels is None or unknown:
        what = f"the class '{unknown[0]}', which data.source lacks" if unknown else "no class folders"
        raise UserError(f"data.test_source: {test.root} has {what}. Its folders must be named as those of {images.root}.")
    number = {name: index for index, name in enumerate(images.classes)}
    labels = [number[test.classes[label]] for label in test.labels]
    return Listing(test.root, test.paths, np.array(labels, dtype=np.int64), images.classes)


def _at_most(listing: Listing, number: int) -> Listing:
    if len(listing) <= number:
        return listing
    return listing.take(np.linspace(0, len(listing) - 1, number).astype(np.int64))
