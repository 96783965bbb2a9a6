"""Checkpoints: what was written comes back to the bit, and whatever breaks, the one before is there."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from massl_ray.storage import Folder
from massl_ray.training import checkpoint as module
from massl_ray.training.checkpoint import (
    MANIFEST,
    STATE,
    CheckpointWriter,
    Damaged,
    NotSaved,
    _rescue_folder,
    list_checkpoints,
    read_checkpoint,
    read_latest,
    read_manifest,
    write_checkpoint,
)
from massl_ray.training.state import state_sha256
from tests.storages import in_memory, on_s3, s3_server


def tensors(step: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(step)
    return {
        "student/weight": torch.randn(3, 5, generator=random),
        "student/half": torch.randn(7, generator=random).bfloat16(),
        "student/empty": torch.empty(0, 4),
        "memory/pointer": torch.tensor(step * 3),
        "flags": torch.tensor([True, False]),
        "odd": torch.tensor([float("nan"), -0.0, float("inf")]),
        "step": torch.tensor(step),
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return (
        set(found) == set(expected)
        and all(found[name].dtype == value.dtype and found[name].shape == value.shape for name, value in expected.items())
        and state_sha256(found) == state_sha256(expected)
    )


def write(folder: Path | Folder, *steps: int, keep: int = 9) -> list[Folder]:
    return [write_checkpoint(folder, tensors(step), {"note": step}, keep) for step in steps]


def steps_in(folder: Path | Folder) -> list[str]:
    """Everything in the folder, finished or not."""
    return sorted(Folder(folder).entries())


def latest_step(folder: Path | Folder) -> int:
    """The newest whole checkpoint, and not a word of warning."""
    found = read_latest(folder)
    assert found is not None
    return int(found[0]["step"])


# ---- round trip ------------------------------------------------------------------------------------------------------


def test_what_was_written_comes_back(tmp_path):
    (path,) = write(tmp_path / "checkpoints", 12)
    assert path == Folder(tmp_path / "checkpoints" / "step_12")
    found, manifest = read_checkpoint(path)
    assert same(found, tensors(12))
    assert torch.equal(found["student/weight"], tensors(12)["student/weight"])
    assert manifest == {"format": 1, "step": 12, "note": 12, "state_sha256": state_sha256(tensors(12))}
    assert path.entries() == [MANIFEST, STATE]


def test_latest_of_none(tmp_path):
    assert read_latest(tmp_path / "missing") is None and list_checkpoints(tmp_path / "missing") == []


def test_checkpoints_are_listed_by_number_and_nothing_else_is(tmp_path):
    write(tmp_path, 9, 100, 20)
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_50").mkdir()  # without a manifest
    shutil.copytree(tmp_path / "step_9", tmp_path / ".unfinished_300")
    shutil.copytree(tmp_path / "step_9", tmp_path / "step_9.old")
    # step_100 was written before step_20, whose writing took it for one of a life that was rolled back
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_9", "step_20"]


# ---- keep ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "left"), [(1, ["step_20"]), (2, ["step_12", "step_20"]), (9, ["step_12", "step_20", "step_4", "step_8"])]
)
def test_only_the_latest_are_kept(tmp_path, keep, left):
    write(tmp_path, 4, 8, 12, 20, keep=keep)
    assert steps_in(tmp_path) == left
    assert latest_step(tmp_path) == 20


def test_checkpoints_of_a_life_that_was_rolled_back_are_dropped(tmp_path):
    write(tmp_path, 4, 8, 12, 16)
    write(tmp_path, 6, keep=2)
    assert steps_in(tmp_path) == ["step_4", "step_6"] and latest_step(tmp_path) == 6


def accuracies(folder: Path, keep: int, **facts) -> list[str]:
    for step, accuracy in facts.items():
        write_checkpoint(folder, tensors(int(step[1:])), {} if accuracy == "none" else {"knn_top1": accuracy}, keep)
    return steps_in(folder)


def test_the_best_is_kept_beside_the_latest(tmp_path):
    assert accuracies(tmp_path, 1, _4=0.5, _8=0.7, _12=0.6, _16="none") == ["step_16", "step_8"]
    assert accuracies(tmp_path, 2, _20=None, _24=0.1) == ["step_20", "step_24", "step_8"]
    assert accuracies(tmp_path, 1, _28=0.8) == ["step_28"]


def test_of_the_best_the_later_one_is_kept(tmp_path):
    assert accuracies(tmp_path, 1, _4=0.5, _8=0.5, _12=float("nan"), _16=0.4) == ["step_16", "step_8"]


def test_the_best_of_a_life_that_was_rolled_back_is_dropped(tmp_path):
    assert accuracies(tmp_path, 1, _4=0.3, _8=0.9, _6=0.1) == ["step_6"]
    assert accuracies(tmp_path, 2, _8=0.3, _10=0.9, _9=0.1) == ["step_8", "step_9"]


def test_a_manifest_that_cannot_be_read_is_not_the_best(tmp_path):
    accuracies(tmp_path, 3, _4=0.3, _8=0.9)
    (tmp_path / "step_8" / MANIFEST).write_text("{")
    assert accuracies(tmp_path, 1, _12=0.1) == ["step_12", "step_4"]


def test_the_same_step_again(tmp_path):
    write(tmp_path, 4, 8)
    changed = tensors(8) | {"odd": torch.tensor([1.0])}
    write_checkpoint(tmp_path, changed, {}, keep=2)
    found = read_latest(tmp_path)
    assert found is not None and same(found[0], changed) and steps_in(tmp_path) == ["step_4", "step_8"]


@settings(deadline=None, max_examples=15)
@given(steps=st.lists(st.integers(1, 30), min_size=1, max_size=6), keep=st.integers(1, 4))
def test_whatever_was_written_last_is_the_latest(tmp_path_factory, steps, keep):
    folder = tmp_path_factory.mktemp("checkpoints")
    for count, step in enumerate(steps, 1):
        write(folder, step, keep=keep)
        assert latest_step(folder) == step
        assert len(list_checkpoints(folder)) <= min(keep, count)


# ---- crashes ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process had ended here."""


