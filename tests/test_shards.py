"""The format of prepared images: written and read back, on disk and through the cache, and what is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from massl_ray.data.shards import INDEX, MANIFEST, Manifest, Shards, open_shards, write_index, write_shard
from massl_ray.errors import UserError
from massl_ray.storage import Folder
from tests.helpers import names
from tests.sources import encoded_images
from tests.storages import in_memory

IMAGES = encoded_images(7)
NAMES = ["a b.png", "ü/猫.png", "two\nlines.png", b"\xff.png".decode(errors="surrogateescape"), "4.png", "5.png", "6.png"]
LABELS = np.array([0, 1, 0, 1, 0, 1, 1])


def prepared(folder: Folder) -> Manifest:
    """Two shards of 4 and 3 images."""
    shards = tuple(
        write_shard(folder, f"shard-{number}.arrow", IMAGES[first:last], LABELS[first:last].tolist(), NAMES[first:last])
        for number, (first, last) in enumerate(((0, 4), (4, 7)))
    )
    index = write_index(folder, pa.array([name.encode(errors="surrogateescape") for name in NAMES], pa.large_binary()), LABELS)
    manifest = Manifest("/from", "0" * 64, None, 64, 10**8, 7, ("cat", "dog"), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), index, shards)
    folder.write_text(MANIFEST, manifest.to_json())
    return manifest


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path, monkeypatch) -> Folder:
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    return Folder(tmp_path / "shards") if request.param == "local" else in_memory()


def test_there_and_back(folder):
    prepared(folder)
    images = open_shards(folder, 1.0)
    assert [images.read(sample) for sample in range(7)] == IMAGES
    assert names(images) == NAMES and images.labels.tolist() == LABELS.tolist() and images.classes == ("cat", "dog")
    assert images.path(0) == "/from/a b.png" and images.root == str(folder)
    assert [images.take(np.array([6, 3])).read(sample) for sample in range(2)] == [IMAGES[6], IMAGES[3]]


def test_cheap_to_send_with_shards_open(folder):
    prepared(folder)
    images = open_shards(folder, 1.0)
    images.read(0)
    assert isinstance(images.store, Shards) and len(images.store.recent.held) == 1
    sent = pickle.loads(pickle.dumps(images))
    assert len(pickle.dumps(images)) < 3000 and sent.read(5) == IMAGES[5]


def test_local_ones_are_mapped_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    prepared(Folder(tmp_path / "shards"))
    images = open_shards(Folder(tmp_path / "shards"), 1.0)
    before = pa.total_allocated_bytes()
    images.read(0)
    assert pa.total_allocated_bytes() == before and not (tmp_path / "cache").exists()


def test_remote_ones_are_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    there = in_memory()
    manifest = prepared(there)
    images = open_shards(there, 1.0)
    assert images.read(0) == IMAGES[0]
    copies = tmp_path / "cache" / "shards"
    assert [path.stem for path in copies.glob("*.arrow")] == [manifest.shards[0].sha256]
    there.delete("shard-0.arrow")
    assert open_shards(there, 1.0).read(1) == IMAGES[1]
    there.write_text("shard-1.arrow", "damaged")
    with pytest.raises(OSError, match=r"shard-1\.arrow does not have the sha256 of its manifest"):
        images.read(5)


def test_the_cache_has_the_size_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    there = in_memory()
    manifest = prepared(there)
    for cache_gb, kept in ((1.0, 2), (manifest.shards[0].size / 1e9, 1)):
        images = open_shards(there, cache_gb)
        for path in (tmp_path / "cache").rglob("*.arrow"):
            path.unlink()
        assert [images.read(sample) for sample in range(7)] == IMAGES
        assert len(list((tmp_path / "cache").rglob("*.arrow"))) == kept


def test_the_same_images_make_the_same_bytes(tmp_path):
    assert prepared(Folder(tmp_path / "a")) == prepared(Folder(tmp_path / "b"))
    assert (tmp_path / "a" / INDEX).read_bytes() == (tmp_path / "b" / INDEX).read_bytes()


def test_others_can_read_a_shard(tmp_path):
    prepared(Folder(tmp_path))
    table = pa.ipc.open_file(tmp_path / "shard-1.arrow").read_all()
    assert table.column_names == ["image", "label", "path"]
    assert table["image"].to_pylist() == IMAGES[4:] and table["label"].to_pylist() == [0, 1, 1]
    assert table["path"].to_pylist() == [b"4.png", b"5.png", b"6.png"]


def test_a_manifest_comes_back_from_json(tmp_path):
    manifest = prepared(Folder(tmp_path))
    assert Manifest.from_json((tmp_path / MANIFEST).read_text()) == manifest


def without(key: str):
    return lambda text: json.dumps({name: value for name, value in json.loads(text).items() if name != key})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[:100], "is damaged"),
        (lambda text: "[]", "its format is not"),
        (lambda text: text.replace("shards 1", "shards 2"), "its format is not 'massl-ray shards 1'"),
        (without("count"), "it has no count"),
        (lambda text: text.replace('"sha256"', '"md5"'), "is damaged"),
        (lambda text: text.replace('"index_sha256": "', '"index_sha256": "0'), "index.arrow does not have its hash"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, damage, words):
    prepared(Folder(tmp_path))
    path: Path = tmp_path / MANIFEST
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=f"data.source: {path} is damaged .*{words}|{words}"):
        open_shards(Folder(tmp_path), 1.0)
