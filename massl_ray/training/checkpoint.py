"""Checkpoints: checkpoints/step_N/{manifest.json, state.safetensors} on disk or at a URI. One without manifest does not count."""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from massl_ray.storage import Folder, Place, reason, to_disk
from massl_ray.training.state import state_sha256

STATE, MANIFEST, FORMAT = "state.safetensors", "manifest.json", 1
UNFINISHED = ".unfinished_"
PAUSES_S = (5.0, 10.0, 20.0, 40.0, 60.0)  # between attempts to write; the last one from then on


class Damaged(Exception):
    """A checkpoint that is not what its manifest says."""


class NotSaved(Exception):
    """The last state of a run is not where it should be: one sentence saying why, where it is, and what to do."""


class CheckpointWriter:
    """Writes checkpoints while training goes on, in one thread of its own. Storage that fails does not stop training.

    Args:
        folder, keep: as for write_checkpoint.
        note: takes a sentence for the user; called in the thread.
        before_publish: as for write_checkpoint; called in the thread. What it raises counts as a failed write.
        pauses_s: seconds between attempts; the last one from then on.
    """

    def __init__(
        self,
        folder: Place,
        keep: int,
        note: Callable[[str], None],
        before_publish: Callable[[int], None] = lambda step: None,
        pauses_s: Sequence[float] = PAUSES_S,
    ):
        self.folder, self.keep, self.note, self.before_publish, self.pauses_s = Folder(folder), keep, note, before_publish, pauses_s
        self.last_written: int | None = None  # step
        self._newest: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None  # handed in and not yet written
        self._failures, self._error = 0, ""  # since the last success
        self._deadline: float | None = None  # by time.monotonic; set when closing
        self._changed = threading.Condition()  # guards all of the above
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Hand in a state, on the CPU and the writer's own from now on. Returns at once."""
        with self._changed:
            if self._deadline is not None:
                raise RuntimeError("this CheckpointWriter is closed")
            # One that still waits is replaced: only the newest is of use after a crash, and while storage is slow a queue of
            # whole states would fill the memory.
            self._newest = (tensors, facts)
            self._changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until everything handed in is written; False if `timeout_s` passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._newest is None, timeout_s)

    def close(self, patience_s: float = 300.0) -> None:
        """Wait until the last state is written, retrying for at most `patience_s`; then put it on this machine's disk instead.

        Raises NotSaved in the second case.
        """
        with self._changed:
            self._deadline = time.monotonic() + patience_s
            self._changed.notify_all()
        self._thread.join(patience_s)  # a daemon: if it hangs in the storage, it is left behind
        with self._changed:
            job, error = self._newest, self._error or f"it takes longer than {patience_s:.0f} s"
        if job is not None:
            raise NotSaved(self._rescue(*job, error))

    def _work(self) -> None:
        while self._attempt():
            pass

    def _attempt(self) -> bool:
        """Wait for a state and try to write it. Returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self._deadline is not None)
            job = self._newest
        if job is None:
            return False
        step = int(job[0]["step"])
        try:
            write_checkpoint(self.folder, *job, self.keep, self.before_publish)
        except Exception as error:  # whatever it is, training goes on; close() says so if it stays
            return self._failed(step, reason(error))
        if self._failures:
            self._say(f"{self.folder} can be written to again: checkpoint of step {step} is saved.")
        with self._changed:
            self.last_written, self._failures, self._error = step, 0, ""
            if self._newest is job:
                self._newest = None
            self._changed.notify_all()
        return True

    def _failed(self, step: int, error: str) -> bool:
        pause_s = self.pauses_s[min(self._failures, len(self.pauses_s) - 1)]
        with self._changed:
            self._failures, self._error = self._failures + 1, error
            closing = self._deadline is not None
            if self._deadline is not None and time.monotonic() + pause_s > self._deadline:
                return False
        next_attempt = f"{'Trying' if closing else 'Training goes on; trying'} again in {pause_s:.0f} s."
        self._say(f"Checkpoint of step {step} could not be written to {self.folder}: {error}. {next_attempt}")
        with self._changed:  # close() ends the pause
            self._changed.wait_for(lambda: closing != (self._deadline is not None), pause_s)
        return True

    def _say(self, text: str) -> None:
        try:
            self.note(text)
        except Exception as error:  # nobody listens any more: no reason to lose a checkpoint
            print(f"massl-ray: {text} (This could not be told: {reason(error)})", file=sys.stderr)

    def _rescue(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], error: str) -> str:
        """Write the state under the temporary folder, in a place that is the same for every attempt of one run."""
        run = hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]
        failed = f"Checkpoint of step {int(tensors['step'])} could not be written to {self.folder}: {error}."
        try:
            rescued = write_checkpoint(_rescue_folder() / run / "checkpoints", tensors, facts, keep=1)
        except Exception as second:
            nor = f"Nor to {tempfile.gettempdir()}: {reason(second)}."
            return f"{failed} {nor} Free or mend one of them and run again from the last checkpoint."
        where = f"It is in {rescued} on {socket.gethostname()}"
        return f"{failed} {where}: copy that folder into {self.folder}, then start the run again."


def _rescue_folder() -> Path:
    """A folder under the temporary one, where anybody may make what they like, that only this user can enter: the same one each
    time, unless somebody else was there first."""
    folder = Path(tempfile.gettempdir()) / f"massl-ray-rescue-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()  # of a link itself
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
    return folder


def write_checkpoint(
    folder: Place,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    keep: int,
    before_publish: Callable[[int], None] = lambda step: None,
) -> Folder:
    """Write one checkpoint of a run, then drop all but the `keep` latest up to it and the best: that of the highest `knn_top1`
    among the facts, the later one on ties. Later ones than this are of a life that was rolled back, and are dropped.
    A crash at any point leaves the earlier ones whole; what it leaves behind is removed at the next write.

    Args:
        tensors: the state, on the CPU; its step is in `step`.
        facts: go into the manifest beside format, step and state_sha256.
        before_publish: called with the step once the data is written, before the checkpoint counts.

    Returns the checkpoint's folder. Raises OSError where the storage fails.
    """
    folder, step = Folder(folder), int(tensors["step"])
    for name in folder.entries():
        if name.startswith(UNFINISHED) and not _is_link(folder, name):
            folder.delete(name)
        elif step_of(name) is not None and MANIFEST not in (folder / name).entries():
            _discard(folder, name)
    manifest = json.dumps({"format": FORMAT, "step": step, **facts, "state_sha256": state_sha256(tensors)}, indent=2)
    if folder.is_local:
        _write_local(folder.path, step, tensors, manifest, before_publish)
    else:
        _write_remote(folder / f"step_{step}", step, tensors, manifest, before_publish)
    _drop_old(folder, step, keep)
    return folder / f"step_{step}"


def list_checkpoints(folder: Place) -> list[Folder]:
    """Finished checkpoints, oldest first. Raises OSError where the storage fails."""
    folder = Folder(folder)
    steps = sorted(step for name in folder.entries() if (step := step_of(name)) is not None)
    found = [folder / f"step_{step}" for step in steps]
    return [checkpoint for checkpoint in found if MANIFEST in checkpoint.entries()]


def read_manifest(checkpoint: Place) -> dict[str, Any]:
    """Raises Damaged, and OSError where a storage elsewhere fails."""
    checkpoint = Folder(checkpoint)
    try:
        manifest = json.loads(checkpoint.read_text(MANIFEST))
    except (OSError, ValueError, RecursionError) as error:
        _reraise_outage(checkpoint, error)
        raise Damaged(f"{checkpoint / MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict):
        raise Damaged(f"{checkpoint / MANIFEST} holds no JSON object")
    return manifest


def read_checkpoint(checkpoint: Place) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest, verified. No code in the files is executed. Raises Damaged, and OSError where a storage elsewhere
    fails."""
    checkpoint = Folder(checkpoint)
    manifest = read_manifest(checkpoint)
    try:
        tensors = _load(checkpoint)
    except Exception as error:  # safetensors raises its own and OS errors
        _reraise_outage(checkpoint, error)
        raise Damaged(f"{checkpoint / STATE} cannot be read: {error}") from None
    if state_sha256(tensors) != manifest.get("state_sha256"):
        raise Damaged(f"{checkpoint / STATE} does not have the state_sha256 of its manifest")
    return tensors, manifest