OPERATIONS = [
    (module, "save_file"),
    (module, "state_sha256"),
    (module, "to_disk"),
    (Path, "mkdir"),
    (Path, "write_text"),
    (Path, "rename"),
    (shutil, "rmtree"),
    (Folder, "entries"),
    (Folder, "read_text"),
    (Folder, "write_text"),
    (Folder, "upload"),
    (Folder, "delete"),
]


def die_at(monkeypatch, number: int, when: str) -> list[str]:
    """End the process before or after its operation `number` on files, counted from 0. Returns the operations as they come."""
    seen: list[str] = []
    for owner, name in OPERATIONS:
        original = getattr(owner, name)

        def dying(*arguments, original=original, name=name, **options):
            seen.append(name)
            this = len(seen) - 1
            if this == number and when == "before":
                raise Killed
            result = original(*arguments, **options)
            if this == number:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, dying)
    return seen


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return Folder(tmp_path / "run") if request.param == "local" else in_memory()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("step", [12, 8], ids=["a_new_step", "the_same_step"])
def test_a_crash_at_any_point_leaves_a_whole_checkpoint(folder, monkeypatch, when, keep, step):
    """Also without a word of warning: nothing half-written and nothing half-deleted counts."""
    changed = tensors(step) | {"odd": torch.tensor([1.0])}
    number = 0
    for number in range(100):
        life = folder / f"life_{number}"
        write_checkpoint(life, tensors(4), {"knn_top1": 0.9}, keep)
        write(life, 6, 8, keep=keep)
        with monkeypatch.context() as patched:
            seen = die_at(patched, number, when)
            try:
                write_checkpoint(life, changed, {}, keep)
                break  # every operation had its turn
            except Killed:
                pass
        found = read_latest(life)
        assert found is not None
        before = tensors({12: 8, 8: 4 if keep == 1 else 6}[step])  # of the same step, the old one goes before the new one comes
        assert same(found[0], changed) or same(found[0], tensors(8)) or same(found[0], before), seen
        write_checkpoint(life, changed, {}, keep)  # the next life
        assert steps_in(life) == sorted(["step_4", f"step_{step}"] + ([f"step_{ {12: 8, 8: 6}[step] }"] if keep == 2 else []))
        assert same(read_checkpoint(life / f"step_{step}")[0], changed)
    assert 10 < number < 99


