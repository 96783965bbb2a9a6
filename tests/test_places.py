"""The places of a run: images, run.dir, disks."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from massl_ray.checkup import places
from massl_ray.checkup.places import check_disk, check_source, check_storage, check_views, look_at_images
from massl_ray.config import load
from massl_ray.storage import Folder
from tests.sources import encoded_images, write_folder

Space = namedtuple("Space", "total used free")
IMAGES = encoded_images(20)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", IMAGES)


def config(*flags: str):
    return load(["--config", "/dev/null", *flags])


def test_images_that_can_be_read(folder):
    settings = config("--data.source", str(folder))
    images, findings = check_source(settings)
    assert findings == []
    report, (finding,) = look_at_images(images, settings)
    assert report.images == 20 and finding.severity == "ok" and f"All 20 images in {folder} can be read." == finding.sentence


@pytest.mark.parametrize(("max_skipped", "severity"), [("0.05", "error"), ("0.1", "warning")])
def test_images_that_cannot(folder, max_skipped, severity):
    for number in (0, 2):
        (folder / "cat" / f"{number:03d}.png").write_bytes(b"")
    settings = config("--data.source", str(folder), "--data.max_skipped", max_skipped)
    images, _ = check_source(settings)
    _, (finding,) = look_at_images(images, settings)
    assert finding.severity == severity and finding.sentence.startswith("2 of 20 images cannot be read") and finding.remedy


def test_no_images(tmp_path):
    images, (finding,) = check_source(config("--data.source", "/nowhere"))
    assert images is None and finding.severity == "error" and "there is no folder or file /nowhere" in finding.sentence
    write_folder(tmp_path / "one", IMAGES[:1])
    settings = config("--data.source", str(tmp_path / "one"))
    _, (finding,) = look_at_images(check_source(settings)[0], settings)
    assert finding.severity == "error" and "training needs at least 2" in finding.sentence


def test_seconds_of_views_are_a_cpus(folder, monkeypatch):
    """The median; large images that take long are named."""
    settings = config("--data.source", str(folder), "--views.global_size", "32", "--views.local_size", "16")
    images, _ = check_source(settings)
    cpu_s, finding = check_views(images, settings, 40)
    assert 1e-5 < cpu_s < 0.5 and finding.severity == "ok"
    ticks = iter([0.0, 9.0, *(tick for number in range(16) for tick in (number, number + 0.25))])
    monkeypatch.setattr(places.time, "thread_time", lambda: next(ticks))
    cpu_s, finding = check_views(images, settings, 2000)
    assert cpu_s == 0.25 and finding.severity == "note" and "shorter side over 2,000 px" in finding.sentence
    assert finding.sentence.startswith("A CPU here takes 250 ms an image")


def test_run_dir_is_tried_and_nothing_stays(tmp_path):
    assert check_storage(str(tmp_path / "a" / "b")).severity == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    assert check_storage(str(tmp_path / "kept")).severity == "ok" and list((tmp_path / "kept").iterdir()) == []


def test_run_dir_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    found = check_storage(str(tmp_path / "file"))
    assert found.severity == "error" and "cannot be written to" in found.sentence

    def refuse(self, name, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Folder, "write_text", refuse)
    for where in (str(tmp_path / "run"), "s3://bucket/run"):
        found = check_storage(where)
        assert found.severity == "error" and "Permission denied" in found.sentence and found.remedy


def test_a_uri_without_its_secrets(monkeypatch):
    monkeypatch.setattr(Folder, "check_writable", lambda self: None)
    found = check_storage("s3://name:password@bucket/run?secret_key=hidden")
    assert found.severity == "ok" and "password" not in found.sentence and "hidden" not in found.sentence


def test_disk(monkeypatch, tmp_path):
    """Four checkpoints of 1 GB where two are kept; 50 GB of images that lie elsewhere."""
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    free = {tmp_path: 4.1e9}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Space(1e12, 0, free[path]))
    settings = config("--run.dir", str(tmp_path / "run"))
    (found,) = check_disk(settings, 10**9)
    assert found.severity == "ok" and "needs 4.0 GB for 4 checkpoints of 1.00 GB" in found.sentence
    free[tmp_path] = 3.9e9
    (found,) = check_disk(settings, 10**9)
    assert found.severity == "error" and "has 3.9 GB free" in found.sentence and found.remedy
    (found,) = check_disk(config("--run.dir", "s3://bucket/run", "--data.source", "s3://bucket/images"), 10**9)
    assert found.check == "image cache" and found.severity == "error" and "needs 50.0 GB" in found.sentence
    assert list(check_disk(config("--run.dir", "s3://bucket/run"), 10**9)) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_permissions(tmp_path: Path):
    (tmp_path / "mine").mkdir(mode=0o500)
    assert check_storage(str(tmp_path / "mine" / "run")).severity == "error"