def read_latest(folder: Place) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None; a damaged one is named in a warning and the one before it used. Raises
    OSError where a storage elsewhere fails."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(checkpoint)
        except Damaged as error:
            warnings.warn(f"Checkpoint passed over: {error}. Using the one before it, if there is one.", stacklevel=2)
    return None


def _write_local(
    folder: Path, step: int, tensors: Mapping[str, Tensor], manifest: str, before_publish: Callable[[int], None]
) -> None:
    target, unfinished, before = folder / f"step_{step}", folder / f"{UNFINISHED}{step}", folder / f"{UNFINISHED}{step}_before"
    unfinished.mkdir(parents=True)
    _save(tensors, unfinished / STATE)
    (unfinished / MANIFEST).write_text(manifest)
    for file in unfinished.iterdir():
        to_disk(file)
    to_disk(unfinished)
    before_publish(step)
    if target.exists():  # the same step again, after a roll-back
        target.rename(before)
    unfinished.rename(target)
    to_disk(folder)
    if before.is_symlink():
        before.unlink()
    elif before.exists():
        for file in before.iterdir():
            if file.name not in (MANIFEST, STATE):  # somebody's notes
                file.rename(target / file.name)
        shutil.rmtree(before, ignore_errors=True)


def _write_remote(
    target: Folder, step: int, tensors: Mapping[str, Tensor], manifest: str, before_publish: Callable[[int], None]
) -> None:
    with tempfile.TemporaryDirectory(prefix="massl-ray-") as local:
        _save(tensors, Path(local) / STATE)
        target.delete(MANIFEST)  # the same step again must not count while its state is replaced
        target.upload(Path(local) / STATE, STATE)
    before_publish(step)
    target.write_text(MANIFEST, manifest)


