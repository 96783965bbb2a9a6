"""Events and a disk that takes no more for a while."""

import errno
import os

import pytest

from massl_ray.reporting.patience import Patient


class Disk:
    """Takes events while it is not full."""

    def __init__(self) -> None:
        self.full = False
        self.written: list[str] = []

    def follow(self, event: dict) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/metrics.jsonl")
        self.written.append(event["kind"])


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def notes() -> list[str]:
    return []


def test_what_could_not_be_written_is_written_later_in_order_and_once(disk, notes):
    record = Patient(disk.follow, notes.append)
    record({"kind": "a"})
    disk.full = True
    for kind in "bcd":
        record({"kind": kind})
    assert disk.written == ["a"] and not record.flush()
    assert len(notes) == 1 and "No space left on device" in notes[0]
    disk.full = False
    record({"kind": "e"})
    assert disk.written == ["a", "b", "c", "d", "e"] and record.flush() and record.error == ""
    assert len(notes) == 2 and "again" in notes[1]


def test_mere_progress_is_not_kept(disk, notes):
    record = Patient(disk.follow, notes.append)
    record({"kind": "progress"})
    disk.full = True
    for kind in ("metrics", "progress", "progress", "knn"):
        record({"kind": kind})
    disk.full = False
    assert record.flush() and disk.written == ["progress", "metrics", "knn"]


def test_a_second_time_is_said_again(disk, notes):
    record = Patient(disk.follow, notes.append)
    for full in (True, False, True, False):
        disk.full = full
        record({"kind": "a"})
    assert len(notes) == 4 and notes[:2] == notes[2:]


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("a bug")])
def test_what_is_no_disk_is_raised(error, notes):
    def follow(event: dict) -> None:
        raise error

    with pytest.raises(type(error)):
        Patient(follow, notes.append)({"kind": "a"})
    assert notes == []