def test_half_a_file_is_never_taken_for_a_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 4)

    def half(values, path):
        path.write_bytes((tmp_path / "step_4" / STATE).read_bytes()[:50])
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_file", half)
        with pytest.raises(OSError, match="no space"):
            write(tmp_path, 8)
    assert latest_step(tmp_path) == 4 and list_checkpoints(tmp_path) == [Folder(tmp_path / "step_4")]


def test_half_an_upload_is_never_taken_for_a_checkpoint(monkeypatch):
    folder = in_memory()
    write(folder, 4)
    upload = Folder.upload

    def half(self, local, name):
        local.write_bytes(local.read_bytes()[:50])
        upload(self, local, name)
        raise OSError(errno.ECONNRESET, "connection reset")

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "upload", half)
        with pytest.raises(OSError, match="reset"):
            write(folder, 8)
    assert (folder / "step_8").entries() == [STATE] and latest_step(folder) == 4
    write(folder, 12)
    assert steps_in(folder) == ["step_12", "step_4"]


def test_files_are_on_disk_before_they_are_renamed_and_before_others_are_dropped(tmp_path, monkeypatch):
    write(tmp_path, 4)
    happened: list[str] = []

    def note(name, path):
        happened.append(f"{name} {path.relative_to(tmp_path)}")

    rename, delete = Path.rename, Folder.delete
    monkeypatch.setattr(module, "to_disk", lambda path: note("to_disk", path))
    monkeypatch.setattr(Path, "rename", lambda self, to: note("rename", self) or rename(self, to))
    monkeypatch.setattr(Folder, "delete", lambda self, name: note("delete", self.path / name) or delete(self, name))
    write_checkpoint(tmp_path, tensors(8), {}, 1, lambda step: happened.append(f"publish {step}"))
    assert sorted(happened[:2]) == [f"to_disk .unfinished_8/{name}" for name in (MANIFEST, STATE)]
    assert happened[2:6] == ["to_disk .unfinished_8", "publish 8", "rename .unfinished_8", "to_disk ."]
    assert happened[6:] == [f"delete step_4/{MANIFEST}", f"delete step_4/{STATE}", "delete step_4"]


def test_elsewhere_the_manifest_comes_last(monkeypatch):
    folder, there = in_memory(), []
    write(folder, 4)
    write_checkpoint(folder, tensors(8), {}, 1, lambda step: there.append((step, (folder / f"step_{step}").entries())))
    write_checkpoint(folder, tensors(8), {}, 1, lambda step: there.append((step, (folder / f"step_{step}").entries())))
    assert there == [(8, [STATE])] * 2 and latest_step(folder) == 8


