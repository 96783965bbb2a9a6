"""One run at a time: real locks of real processes, and elsewhere signs of life. No test waits for a clock to run."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from massl_ray.errors import UserError
from massl_ray.storage import Folder
from massl_ray.training import lock as module
from massl_ray.training.lock import LOCK, hold
from tests.storages import in_memory, on_s3, s3_server

SOON_S = 60.0
HOLDER = """
import sys
from massl_ray.training.lock import hold
with hold(sys.argv[1], interval_s=0.05):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(folder: Folder):
    """A process that holds the folder, until it is killed or this ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdin
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def notes():
    return []


# ---- on this disk ----------------------------------------------------------------------------------------------------


def test_two_processes_and_a_kill(tmp_path):
    folder = Folder(tmp_path / "run")
    with another_process(folder) as process:
        words = f"{tmp_path}/run is in use by process {process.pid} on {socket.gethostname()}. Wait until it has ended"
        for _ in range(2):  # being refused changes nothing
            with pytest.raises(UserError, match=re.escape(words)), hold(folder):
                pass
        process.kill()
        process.wait()
        with hold(folder) as lost:
            assert not lost.is_set() and json.loads(folder.read_text(LOCK))["pid"] == os.getpid()


def test_released_at_the_end_however_it_ends(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "), hold(str(tmp_path)):
            pass
        raise KeyError
    assert (tmp_path / LOCK).read_text() == ""
    with hold(tmp_path):
        pass


def test_a_holder_that_has_not_said_who_it_is(tmp_path):
    with open(tmp_path / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by another run"), hold(tmp_path):
            pass


def test_a_place_that_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run cannot be locked \(Not a directory\)"), hold(tmp_path / "file" / "run"):
        pass
    with pytest.raises(UserError, match=r"nosuch://x/run cannot be locked \(Unrecognized"), hold("nosuch://x/run"):
        pass


def test_a_file_system_without_such_locks_gets_signs_of_life(tmp_path, monkeypatch, notes):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with hold(tmp_path, note=notes.append):
        assert json.loads((tmp_path / LOCK).read_text())["count"] == 0
    assert not (tmp_path / LOCK).exists() and notes == []


# ---- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.fixture
def naps(monkeypatch):
    """What a newcomer does instead of sleeping: calls `naps.action`; `naps.slept` holds the seconds."""

    class Naps:
        slept: list[float] = []
        action = staticmethod(lambda: None)

        def sleep(self, seconds):
            self.slept.append(seconds)
            self.action()

    naps = Naps()
    naps.slept = []
    monkeypatch.setattr(module, "time", naps)
    return naps


@pytest.fixture
def beats(monkeypatch):
    """Released at every sign of life."""
    beats, write_text = threading.Semaphore(0), Folder.write_text

    def noted(self, name, text):
        write_text(self, name, text)
        if json.loads(text)["count"] > 0:
            beats.release()

    monkeypatch.setattr(Folder, "write_text", noted)
    return beats


def test_a_free_folder_is_held_and_released_without_waiting(naps, notes):
    folder = in_memory()
    for _ in range(2):
        with hold(folder, note=notes.append) as lost:
            held = json.loads(folder.read_text(LOCK))
            assert (held["host"], held["pid"], held["count"], len(held["token"])) == (socket.gethostname(), os.getpid(), 0, 32)
        assert folder.entries() == [] and not lost.is_set()
    assert naps.slept == [] and notes == []


def test_a_holder_that_lives_is_left_alone(naps, beats, notes):
    folder = in_memory()

    def two_beats_from_now_on() -> None:
        while beats.acquire(blocking=False):
            pass
        assert beats.acquire(timeout=SOON_S) and beats.acquire(timeout=SOON_S)

    naps.action = two_beats_from_now_on
    with hold(folder, interval_s=0.001) as lost:
        with pytest.raises(UserError, match=f"{folder} is in use by process {os.getpid()} on "), hold(folder, note=notes.append):
            pass
        assert beats.acquire(timeout=SOON_S) and not lost.is_set()
        assert naps.slept == [5.0]
    assert notes == [
        f"{folder} was locked by process {os.getpid()} on {socket.gethostname()}. Watching for 15 s whether it still runs."
    ]
    assert folder.entries() == []


@pytest.mark.parametrize("content", ['{"host": "gone", "pid": 7, "token": "x", "count": 9}', "{", "[]"])
def test_a_dead_holder_is_succeeded_after_three_intervals(naps, notes, content):
    folder = in_memory()
    folder.write_text(LOCK, content)
    with hold(folder, interval_s=7, note=notes.append):
        assert json.loads(folder.read_text(LOCK))["pid"] == os.getpid()
    holder = "process 7 on gone" if "gone" in content else "another run"
    assert naps.slept == [7, 7, 7] and notes == [f"{folder} was locked by {holder}. Watching for 21 s whether it still runs."]


def test_a_holder_that_moves_at_the_last_moment_lives(naps, notes):
    folder = in_memory()
    folder.write_text(LOCK, "1")
    naps.action = lambda: len(naps.slept) == 3 and folder.write_text(LOCK, "2")
    with pytest.raises(UserError, match="in use by another run"), hold(folder, note=notes.append):
        pass
    assert folder.read_text(LOCK) == "2"


def test_a_holder_that_ends_while_it_is_watched(naps, notes):
    folder = in_memory()
    folder.write_text(LOCK, "1")
    naps.action = lambda: folder.delete(LOCK)
    with hold(folder, note=notes.append):
        assert len(naps.slept) == 1


def test_of_two_newcomers_at_once_one_is_refused(monkeypatch):
    folder, write_text = in_memory(), Folder.write_text

    def overtaken(self, name, text):
        write_text(self, name, text)
        write_text(self, name, '{"host": "faster", "pid": 8, "token": "y"}')

    monkeypatch.setattr(Folder, "write_text", overtaken)
    with pytest.raises(UserError, match="in use by process 8 on faster"), hold(folder):
        pass
    assert "faster" in folder.read_text(LOCK)


def test_a_holder_that_was_succeeded_learns_it_and_leaves_the_lock_alone(notes):
    folder = in_memory()
    with hold(folder, interval_s=0.001, note=notes.append) as lost:
        while not lost.wait(0.01):  # a beat under way may overwrite the first of these
            folder.write_text(LOCK, '{"token": "other"}')
    assert folder.read_text(LOCK) == '{"token": "other"}'
    assert notes == [f"Another run took over {folder}, which showed no sign of life from this one. Stop one of them."]


def test_an_outage_between_signs_of_life(beats, monkeypatch, notes):
    folder, read_text, failed = in_memory(), Folder.read_text, threading.Event()

    def outage(self, name):
        failed.set()
        raise OSError("timed out")

    with hold(folder, interval_s=0.001, note=notes.append) as lost:
        with monkeypatch.context() as patched:
            patched.setattr(Folder, "read_text", outage)
            assert failed.wait(SOON_S)
            while beats.acquire(blocking=False):
                pass
        assert Folder.read_text is read_text and beats.acquire(timeout=SOON_S)
        assert not lost.is_set()
    assert folder.entries() == [] and notes == []


def test_two_processes_and_a_kill_on_s3(notes):
    with s3_server() as options:
        folder = on_s3(options)
        with another_process(folder) as process:
            with pytest.raises(UserError, match=f"in use by process {process.pid} on "), hold(folder, 2.0, notes.append):
                pass
            process.kill()
            process.wait()
            with hold(folder, 0.01, notes.append):
                assert json.loads(folder.read_text(LOCK))["pid"] == os.getpid()
        assert folder.files() == [] and len(notes) == 2
