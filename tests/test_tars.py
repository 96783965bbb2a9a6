"""WebDataset shards: what is a sample, which label it has, and where its bytes lie."""

import gzip
import tarfile
from pathlib import Path

import pytest

from massl_ray.data.sources import open_source
from massl_ray.data.tars import open_tars
from massl_ray.errors import UserError
from massl_ray.storage import Folder
from tests.helpers import names
from tests.sources import add


def shard(path: Path, **members: bytes) -> Path:
    """Members by name, `__` standing for a dot."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            add(tar, name.replace("__", "."), data)
    return path


def test_samples_and_labels(tmp_path):
    shard(tmp_path / "a.tar", s1__cls=b"7\n", s1__jpg=b"one", s1__json=b"{}", s2__PNG=b"two", s2__cls=b" 10")
    shard(tmp_path / "b.tar", s1__webp=b"three", s1__cls=b"7", s3__txt=b"no image")
    images = open_tars(Folder(tmp_path), ["a.tar", "b.tar"])
    assert names(images) == ["a.tar/s1.jpg", "a.tar/s2.PNG", "b.tar/s1.webp"]
    assert [images.read(sample) for sample in range(3)] == [b"one", b"two", b"three"]
    assert images.classes == ("7", "10") and images.labels.tolist() == [0, 1, 0]
    assert images.path(2) == f"{tmp_path}/b.tar/s1.webp" and images.store.starts.tolist() == [0, 2, 3]


def test_a_sample_without_a_label_leaves_all_without(tmp_path):
    shard(tmp_path / "a.tar", s1__jpg=b"one", s1__cls=b"7", s2__jpg=b"two")
    assert open_tars(Folder(tmp_path), ["a.tar"]).labels is None


def test_the_first_image_of_a_sample_is_taken(tmp_path):
    shard(tmp_path / "a.tar", s1__left__jpg=b"left", s1__right__jpg=b"right", s2__jpg=b"two")
    assert names(open_tars(Folder(tmp_path), ["a.tar"])) == ["a.tar/s1.left.jpg", "a.tar/s2.jpg"]


def test_samples_of_one_name_in_several_folders(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("x/v1.0/1.jpg", "y/1.jpg", "ö" * 120 + "/1.jpg"):
            add(tar, name, name.encode())
    images = open_tars(Folder(tmp_path), ["a.tar"])
    assert [images.read(sample).decode() for sample in range(3)] == ["x/v1.0/1.jpg", "y/1.jpg", "ö" * 120 + "/1.jpg"]
    assert images.name(2) == "a.tar/" + "ö" * 120 + "/1.jpg"


def test_a_folder_of_shards(tmp_path):
    for name in ("00.tar", "deep/01.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shard(tmp_path / name, s1__jpg=name.encode())
    assert names(open_source(str(tmp_path))) == ["00.tar/s1.jpg", "deep/01.tar/s1.jpg"]
    assert names(open_source(f"{tmp_path}/*.tar")) == ["00.tar/s1.jpg"]


@pytest.mark.parametrize("content", [b"no tar file at all, but longer than a header" * 20, gzip.compress(b"x" * 5000)])
def test_other_files_are_refused_by_name(tmp_path, content):
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.source: bad\.tar in .* is no plain tar file \(.*\)\. Mend it, or unpack"):
        open_source(str(tmp_path / "bad.tar"))


def test_a_shard_that_was_cut_off_later_is_an_image_that_cannot_be_read(tmp_path):
    path = shard(tmp_path / "a.tar", s1__jpg=b"one", s2__jpg=b"x" * 2000)
    images = open_tars(Folder(tmp_path), ["a.tar"])
    path.write_bytes(path.read_bytes()[:2000])
    assert images.read(0) == b"one"
    with pytest.raises(OSError, match="the tar file ends within it: 464 of 2,000 bytes"):
        images.read(1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        images.read(0)