FULL_DISK = """
import resource, sys, torch
from massl_ray.training.checkpoint import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_checkpoint(sys.argv[1], {"step": torch.tensor(8), "rows": torch.zeros(10_000)}, {}, keep=1)
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.slow
def test_a_disk_that_takes_no_more(tmp_path):
    """The kernel itself refuses to let the file grow."""
    write(tmp_path, 4)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "File too large\n" and latest_step(tmp_path) == 4


# ---- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3():
    with s3_server() as options:
        yield options


@pytest.mark.parametrize("place", ["memory", "s3"])
def test_write_list_read_and_prune_elsewhere(place, request):
    folder = in_memory() if place == "memory" else on_s3(request.getfixturevalue("s3"))
    assert list_checkpoints(folder) == [] and read_latest(folder) is None
    write(folder, 4, 8, 12, keep=2)
    assert list_checkpoints(folder) == [folder / "step_8", folder / "step_12"] == list_checkpoints(str(folder))
    found, manifest = read_checkpoint(folder / "step_8")
    assert same(found, tensors(8)) and manifest["note"] == 8 and manifest["state_sha256"] == state_sha256(tensors(8))
    (folder / "step_20").write_text(STATE, "left by a crash")
    write(folder, 10, keep=2)  # rolled back
    assert steps_in(folder) == ["step_10", "step_8"] and latest_step(folder) == 10
    assert folder.files() == [f"step_{step}/{name}" for step in (10, 8) for name in (MANIFEST, STATE)]


def test_damage_elsewhere(tmp_path):
    folder = in_memory()
    write(folder, 4, 8, 12)
    (folder / "step_12").delete(STATE)
    (folder / "step_8").write_text(MANIFEST, "{")
    with pytest.warns(UserWarning) as caught:
        assert latest_step(folder) == 4
    assert ["step_12" in str(caught[0].message), "step_8" in str(caught[1].message)] == [True, True]


@pytest.mark.parametrize("method", ["read_text", "download", "entries"])
def test_an_outage_is_not_taken_for_damage(monkeypatch, method):
    """Else training would start from an older checkpoint, or from scratch, and overwrite what it could not see."""
    folder = in_memory()
    write(folder, 4)

    def outage(*_):
        raise OSError("connection timed out")

    monkeypatch.setattr(Folder, method, outage)
    with pytest.raises(OSError, match="timed out"):
        read_latest(folder)


# ---- damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def garble_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 20 + path.read_bytes()[20:])


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00\x81")


def another_hash(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state_sha256": "0" * 64}))


def no_hash(path: Path) -> None:
    path.write_text('{"format": 1}')


def a_list(path: Path) -> None:
    path.write_text("[1, 2]")


DAMAGES = [
    (STATE, truncate, "cannot be read"),
    (STATE, empty, "cannot be read"),
    (STATE, garble_header, "cannot be read"),
    (STATE, Path.unlink, "cannot be read"),
    (STATE, flip_last_bit, "does not have the state_sha256 of its manifest"),
    (MANIFEST, another_hash, "does not have the state_sha256 of its manifest"),
    (MANIFEST, no_hash, "does not have the state_sha256 of its manifest"),
    (MANIFEST, truncate, "cannot be read"),
    (MANIFEST, empty, "cannot be read"),
    (MANIFEST, binary, "cannot be read"),
    (MANIFEST, a_list, "holds no JSON object"),
]


@pytest.mark.parametrize(("file", "damage", "words"), DAMAGES, ids=[f"{file}_{damage.__name__}" for file, damage, _ in DAMAGES])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, file, damage, words):
    write(tmp_path, 4, 8)
    damage(tmp_path / "step_8" / file)
    with pytest.raises(Damaged, match=words):
        read_checkpoint(tmp_path / "step_8")
    with pytest.warns(UserWarning, match=f"step_8.*{words}.*Using the one before it"):
        found = read_latest(tmp_path)
    assert found is not None and same(found[0], tensors(4)) and found[1]["step"] == 4


def test_tensors_of_another_checkpoint(tmp_path):
    write(tmp_path, 4, 8)
    shutil.copy(tmp_path / "step_4" / STATE, tmp_path / "step_8" / STATE)
    with pytest.warns(UserWarning, match="state_sha256"):
        assert latest_step(tmp_path) == 4


def test_all_damaged(tmp_path):
    write(tmp_path, 4, 8)
    for step in (4, 8):
        flip_last_bit(tmp_path / f"step_{step}" / STATE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_latest(tmp_path) is None
    assert [f"step_{step}" in str(warning.message) for step, warning in zip((8, 4), caught, strict=True)] == [True, True]


def test_a_checkpoint_without_manifest_is_none(tmp_path):
    write(tmp_path, 4, 8)
    (tmp_path / "step_8" / MANIFEST).unlink()
    assert latest_step(tmp_path) == 4
    with pytest.raises(Damaged, match="manifest.json cannot be read"):
        read_manifest(tmp_path / "step_8")


def test_damage_while_an_earlier_one_is_whole_is_overwritten_in_time(tmp_path):
    write(tmp_path, 4, 8)
    flip_last_bit(tmp_path / "step_8" / STATE)
    write(tmp_path, 8, keep=2)
    assert latest_step(tmp_path) == 8


# ---- while training goes on ------------------------------------------------------------------------------------------

NO_SPACE = os.strerror(errno.ENOSPC)
SOON_S = 60.0  # what is waited for comes at once; a test that fails should end


class Storage:
    """save_file under control: `full` writes fail, and while `gate` is closed they wait. `entered` counts them."""

    def __init__(self, monkeypatch):
        self.full, self.gate, self.entered = 0, threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.save_file = module.save_file
        monkeypatch.setattr(module, "save_file", self)

    def __call__(self, values, path):
        self.entered.release()
        assert self.gate.wait(SOON_S)
        if self.full:
            self.full -= 1
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, NO_SPACE)
        self.save_file(values, path)

    def wait_entered(self):
        assert self.entered.acquire(timeout=SOON_S)


@pytest.fixture
def storage(monkeypatch):
    return Storage(monkeypatch)


@pytest.fixture
def notes():
    return []


def test_saving_returns_at_once_and_a_newer_one_replaces_the_one_that_waits(tmp_path, storage, notes):
    storage.gate.clear()
    writer = CheckpointWriter(tmp_path, 9, notes.append)
    assert writer.wait(0)
    writer.save(tensors(4), {"note": 4})
    storage.wait_entered()
    for step in (8, 12, 16):
        writer.save(tensors(step), {"note": step})
    assert not writer.wait(0) and writer.last_written is None and list_checkpoints(tmp_path) == []
    storage.gate.set()
    assert writer.wait(SOON_S) and writer.last_written == 16
    assert steps_in(tmp_path) == ["step_16", "step_4"] and notes == []
    assert read_checkpoint(tmp_path / "step_16")[1]["note"] == 16
    writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        writer.save(tensors(20), {})


def test_a_full_disk_does_not_stop_training(tmp_path, storage, notes):
    writer = CheckpointWriter(tmp_path, 2, notes.append, pauses_s=(0.0, 0.001))
    writer.save(tensors(4), {})
    assert writer.wait(SOON_S)
    storage.full = 2
    writer.save(tensors(40), {})
    assert writer.wait(SOON_S) and writer.last_written == 40
    failed = f"Checkpoint of step 40 could not be written to {tmp_path}: {NO_SPACE}. Training goes on; trying again in 0 s."
    assert notes == [failed, failed, f"{tmp_path} can be written to again: checkpoint of step 40 is saved."]
    assert steps_in(tmp_path) == ["step_4", "step_40"] and latest_step(tmp_path) == 40
    writer.save(tensors(44), {})
    writer.close()
    assert len(notes) == 3 and latest_step(tmp_path) == 44


def test_while_storage_fails_a_newer_one_takes_the_place(tmp_path, storage, notes):
    storage.full = 1
    storage.gate.clear()
    writer = CheckpointWriter(tmp_path, 9, notes.append, pauses_s=(0.0,))
    writer.save(tensors(4), {})
    storage.wait_entered()
    writer.save(tensors(8), {})
    storage.gate.set()
    writer.close(SOON_S)
    assert steps_in(tmp_path) == ["step_8"]
    assert "step 4 could not" in notes[0] and notes[1].endswith("checkpoint of step 8 is saved.") and len(notes) == 2


def test_pauses_grow_to_a_minute(tmp_path, storage, notes, monkeypatch):
    waited = []

    class Condition(threading.Condition):
        def wait_for(self, predicate, timeout=None):
            if threading.current_thread().name == "checkpoints" and timeout is not None:
                waited.append(timeout)
                timeout = 0
            return super().wait_for(predicate, timeout)

    monkeypatch.setattr(threading, "Condition", Condition)
    storage.full = 7
    writer = CheckpointWriter(tmp_path, 1, notes.append)
    writer.save(tensors(4), {})
    assert writer.wait(SOON_S)
    assert waited == [5, 10, 20, 40, 60, 60, 60] and notes[1].endswith(f"{NO_SPACE}. Training goes on; trying again in 10 s.")
    storage.full = 1
    writer.save(tensors(8), {})
    writer.close(SOON_S)
    assert waited[7:] in ([5], [])  # from the start again; none if close() came first


def test_a_place_that_comes_back(tmp_path, notes):
    """A file stands where the run directory should be, until it goes."""
    (tmp_path / "run").touch()

    def note(text):
        notes.append(text)
        if len(notes) == 1:
            (tmp_path / "run").unlink()

    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", 1, note, pauses_s=(0.0,))
    writer.save(tensors(4), {})
    assert writer.wait(SOON_S) and latest_step(tmp_path / "run" / "checkpoints") == 4
    assert "Not a directory" in notes[0] and "can be written to again" in notes[1]


@pytest.fixture
def rescue_dir(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"massl-ray-rescue-{os.getuid()}"


def test_what_cannot_be_saved_is_rescued(tmp_path, rescue_dir, notes):
    (tmp_path / "run").touch()
    folder = tmp_path / "run" / "checkpoints"
    for step in (4, 8):  # two lives: the second one's rescue takes the place of the first one's
        writer = CheckpointWriter(folder, 2, notes.append, pauses_s=(0.0, 100.0))
        writer.save(tensors(step), {"note": step})
        with pytest.raises(NotSaved) as ended:
            writer.close(patience_s=50)
        assert writer.last_written is None
    (rescued,) = rescue_dir.glob("*/checkpoints/step_*")
    assert str(ended.value).startswith(
        f"Checkpoint of step 8 could not be written to {folder}: Not a directory. It is in {rescued} on "
    )
    assert str(ended.value).endswith(f"copy that folder into {folder}, then start the run again.")
    (tmp_path / "run").unlink()
    shutil.copytree(rescued, folder / rescued.name)
    found = read_latest(folder)
    assert found is not None and same(found[0], tensors(8)) and found[1]["note"] == 8


def test_where_nothing_can_be_rescued(tmp_path, rescue_dir, notes):
    rescue_dir.parent.rmdir()
    (tmp_path / "run").touch()
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", 2, notes.append, pauses_s=(100.0,))
    writer.save(tensors(4), {})
    with pytest.raises(NotSaved, match=f"Nor to {rescue_dir.parent}: No such file or directory. Free or mend one"):
        writer.close(patience_s=50)


@pytest.mark.parametrize("trap", ["a link", "open to others"])
def test_a_rescue_folder_that_somebody_else_may_have_made_is_not_used(tmp_path, rescue_dir, notes, trap):
    if trap == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        rescue_dir.symlink_to(tmp_path / "elsewhere")
    else:
        rescue_dir.mkdir(mode=0o777)
        rescue_dir.chmod(0o777)
    (tmp_path / "run").touch()
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", 2, notes.append, pauses_s=(100.0,))
    writer.save(tensors(4), {})
    with pytest.raises(NotSaved, match=f"It is in {rescue_dir}-"):
        writer.close(patience_s=50)
    assert not list(rescue_dir.iterdir())
    (made,) = rescue_dir.parent.glob(f"{rescue_dir.name}-*")
    assert made.stat().st_mode & 0o777 == 0o700 and same(read_checkpoint(next(made.glob("*/*/step_4")))[0], tensors(4))


def test_the_rescue_folder_is_closed_to_others(rescue_dir):
    assert _rescue_folder() == _rescue_folder() == rescue_dir and rescue_dir.stat().st_mode & 0o777 == 0o700


def test_clean_up_leaves_what_is_not_its_own(tmp_path):
    """An archive behind a link, and somebody's notes."""
    folder, archive = tmp_path / "checkpoints", tmp_path / "archive"
    write_checkpoint(archive, tensors(1), {}, keep=1)
    (folder / "step_99").mkdir(parents=True)
    (folder / "step_99" / "notes.txt").write_text("mine")
    (folder / "step_1").symlink_to(archive / "step_1")
    for step in (2, 3, 99, 100, 101):
        write_checkpoint(folder, tensors(step), {}, keep=1)
    assert same(read_checkpoint(archive / "step_1")[0], tensors(1)) and (folder / "step_1").is_symlink()
    assert (folder / "step_99" / "notes.txt").read_text() == "mine"
    assert [path.name for path in sorted(folder.iterdir())] == ["step_1", "step_101", "step_99"]
    assert [path.name for path in (folder / "step_99").iterdir()] == ["notes.txt"]


