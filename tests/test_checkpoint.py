"""Checkpoints: what was written comes back to the bit, and whatever breaks, the one before is there."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from massl_ray.training import checkpoint as module
from massl_ray.training.checkpoint import (
    MANIFEST,
    STATE,
    Damaged,
    list_checkpoints,
    read_checkpoint,
    read_latest,
    read_manifest,
    write_checkpoint,
)
from massl_ray.training.state import state_sha256


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


def write(folder: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [write_checkpoint(folder, tensors(step), {"note": step}, keep) for step in steps]


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def latest_step(folder: Path) -> int:
    """The newest whole checkpoint, and not a word of warning."""
    found = read_latest(folder)
    assert found is not None
    return int(found[0]["step"])


# ---- round trip ------------------------------------------------------------------------------------------------------


def test_what_was_written_comes_back(tmp_path):
    (path,) = write(tmp_path / "checkpoints", 12)
    assert path == tmp_path / "checkpoints" / "step_12"
    found, manifest = read_checkpoint(path)
    assert same(found, tensors(12))
    assert torch.equal(found["student/weight"], tensors(12)["student/weight"])
    assert manifest == {"format": 1, "step": 12, "note": 12, "state_sha256": state_sha256(tensors(12))}
    assert sorted(file.name for file in path.iterdir()) == [MANIFEST, STATE]


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


def die_after(monkeypatch, owner, name: str, calls: int = 0) -> None:
    """Make `owner.name` end the process at call number `calls`."""
    original, seen = getattr(owner, name), []

    def dying(*arguments, **options):
        seen.append(1)
        if len(seen) > calls:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, dying)


CRASHES = [
    (module, "save_file", 0),
    (module, "state_sha256", 0),
    (module.json, "dumps", 0),
    (os, "fsync", 0),
    (os, "fsync", 1),
    (Path, "rename", 0),
    (os, "fsync", 2),
    (module, "list_checkpoints", 0),
]


@pytest.mark.parametrize("crash", CRASHES, ids=[f"{name}_{calls}" for _, name, calls in CRASHES])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_point_leaves_a_whole_checkpoint(tmp_path, monkeypatch, crash, keep):
    write(tmp_path, 4, 8, keep=keep)
    with monkeypatch.context() as patched:
        die_after(patched, *crash)
        with pytest.raises(Killed):
            write(tmp_path, 12, keep=keep)
    renamed = CRASHES.index(crash) > 5
    found = read_latest(tmp_path)
    assert found is not None and same(found[0], tensors(12 if renamed else 8))
    write(tmp_path, 12, keep=keep)  # the next life
    assert steps_in(tmp_path) == (["step_12"] if keep == 1 else ["step_12", "step_8"])


def test_half_a_file_is_never_taken_for_a_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 4)

    def half(values, path):
        path.write_bytes((tmp_path / "step_4" / STATE).read_bytes()[:50])
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_file", half)
        with pytest.raises(OSError, match="no space"):
            write(tmp_path, 8)
    assert latest_step(tmp_path) == 4 and list_checkpoints(tmp_path) == [tmp_path / "step_4"]


def test_files_are_on_disk_before_they_are_renamed_and_before_others_are_dropped(tmp_path, monkeypatch):
    write(tmp_path, 4)
    happened: list[str] = []
    for owner, name in ((module, "_to_disk"), (Path, "rename"), (shutil, "rmtree")):
        original = getattr(owner, name)

        def noted(path, *arguments, original=original, name=name, **options):
            happened.append(f"{name} {path.relative_to(tmp_path)}")
            return original(path, *arguments, **options)

        monkeypatch.setattr(owner, name, noted)
    write(tmp_path, 8, keep=1)
    assert happened[0] == "rmtree .unfinished_8"
    assert sorted(happened[1:3]) == [f"_to_disk .unfinished_8/{name}" for name in (MANIFEST, STATE)]
    assert happened[3:] == ["rename .unfinished_8", "_to_disk .", "rmtree step_4"]


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
