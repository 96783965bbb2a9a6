"""Checkpoints on disk: checkpoints/step_N/{manifest.json, state.safetensors}, written aside and renamed."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from massl_ray.training.state import state_sha256

STATE, MANIFEST, FORMAT = "state.safetensors", "manifest.json", 1


class Damaged(Exception):
    """A checkpoint that is not what its manifest says."""


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int) -> Path:
    """Write one checkpoint of a run, then drop all but the `keep` latest up to it; later ones are of a life that was rolled
    back. A crash at any point leaves the earlier ones whole.

    `facts` goes into the manifest beside format, step and state_sha256. Returns the checkpoint's folder.
    """
    step = int(tensors["step"])
    target, unfinished = folder / f"step_{step}", folder / f".unfinished_{step}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(dict(tensors), unfinished / STATE)
    manifest = {"format": FORMAT, "step": step, **facts, "state_sha256": state_sha256(tensors)}
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for file in unfinished.iterdir():
        _to_disk(file)
    if target.exists():  # the same step again, after a roll-back
        shutil.rmtree(target)
    unfinished.rename(target)
    _to_disk(folder)
    written = list_checkpoints(folder)
    current = written.index(target) + 1
    for dropped in written[: max(0, current - keep)] + written[current:]:
        shutil.rmtree(dropped)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal() and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise Damaged(f"{checkpoint / MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict):
        raise Damaged(f"{checkpoint / MANIFEST} holds no JSON object")
    return manifest


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest, verified. No code in the files is executed. Raises Damaged."""
    manifest = read_manifest(checkpoint)
    try:
        tensors = load_file(checkpoint / STATE)
    except Exception as error:  # safetensors raises its own and OS errors
        raise Damaged(f"{checkpoint / STATE} cannot be read: {error}") from None
    if state_sha256(tensors) != manifest.get("state_sha256"):
        raise Damaged(f"{checkpoint / STATE} does not have the state_sha256 of its manifest")
    return tensors, manifest


def read_latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None; a damaged one is named in a warning and the one before it used."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(checkpoint)
        except Damaged as error:
            warnings.warn(f"Checkpoint passed over: {error}. Using the one before it, if there is one.", stacklevel=2)
    return None


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
