"""A mirrored run directory: all small files get there and back, each only when it changed."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from massl_ray.storage import Folder
from massl_ray.training.mirror import Mirror
from tests.storages import in_memory, on_s3, s3_server

SMALL = ["config.toml", "eval/knn_step_4.json", "metrics.jsonl", "tensorboard/deep/events.0"]
NOT_MIRRORED = [".lock", ".ray/state", "checkpoints/step_4/manifest.json", "eval/.knn.json.123"]


def fill(folder: Folder, *names: str) -> None:
    for name in names:
        folder.write_text(name, f"content of {name}")


@pytest.fixture
def local(tmp_path):
    return Folder(tmp_path / "run")


@pytest.fixture
def uploads(monkeypatch):
    names, upload = [], Folder.upload
    monkeypatch.setattr(Folder, "upload", lambda self, path, name: names.append(name) or upload(self, path, name))
    return names


@pytest.mark.parametrize("place", ["memory", "s3"])
def test_there_and_back(local, tmp_path, place):
    with s3_server() if place == "s3" else nullcontext("") as options:
        remote = on_s3(options) if place == "s3" else in_memory()
        fill(local, *SMALL, *NOT_MIRRORED)
        assert Mirror(local.path, remote).push()
        assert remote.files() == SMALL
        fill(remote, *NOT_MIRRORED)
        again = Folder(tmp_path / "again")
        Mirror(again.path, remote).pull()
        assert again.files() == SMALL
        assert all(again.read_text(name) == f"content of {name}" for name in SMALL)


def test_a_folder_named_checkpoints_further_down_is_mirrored(local):
    remote = in_memory()
    fill(local, "eval/checkpoints/x", "checkpoints.json")
    assert Mirror(local.path, remote).push() and remote.files() == ["checkpoints.json", "eval/checkpoints/x"]


def test_only_what_changed_is_pushed(local, uploads):
    mirror = Mirror(local.path, in_memory())
    fill(local, *SMALL)
    assert mirror.push() and mirror.push() and sorted(uploads) == SMALL
    uploads.clear()
    path = local.path / "metrics.jsonl"
    path.write_text("longer and longer and longer")
    fill(local, "new.txt")
    assert mirror.push() and uploads == ["metrics.jsonl", "new.txt"]
    assert mirror.remote.read_text("metrics.jsonl") == "longer and longer and longer"
    uploads.clear()
    path.write_text("another text, as long as one")  # same size
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert mirror.push() and uploads == ["metrics.jsonl"]
    assert mirror.remote.read_text("metrics.jsonl") == "another text, as long as one"


def test_pull_leaves_what_is_here_alone_and_push_does_not_return_what_came(local, uploads):
    remote = in_memory()
    fill(remote, "config.toml", "metrics.jsonl")
    local.write_text("metrics.jsonl", "newer")
    mirror = Mirror(local.path, remote)
    mirror.pull()
    assert local.read_text("metrics.jsonl") == "newer" and local.read_text("config.toml") == "content of config.toml"
    assert mirror.push() and uploads == ["metrics.jsonl"] and remote.read_text("metrics.jsonl") == "newer"


def test_pull_from_nothing_and_push_of_nothing(local):
    mirror = Mirror(local.path, in_memory())
    mirror.pull()
    assert mirror.push() and mirror.remote.files() == local.files() == []


def test_what_fails_is_pushed_the_next_time(local, monkeypatch):
    mirror, upload, tried = Mirror(local.path, in_memory()), Folder.upload, []
    fill(local, "a", "b", "c")

    def fails_at_b(self, path, name):
        tried.append(name)
        if name == "b":
            raise OSError("timed out")
        upload(self, path, name)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "upload", fails_at_b)
        assert not mirror.push() and tried == ["a", "b"] and mirror.remote.files() == ["a"]
        assert not mirror.push() and tried == ["a", "b", "b"]
    assert mirror.push() and mirror.remote.files() == ["a", "b", "c"]


def test_what_is_added_during_the_copy_is_pushed_the_next_time(local, monkeypatch):
    mirror, upload = Mirror(local.path, in_memory()), Folder.upload
    fill(local, "metrics.jsonl")

    def meanwhile(self, path, name):
        upload(self, path, name)
        with path.open("a") as file:
            file.write(" and more")

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "upload", meanwhile)
        assert mirror.push()
    assert mirror.push() and mirror.remote.read_text("metrics.jsonl") == "content of metrics.jsonl and more"


def test_a_file_that_is_gone_since_it_was_listed_is_no_failure(local, monkeypatch):
    mirror, files = Mirror(local.path, in_memory()), Folder.files
    fill(local, "b")
    monkeypatch.setattr(Folder, "files", lambda self: ["a", *files(self)])
    assert mirror.push() and (mirror.remote.entries()) == ["b"]


def test_pull_says_when_storage_fails(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="nosuch"):
        Mirror(Path(tmp_path), "nosuch://x/run").pull()


def test_pushes_can_be_kept_apart(local, uploads):
    mirror = Mirror(local.path, in_memory())
    fill(local, "a")
    assert mirror.push(at_most_every_s=3600) and uploads == ["a"]  # the first one is never too early
    fill(local, "b")
    assert mirror.push(at_most_every_s=3600) and uploads == ["a"]
    assert mirror.push() and uploads == ["a", "b"]