def test_storage_that_hangs_does_not_hold_up_the_end(rescue_dir, storage, notes, monkeypatch):
    folder, gate, upload = in_memory(), threading.Event(), Folder.upload
    monkeypatch.setattr(Folder, "upload", lambda *arguments: gate.wait(SOON_S) and upload(*arguments))
    writer = CheckpointWriter(folder, 2, notes.append)
    writer.save(tensors(4), {})
    storage.wait_entered()
    with pytest.raises(NotSaved, match="step 4 could not be written to memory://.*: it takes longer than 0 s. It is in "):
        writer.close(patience_s=0)
    (rescued,) = rescue_dir.glob("*/checkpoints/step_*")
    assert same(read_checkpoint(rescued)[0], tensors(4))
    gate.set()
    writer._thread.join(SOON_S)


def test_closing_ends_a_pause(tmp_path, storage, notes):
    """The pause is an hour, the patience longer: without the early end this test would not return."""
    paused = threading.Event()
    storage.full = 1
    writer = CheckpointWriter(tmp_path, 1, lambda text: notes.append(text) or paused.set(), pauses_s=(3600.0,))
    writer.save(tensors(4), {})
    assert paused.wait(SOON_S)
    writer.close(patience_s=7200)
    assert latest_step(tmp_path) == 4 and len(notes) == 2


