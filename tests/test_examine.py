"""A look at every image: figures against numpy, and everything suspicious by name."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from massl_ray.data.examine import describe, look, look_at_all, report, to_table
from massl_ray.data.listing import Listing
from massl_ray.data.sources import open_source
from tests.helpers import encoded, listed


def examined(images: Listing):
    return report(images, to_table(look_at_all(images, threads=2)))


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes with one of everything."""
    contents = {
        "a/1.png": encoded(noise(60, 40, 1), "PNG"),
        "a/2.jpg": encoded(noise(50, 80, 2), "JPEG"),
        "a/3 copy.png": encoded(noise(60, 40, 1), "PNG"),
        "a/wrong.png": encoded(noise(40, 40, 3), "JPEG"),
        "b/black.png": encoded(Image.new("RGB", (64, 64)), "PNG"),
        "b/tiny.gif": encoded(noise(31, 90, 4), "GIF"),
        "b/empty.jpg": b"",
        "b/cut.jpg": encoded(noise(64, 64, 5), "JPEG")[:700],
        "b/text.png": b"not an image",
        "b/4.png": encoded(Image.fromarray(np.full((32, 32), 128, np.uint8)), "PNG"),
    }
    for name, data in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_look(folder):
    images = open_source(str(folder))
    row, data, image = look(images, 0)
    pixels = np.asarray(noise(60, 40, 1)) / 255
    np.testing.assert_allclose(row["mean"], pixels.mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(row["square"], (pixels**2).mean((0, 1)), rtol=1e-12)
    assert np.array_equal(np.asarray(image), np.asarray(noise(60, 40, 1))) and data == (folder / "a/1.png").read_bytes()
    assert (row["width"], row["height"], row["format"], row["constant"], row["size"]) == (60, 40, "PNG", False, len(data))


def test_the_report(folder):
    found = examined(open_source(str(folder)))
    assert found.images == 10 and found.labels == {"a": 4, "b": 6}
    assert [each["path"] for each in found.broken] == [f"{folder}/b/{name}" for name in ("cut.jpg", "empty.jpg", "text.png")]
    assert found.broken[2]["reason"] == "UnidentifiedImageError: cannot identify image file"
    assert found.formats == {"PNG": 4, "JPEG": 2, "GIF": 1}
    assert found.tiny == [f"{folder}/b/tiny.gif"]
    assert found.constant == [f"{folder}/b/4.png", f"{folder}/b/black.png"]
    assert found.duplicates == [[f"{folder}/a/1.png", f"{folder}/a/3 copy.png"]]
    assert found.shorter_side == {"smallest": 31, "median": 40, "largest": 64}
    assert found.longer_side == {"smallest": 32, "median": 60, "largest": 90}
    good = [path for path in sorted(folder.rglob("*.*")) if path.name not in ("cut.jpg", "empty.jpg", "text.png")]
    assert found.bytes == sum(path.stat().st_size for path in good)
    pixels = [np.asarray(Image.open(path).convert("RGB")) / 255 for path in good]
    mean = np.mean([each.mean((0, 1)) for each in pixels], axis=0)
    std = np.sqrt(np.mean([(each**2).mean((0, 1)) for each in pixels], axis=0) - mean**2)
    np.testing.assert_allclose(found.mean, mean, atol=1e-4)
    np.testing.assert_allclose(found.std, std, atol=1e-4)
    assert json.loads(json.dumps(asdict(found))) == asdict(found)


def test_for_people(folder):
    lines = describe(examined(open_source(str(folder)))).splitlines()
    assert lines[0].startswith(f"Images    10 in {folder}, 0.0 MB")
    assert lines[1:4] == [
        "Formats   PNG 4, JPEG 2, GIF 1",
        "Sides     shorter 31 to 64 px, half under 40; longer 32 to 90 px, half under 60",
        "Labels    2 classes of 4 to 6 images",
    ]
    assert lines[4].startswith("Channels  --data.mean 0.") and " --data.std 0." in lines[4]
    assert lines[5:7] == ["Twice     1 copies of others", f"          {folder}/a/1.png = {folder}/a/3 copy.png"]
    assert lines[-4] == "Broken    3 cannot be read" and lines[-1].startswith(f"          {folder}/b/text.png: Unidentified")


def test_many_names_are_counted():
    found = examined(listed("/nowhere", (f"{number}.png" for number in range(12))))
    lines = describe(found).splitlines()
    assert len(found.broken) == 12 and found.mean is None and found.formats == {} and found.shorter_side == {}
    assert lines[1] == "Broken    12 cannot be read" and lines[-1] == "          ... 7 more" and len(lines) == 8


def test_names_stay_in_their_line():
    found = examined(listed("/nowhere", ["a\nb\x1b[2Jü.jpg"]))
    assert describe(found).splitlines()[-1].startswith("          /nowhere/a\\nb\\x1b[2Jü.jpg: FileNotFoundError")


def test_names_that_are_no_text(tmp_path):
    found = examined(listed(str(tmp_path), [b"\xff.png".decode(errors="surrogateescape")]))
    assert found.broken[0]["path"] == f"{tmp_path}/\\udcff.png" and json.dumps(asdict(found))


def test_looks_come_in_order_whatever_the_threads(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02d}.png").write_bytes(encoded(noise(8 + 20 * (number % 3), 8, number), "PNG"))
    rows = list(look_at_all(open_source(str(tmp_path)), threads=4))
    assert [row["sample"] for row in rows] == list(range(20))
    assert [row["width"] for row in rows] == [8 + 20 * (number % 3) for number in range(20)]


def test_the_format_is_read_from_the_bytes():
    buffer = io.BytesIO()
    noise(9, 9, 0).save(buffer, "WEBP")
    from massl_ray.data.examine import file_format

    assert file_format(buffer.getvalue()) == "WEBP"