def _drop_old(folder: Folder, step: int, keep: int) -> None:
    written = list_checkpoints(folder)
    ours = [checkpoint for checkpoint in written if (step_of(checkpoint.name) or 0) <= step]
    kept = ours[-keep:] + _best(ours)
    for checkpoint in written:
        if checkpoint not in kept:
            _discard(folder, checkpoint.name)


def _discard(folder: Folder, name: str) -> None:
    """Delete the files of a checkpoint, and its folder where nothing else is in it; a link to a folder elsewhere stays with all
    that it leads to."""
    if _is_link(folder, name):
        return
    for file in (MANIFEST, STATE):  # the manifest first, so that half a deletion is not taken for damage
        (folder / name).delete(file)
    if not (folder / name).entries():
        folder.delete(name)


def _is_link(folder: Folder, name: str) -> bool:
    return folder.is_local and (folder.path / name).is_symlink()


def _best(checkpoints: list[Folder]) -> list[Folder]:
    """The checkpoint of the highest k-NN accuracy, the last of them on ties; none where it was never measured."""
    best, highest = [], -math.inf
    for checkpoint in checkpoints:
        try:
            accuracy = read_manifest(checkpoint).get("knn_top1")
        except Damaged:
            continue
        if isinstance(accuracy, int | float) and accuracy >= highest:
            best, highest = [checkpoint], accuracy
    return best


def step_of(name: str) -> int | None:
    """The N of step_N; None for any other name."""
    match = re.fullmatch(r"step_(0|[1-9][0-9]*)", name)
    return int(match[1]) if match else None


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # it puts a full disk into its own words
        number = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error


def _load(checkpoint: Folder) -> dict[str, Tensor]:
    if checkpoint.is_local:
        return load_file(checkpoint.path / STATE)
    with tempfile.TemporaryDirectory(prefix="massl-ray-") as local:
        checkpoint.download(STATE, Path(local) / STATE)
        return load_file(Path(local) / STATE)


def _reraise_outage(checkpoint: Folder, error: Exception) -> None:
    """A storage that cannot be reached says nothing about the checkpoint: passing it over would throw training time away."""
    if not checkpoint.is_local and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise error
