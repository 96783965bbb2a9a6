"""A listing: numbers, labels, what is cheap to send, and what is kept in memory."""

import hashlib
import pickle
from dataclasses import dataclass

import numpy as np
import pytest

from massl_ray.data.listing import Listing, Recent, joined, labelled
from tests.helpers import listed, names


@dataclass(frozen=True)
class Numbers:
    """A store whose images are their numbers."""

    size: int
    root: str = "/numbers"
    starts: None = None

    def __len__(self) -> int:
        return self.size

    def name(self, place: int) -> str:
        return f"{place}.png"

    def path(self, place: int) -> str:
        return f"{self.root}/{place}.png"

    def read(self, place: int) -> bytes:
        if place == 7:
            raise KeyError("seven")
        if place == 8:
            raise FileNotFoundError("eight")
        return bytes([place])


def test_taking_twice_finds_the_same_images():
    images = Listing(Numbers(20), np.arange(20) % 3, ("a", "b", "c"))
    taken = images.take(np.array([19, 4, 5, 6])).take(np.array([2, 0]))
    assert len(taken) == 2 and taken.root == "/numbers" and taken.classes == ("a", "b", "c")
    assert names(taken) == ["5.png", "19.png"] and taken.path(1) == "/numbers/19.png"
    assert [taken.read(0), taken.read(1)] == [b"\x05", b"\x13"]
    assert taken.labels.tolist() == [2, 1]


def test_any_failure_is_one_that_is_skipped():
    images = Listing(Numbers(20))
    with pytest.raises(OSError, match="KeyError: 'seven'"):
        images.read(7)
    with pytest.raises(FileNotFoundError, match="eight"):
        images.read(8)


def test_identity_is_names_in_order():
    expected = {"count": 2, "names_sha256": hashlib.sha256(b"b \xc3\xa9.png\0a\xff.png\0").hexdigest()}
    assert listed("/x", ["b é.png", b"a\xff.png".decode(errors="surrogateescape")]).identity() == expected
    assert Listing(Numbers(5)).identity() != Listing(Numbers(5)).take(np.array([1, 0, 2, 3, 4])).identity()


def test_labels_become_classes_numbers_first_and_by_size():
    images = labelled(Numbers(6), ["10", "9", "dog", "-2", "cat", "9"])
    assert images.classes == ("-2", "9", "10", "cat", "dog")
    assert images.labels.tolist() == [2, 1, 4, 0, 3, 1] and images.labels.dtype == np.int64
    assert labelled(Numbers(3), [10, 9, 10]).classes == ("9", "10")


@pytest.mark.parametrize("labels", [None, ["a", "a", "a"], ["a", None, "b"], []])
def test_no_labels(labels):
    images = labelled(Numbers(3), labels)
    assert images.labels is None and images.classes == ()


def test_joined():
    assert joined("/data", "a/b.png") == "/data/a/b.png" and joined("/data", "/else/b.png") == "/else/b.png"
    assert joined("s3://bucket/data?scheme=http", "a b.png") == "s3://bucket/data/a b.png"
    assert joined("/data", "gs://bucket/b.png") == "gs://bucket/b.png"


def test_recent_keeps_what_was_used_last_up_to_its_bytes():
    recent, made = Recent(100), []

    def get(name: str, size: int) -> int:
        def make():
            made.append(name)
            return np.zeros(size, np.uint8)

        return len(recent.get(name, make))

    for name in ("a", "b", "a", "c", "a", "b"):  # c drives out b
        assert get(name, 40) == 40
    assert made == ["a", "b", "c", "b"]
    assert get("large", 1000) == 1000 and list(recent.held) == ["large"]
    assert pickle.loads(pickle.dumps(recent)).held == {} and pickle.loads(pickle.dumps(recent)).limit == 100


def test_recent_forgets_what_could_not_be_made():
    recent = Recent(100)
    for _ in range(2):
        with pytest.raises(OSError):
            recent.get("a", lambda: (_ for _ in ()).throw(OSError("gone")))
    assert len(recent.get("a", lambda: np.zeros(3, np.uint8))) == 3
