"""Copies of remote files: fetched once whoever asks, checked, and given up in the order they were last used."""

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from massl_ray.data import cache as module
from massl_ray.data.cache import hash_of, mapped
from massl_ray.storage import Folder
from tests.storages import in_memory

MANY = 1 << 40


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def fetches(monkeypatch) -> list[str]:
    """Names of what is fetched."""
    names: list[str] = []
    download = Folder.download
    monkeypatch.setattr(Folder, "download", lambda self, name, to: names.append(name) or download(self, name, to))
    return names


def put(folder: Folder, name: str, data: str) -> str:
    folder.write_text(name, data)
    return hashlib.sha256(data.encode()).hexdigest()


def copies(store: Path) -> set[str]:
    return {path.read_text()[:1] for path in store.glob("*.arrow")}


def test_fetched_once(store, fetches):
    there = in_memory()
    sha256 = put(there, "a b.arrow", "content")
    for _ in range(3):
        with mapped(there, "a b.arrow", sha256, MANY) as file:
            assert file.read() == b"content"
    assert fetches == ["a b.arrow"]
    assert sorted(path.suffix for path in store.iterdir()) == [".arrow", ".lock", ".lock"]
    assert hash_of(store / f"{sha256}.arrow") == sha256


def test_the_least_recently_used_go_first(store, fetches):
    there = in_memory()
    hashes = {name: put(there, name, name * 100) for name in "abcd"}
    for name in "abc":
        mapped(there, name, hashes[name], 300)
        time.sleep(0.01)
    assert copies(store) == {"a", "b", "c"}
    mapped(there, "a", hashes["a"], 300)
    held = mapped(there, "b", hashes["b"], 300)
    time.sleep(0.01)
    mapped(there, "d", hashes["d"], 200)
    assert copies(store) == {"b", "d"} and fetches == ["a", "b", "c", "d"]
    mapped(there, "c", hashes["c"], 0)
    assert copies(store) == {"c"}  # one at least
    assert held.read() == b"b" * 100  # who has it keeps it


def test_a_wrong_hash_is_fetched_again(store, monkeypatch):
    there = in_memory()
    sha256, tries = put(there, "a", "right"), []

    def download(self, name, to):
        tries.append(name)
        to.write_text("right" if len(tries) > 1 else "wrong")

    monkeypatch.setattr(Folder, "download", download)
    assert mapped(there, "a", sha256, MANY).read() == b"right" and len(tries) == 2


def test_then_refused_by_name_and_not_asked_for_again_at_once(store, fetches, monkeypatch):
    there = in_memory()
    sha256 = put(there, "a", "right")
    there.write_text("a", "damaged")
    for _ in range(3):
        with pytest.raises(OSError, match=f"^{there}/a does not have the sha256 of its manifest, fetched 2 times$"):
            mapped(there, "a", sha256, MANY)
    assert fetches == ["a", "a"] and not list(store.glob("*.arrow")) and not list(store.glob("*.part"))
    there.write_text("a", "right")
    os.utime(store / f"{sha256}.refused", (0, 0))
    assert mapped(there, "a", sha256, MANY).read() == b"right" and not list(store.glob("*.refused"))


def test_what_cannot_be_fetched_is_asked_for_again(store):
    there = in_memory()
    sha256 = hashlib.sha256(b"late").hexdigest()
    with pytest.raises(FileNotFoundError):
        mapped(there, "a", sha256, MANY)
    put(there, "a", "late")
    assert mapped(there, "a", sha256, MANY).read() == b"late"


def _fetch_slowly(folder: str, sha256s: list[str], log: Path, limit: int) -> None:
    """In a process of its own: read every file a few times, noting each fetch."""
    download = Folder.download

    def noting(self: Folder, name: str, to: Path) -> None:
        with log.open("a") as file:
            file.write(f"{name}\n")
        time.sleep(0.05)
        download(self, name, to)

    module.Folder.download = noting
    for _ in range(3):
        for number, sha256 in enumerate(sha256s):
            assert mapped(Folder(folder), str(number), sha256, limit).read() == str(number).encode() * 1000


@pytest.mark.parametrize(("limit", "most"), [(MANY, 4), (2000, 3 * 3 * 4)])
def test_several_processes_share_it(tmp_path, store, limit, most):
    """With room for all, each file is fetched once; with room for half, everyone still reads the right bytes."""
    there, log = Folder(tmp_path / "there"), tmp_path / "log"
    hashes = [put(there, str(number), str(number) * 1000) for number in range(4)]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fetch_slowly, args=(str(there), hashes, log, limit)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 4 <= len(log.read_text().splitlines()) <= most
    assert sum(path.stat().st_size for path in store.glob("*.arrow")) <= limit