def test_before_publish_is_called_when_the_data_is_there_and_the_checkpoint_is_not(tmp_path, notes):
    seen = []

    def before_publish(step):
        (unfinished,) = tmp_path.iterdir()
        seen.append((step, sorted(path.name for path in unfinished.iterdir()), len(list_checkpoints(tmp_path))))
        seen.append(threading.current_thread().name)
        if len(seen) == 2:
            raise OSError("metrics could not be flushed")

    writer = CheckpointWriter(tmp_path, 1, notes.append, before_publish, pauses_s=(0.0,))
    writer.save(tensors(4), {})
    writer.close(SOON_S)
    assert seen == [(4, [MANIFEST, STATE], 0), "checkpoints"] * 2
    assert "metrics could not be flushed" in notes[0] and latest_step(tmp_path) == 4


def test_a_note_that_nobody_takes_loses_no_checkpoint(tmp_path, storage, capsys):
    def gone(text):
        raise RuntimeError("nobody listens")

    storage.full = 1
    writer = CheckpointWriter(tmp_path, 1, gone, pauses_s=(0.0,))
    writer.save(tensors(4), {})
    writer.close(SOON_S)
    assert latest_step(tmp_path) == 4
    failed, again = capsys.readouterr().err.splitlines()
    assert "step 4 could not be written" in failed and failed.endswith("(This could not be told: nobody listens)")
    assert "can be written to again" in again


def test_closing_with_nothing_to_write(tmp_path, notes):
    writer = CheckpointWriter(tmp_path / "run", 1, notes.append)
    writer.close(0)
    assert not (tmp_path / "run").exists() and notes == [] and writer.wait(0)
