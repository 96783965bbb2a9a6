"""From a source to shards: complete, the same whatever was interrupted, and nothing that cannot be read."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from massl_ray.data import preparing as module
from massl_ray.data.decode import Decoding
from massl_ray.data.listing import Listing
from massl_ray.data.preparing import WORK, begin, do_part, finish, missing, shrunk
from massl_ray.data.sources import open_source
from massl_ray.errors import UserError
from massl_ray.storage import Folder
from tests.helpers import encoded, names, photograph
from tests.sources import encoded_images, write_folder
from tests.storages import in_memory

IMAGES = encoded_images(11)


def prepare(images: Listing, folder: Folder, rows: int = 4, max_side: int | None = None, stop_after: int = 99) -> None:
    """As the command does it, one part after the other, with shards of `rows` images."""
    plan = begin(images, folder, max_side, 1)
    assert plan
    plan = replace(plan, rows=rows)
    (folder / WORK).write_text("plan.json", json.dumps(plan.__dict__))
    for part in list(missing(folder, plan))[:stop_after]:
        do_part(images, folder, plan, part)
    if stop_after == 99:
        finish(images, folder, plan)


@pytest.fixture
def source(tmp_path) -> Listing:
    """Eleven images, the fifth broken and the last one a copy of the first."""
    folder = write_folder(tmp_path / "source", IMAGES)
    (folder / "cat" / "004.png").write_bytes(b"no image")
    (folder / "cat" / "010.png").write_bytes(IMAGES[0])
    return open_source(str(folder))


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path, monkeypatch) -> Folder:
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    return Folder(tmp_path / "out") if request.param == "local" else in_memory()


def test_everything_that_can_be_read_is_there(source, folder):
    prepare(source, folder)
    images = open_source(str(folder))
    kept = [sample for sample in range(11) if not source.name(sample).endswith("004.png")]
    assert names(images) == [source.name(sample) for sample in kept]
    assert [images.read(place) for place in range(10)] == [source.read(sample) for sample in kept]
    assert images.labels.tolist() == source.labels[kept].tolist() and images.classes == source.classes
    assert [images.path(place) for place in range(10)] == [source.path(sample) for sample in kept]
    assert folder.entries() == ["index.arrow", "manifest.json", "report.json", *(f"shard-0000{part}.arrow" for part in range(3))]
    found = json.loads(folder.read_text("report.json"))
    assert [each["path"] for each in found["broken"]] == [f"{source.root}/cat/004.png"]
    assert found["duplicates"] == [[f"{source.root}/cat/000.png", f"{source.root}/cat/010.png"]]


def test_continued_where_it_was_ended_with_the_same_result(source, folder, tmp_path, monkeypatch):
    whole = Folder(tmp_path / "whole")
    prepare(source, whole)
    done = []
    monkeypatch.setattr(module, "write_shard", lambda *a, write=module.write_shard: done.append(a[1]) or write(*a))
    prepare(source, folder, stop_after=2)
    assert "manifest.json" not in folder.entries() and done == ["shard-00000.arrow", "shard-00001.arrow"]
    with pytest.raises(UserError, match="no image files"):
        open_source(str(folder))
    plan = begin(source, folder, None, 1)
    assert plan and plan.rows == 4 and list(missing(folder, plan)) == [2]
    for part in missing(folder, plan):
        do_part(source, folder, plan, part)
    finish(source, folder, plan)
    assert done[2:] == ["shard-00002.arrow"]
    assert folder.read_text("manifest.json") == whole.read_text("manifest.json")
    for name in whole.files():
        assert folder.read_bytes(name) == whole.read_bytes(name)


def test_a_shard_without_its_note_is_written_again(source, folder):
    prepare(source, folder, stop_after=1)
    (folder / WORK).delete("shard-00000.json")
    plan = begin(source, folder, None, 1)
    assert plan and list(missing(folder, plan)) == [0, 1, 2]


def test_what_is_done_is_done(source, folder):
    prepare(source, folder)
    assert begin(source, folder, None, 1) is None


def test_what_was_done_before_there_were_channels(source, folder):
    """Nor a level of white: a plan and a manifest of an earlier version do not name them."""
    prepare(source, folder, stop_after=1)
    plan = json.loads((folder / WORK).read_text("plan.json"))
    assert (plan.pop("channels"), plan.pop("white")) == (3, 65535)
    (folder / WORK).write_text("plan.json", json.dumps(plan))
    prepare(source, folder)
    manifest = json.loads(folder.read_text("manifest.json"))
    assert (manifest.pop("channels"), manifest.pop("white")) == (3, 65535)
    folder.write_text("manifest.json", json.dumps(manifest))
    assert begin(source, folder, None, 1) is None and len(open_source(str(folder))) == len(source) - 1  # one is broken


def test_another_source_or_another_way_is_refused(source, folder):
    prepare(source, folder, stop_after=1)
    for finished in (False, True):
        for images, max_side, shard_mb in ((source, 20, 1), (source, None, 2), (source.take(np.arange(10)), None, 1)):
            with pytest.raises(UserError, match=f"^{folder} holds something else already, or images prepared from another"):
                begin(images, folder, max_side, shard_mb)
        if not finished:
            plan = begin(source, folder, None, 1)
            assert plan
            for part in missing(folder, plan):
                do_part(source, folder, plan, part)
            finish(source, folder, plan)


def test_images_of_too_many_pixels_are_left_out(tmp_path):
    write_folder(tmp_path / "source", IMAGES)
    (tmp_path / "source" / "large.png").write_bytes(encoded(photograph(200, 150), "PNG"))
    source, folder = open_source(str(tmp_path / "source")), Folder(tmp_path / "out")
    plan = begin(source, folder, None, 1, Decoding(max_pixels=200 * 150 - 1))
    do_part(source, folder, plan, 0)
    finish(source, folder, plan)
    (broken,) = json.loads(folder.read_text("report.json"))["broken"]
    assert broken["path"].endswith("large.png") and "more than data.max_pixels 29999 allows" in broken["reason"]
    assert len(open_source(str(folder))) == len(IMAGES)
    assert begin(source, folder, None, 1, Decoding(max_pixels=29_999)) is None
    with pytest.raises(UserError, match="in another way"):
        begin(source, folder, None, 1)


def test_a_folder_with_other_things_is_refused(source, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds something else already"):
        begin(source, Folder(tmp_path), None, 1)


def test_a_part_without_a_readable_image_has_no_shard(tmp_path):
    folder = write_folder(tmp_path / "source", IMAGES)
    for number in range(0, 8, 2):
        (folder / "cat" / f"{number:03d}.png").write_bytes(b"")
    prepare(open_source(str(folder)), Folder(tmp_path / "out"), rows=4)
    images = open_source(str(tmp_path / "out"))
    assert names(images) == ["cat/008.png", "cat/010.png", *(f"dog/{number:03d}.png" for number in range(1, 10, 2))]
    assert [images.read(place) for place in range(7)] == [IMAGES[number] for number in (8, 10, 1, 3, 5, 7, 9)]
    assert sorted(path.name for path in (tmp_path / "out").glob("shard*")) == ["shard-00001.arrow", "shard-00002.arrow"]


def test_shards_have_the_size_that_is_asked_for(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(30):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    size = sum(path.stat().st_size for path in folder.iterdir()) / 30
    plan = begin(open_source(str(folder)), Folder(tmp_path / "out"), None, 1)
    assert plan and plan.rows == int(1e6 / size) and plan.parts == -(-30 // plan.rows)
    assert [sample for part in range(plan.parts) for sample in plan.samples(part)] == list(range(30))


# ---- shrinking -------------------------------------------------------------------------------------------------------


def test_small_images_stay_as_they_are():
    image = photograph(100, 80)
    data = encoded(image, "JPEG", quality=50)
    pixels = np.asarray(image)
    assert shrunk(data, pixels, None, "JPEG") == data and shrunk(data, pixels, 100, "JPEG") == data


@pytest.mark.parametrize(
    ("kind", "expected"), [("JPEG", "JPEG"), ("WEBP", "JPEG"), ("PNG", "PNG"), ("BMP", "PNG"), ("TIFF", "PNG")]
)
def test_large_ones_are_shrunk(kind, expected):
    image = photograph(160, 90)
    with Image.open(io.BytesIO(shrunk(b"", np.asarray(image), 100, kind))) as small:
        assert small.format == expected and small.size == (100, 56)
        reference = np.asarray(image.resize((100, 56), Image.Resampling.LANCZOS), dtype=float)
        assert np.abs(np.asarray(small, dtype=float) - reference).mean() < 3


def test_bands_are_shrunk_to_an_array():
    pixels = np.concatenate([np.asarray(photograph(160, 90))] * 2, axis=2)[..., :5]
    small = np.load(io.BytesIO(shrunk(b"", pixels, 80, "TIFF")))
    assert small.shape == (45, 80, 5) and small.dtype == np.uint8
    for band in range(5):
        expected = Image.fromarray(pixels[..., band]).resize((80, 45), Image.Resampling.LANCZOS)
        assert np.abs(small[..., band].astype(float) - np.asarray(expected)).mean() < 3


def test_shrunk_images_are_upright_and_read_alike(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    for number in range(2):
        (tmp_path / "source").mkdir(exist_ok=True)
        photograph(160, 90).save(tmp_path / "source" / f"{number}.jpg", exif=exif)
    prepare(open_source(str(tmp_path / "source")), Folder(tmp_path / "out"), max_side=80)
    data = open_source(str(tmp_path / "out")).read(0)
    with Image.open(io.BytesIO(data)) as small:
        assert small.size == (45, 80) and not small.getexif()
