"""Folders: the same few things done on this disk, in fsspec's memory and on an S3 server."""

import os
import pickle
from pathlib import Path

import fsspec
import pytest

from massl_ray import storage as module
from massl_ray.errors import UserError
from massl_ray.storage import Folder, reason
from tests.storages import in_memory, on_s3, s3_server


@pytest.fixture(scope="module")
def s3():
    with s3_server() as options:
        yield options


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    if request.param == "local":
        return Folder(tmp_path / "deep" / "run")
    return in_memory() if request.param == "memory" else on_s3(request.getfixturevalue("s3"))


# ---- what every place can do -----------------------------------------------------------------------------------------


def test_text_comes_back_and_is_replaced(folder):
    folder.write_text("note.txt", "früh\n")
    assert folder.read_text("note.txt") == "früh\n"
    folder.write_text("note.txt", "")
    assert folder.read_text("note.txt") == ""
    folder.write_text("eval/deep/note.gz", "not compressed, whatever its name")
    assert folder.read_text("eval/deep/note.gz") == "not compressed, whatever its name"


def test_files_go_there_and_back(folder, tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / "here").write_bytes(data)
    folder.upload(tmp_path / "here", "eval/there")
    folder.download("eval/there", tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == data
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["back"]
    assert (tmp_path / "here").read_bytes() == data


def test_bytes_of_a_file_and_of_a_part_of_it(folder):
    folder.write_text("deep/a b.txt", "0123456789")
    assert folder.read_bytes("deep/a b.txt") == (folder / "deep/a b.txt").read_bytes() == b"0123456789"
    assert folder.read_bytes("deep/a b.txt", 3, 4) == b"3456" and folder.read_bytes("deep/a b.txt", 8) == b"89"
    assert folder.read_bytes("deep/a b.txt", 8, 5) == b"89"
    with folder.open_file("deep/a b.txt") as file:
        assert file.size() == 10 and file.seek(5) == 5 and file.read(2) == b"56"
    for read in (lambda: folder.read_bytes("gone"), lambda: folder.read_bytes("gone", 1, 1)):
        with pytest.raises(FileNotFoundError):
            read()


def test_kinds_and_parents(folder):
    folder.write_text("deep/file", "")
    assert (folder.kind("deep"), folder.kind("deep/file"), folder.kind("gone"), folder.kind()) == ("folder", "file", None, "folder")
    assert (folder / "deep").parent == folder and (folder / "deep" / "file").kind() == "file"


def test_listing(folder):
    assert folder.entries() == [] and folder.files() == []
    for name in ("b.txt", "a b.txt", "step_4/state", "step_4/x/y", ".hidden"):
        folder.write_text(name, name)
    assert folder.entries() == [".hidden", "a b.txt", "b.txt", "step_4"]
    assert folder.files() == [".hidden", "a b.txt", "b.txt", "step_4/state", "step_4/x/y"]
    assert (folder / "step_4").entries() == ["state", "x"] and (folder / "step_4").read_text("x/y") == "step_4/x/y"


def test_deleting(folder):
    for name in ("a", "b/c", "b/d/e", "bb"):
        folder.write_text(name, "")
    folder.delete("a")
    folder.delete("b")
    folder.delete("never there")
    assert folder.entries() == ["bb"]


def test_missing_files_are_file_not_found(folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        folder.read_text("missing")
    with pytest.raises(FileNotFoundError):
        folder.download("missing", tmp_path / "back")
    assert list(tmp_path.glob("*back*")) == []


def test_a_folder_is_a_value(folder):
    folder.write_text("x", "1")
    copy = pickle.loads(pickle.dumps(folder))
    assert copy == folder == Folder(folder) == Folder(str(folder)) and hash(copy) == hash(folder) and copy != folder / "x"
    assert copy.read_text("x") == "1" and len(pickle.dumps(folder)) < 500
    assert folder.name == "run" and (folder / "checkpoints").name == "checkpoints"


def test_check_writable_leaves_nothing(folder):
    folder.check_writable()
    assert folder.files() == []


# ---- addresses -------------------------------------------------------------------------------------------------------


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(Folder("runs/x/")) == f"{tmp_path}/runs/x" and Folder("runs/x").path == tmp_path / "runs" / "x"
    assert Folder("file:///data/a%20b") == Folder(Path("/data/a b")) and Folder("/data/a?b").name == "a?b"
    remote = Folder("s3://bucket/runs/x/?region=eu-west-1")
    assert str(remote / "checkpoints") == "s3://bucket/runs/x/checkpoints?region=eu-west-1"
    assert (remote.name, remote.is_local, Folder("/x").is_local) == ("x", False, True)
    with pytest.raises(ValueError, match="not on this machine"):
        _ = remote.path


def test_folders_of_one_place_share_a_connection(monkeypatch):
    opened = []
    original = fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda root, **options: opened.append(root) or original(root, **options))
    folder = in_memory()
    (folder / "a").write_text("x", "")
    (folder / "b").write_text("x", "")
    assert folder.files() == ["a/x", "b/x"] and opened == [folder.uri.removesuffix("/run")]


# ---- failures --------------------------------------------------------------------------------------------------------


def test_places_that_cannot_be_written_to(tmp_path, s3):
    (tmp_path / "file").touch()
    missing = f"s3://no-such-bucket/run?{s3}"
    for place, words in (
        (tmp_path / "file" / "run", "Not a directory"),
        ("nosuch://host/run", "Unrecognized filesystem type in URI.*Protocol not known: nosuch"),
        ("abfs://container/run", "valid account name"),
        (missing, "NO_SUCH_BUCKET"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            Folder(place).check_writable()
        assert str(refused.value).startswith(f"{place} cannot be written to (") and "Choose another place" in str(refused.value)


def test_whatever_a_file_system_raises_is_an_oserror(monkeypatch):
    class Refused(Exception):
        pass

    def refuse(self, path, **options):
        raise Refused("token expired")

    folder = in_memory()
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(memory, "info", refuse)
    with pytest.raises(OSError, match="Refused: token expired"):
        folder.delete("x")
    monkeypatch.setattr(memory, "open", refuse)
    with pytest.raises(UserError, match=r"cannot be written to \(Refused: token expired\)"):
        folder.check_writable()


@pytest.mark.parametrize("fails", ["to_disk", "copyfile"])
def test_a_local_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails):
    folder = Folder(tmp_path / "run")
    folder.write_text("x", "old")
    (tmp_path / "new").write_text("new")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((module, "to_disk") if fails == "to_disk" else (module.shutil, "copyfile")), full)
    with pytest.raises(OSError, match="No space"):
        folder.upload(tmp_path / "new", "x")
    assert folder.files() == ["x"] and folder.read_text("x") == "old"


def test_a_local_write_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    happened = []
    replace = Path.replace
    monkeypatch.setattr(module, "to_disk", lambda path: happened.append(path.read_text()))
    monkeypatch.setattr(Path, "replace", lambda self, target: happened.append(target.name) or replace(self, target))
    Folder(tmp_path).write_text("x", "text")
    assert happened == ["text", "x"]


def test_reasons_fit_into_a_sentence():
    assert reason(OSError(28, "No space left on device", "/x")) == "No space left on device"
    assert reason(ValueError("It broke.")) == "It broke" and reason(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("uri", "asked"),
    [
        ("gs://bucket", "gs://bucket?retry_limit_seconds=60"),
        ("gs://bucket?anonymous=true", "gs://bucket?anonymous=true&retry_limit_seconds=60"),
        ("gs://bucket?retry_limit_seconds=5", "gs://bucket?retry_limit_seconds=5"),
        ("s3://bucket", "s3://bucket"),
    ],
)
def test_google_is_not_waited_for_a_quarter_of_an_hour(monkeypatch, uri, asked):
    seen = []
    monkeypatch.setattr(module, "FileSystem", type("Fake", (), {"from_uri": staticmethod(seen.append)}))
    module._connect.__wrapped__(uri)
    assert seen == [asked]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_may_have_no_end_is_not_read(tmp_path, kind):
    """A pipe would keep the reader waiting; /dev/zero would fill the memory."""
    if kind == "pipe":
        os.mkfifo(tmp_path / "image.png")
    else:
        (tmp_path / "image.png").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="it is no regular file"):
        Folder(tmp_path).read_bytes("image.png")
    with pytest.raises(OSError, match="it is no regular file"):
        Folder(tmp_path / "image.png").read_bytes()
    with pytest.raises(OSError, match="it is no regular file"):
        Folder(tmp_path).read_text("image.png")
