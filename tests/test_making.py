"""From a file's bytes to views: decoded no larger than needed, drawn for the full size, unreadable files passed over."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from massl_ray.config import ViewsSection, load
from massl_ray.data.decode import Encoded
from massl_ray.data.making import ViewMaker, first_readable, views_of
from massl_ray.data.sources import open_source
from massl_ray.method.views import draw_views, make_views, smallest_shrinkage
from tests.helpers import decode, encoded, make_images, photograph
from tests.images import TINY

KEY = {"seed": 1, "epoch": 2, "sample": 3}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_views_of_a_small_image_are_those_of_its_pixels(kind):
    data, config = encoded(photograph(200, 150), kind), ViewsSection(global_size=64, local_size=48)
    found, expected = views_of(Encoded(data), config, **KEY), make_views(decode(data), config, **KEY)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_large_jpeg_is_decoded_smaller_and_its_views_stay(monkeypatch):
    """Same boxes, same pixels within the tolerance for resizing; and not those of other draws."""
    config = ViewsSection(global_size=32, local_size=16, blur=(0.0, 0.0, 0.0))
    data = encoded(photograph(637, 424), "JPEG", quality=97)
    decoded = []
    monkeypatch.setattr(
        Encoded, "pixels", lambda self, shrink=1, whole=Encoded.pixels: decoded.append(whole(self, shrink)) or decoded[-1]
    )
    found = views_of(Encoded(data), config, **KEY)
    pixels, shrunk = decoded.pop()
    assert shrunk == smallest_shrinkage(draw_views(config, 637, 424, **KEY)) >= 2
    assert pixels.shape[:2] == (-(-424 // shrunk), -(-637 // shrunk))
    expected = make_views(decode(data), config, **KEY)
    other = make_views(decode(data), config, **KEY | {"sample": 4})
    for one, whole, wrong in zip(found, expected, other, strict=True):
        assert np.abs(one.astype(float) - whole).mean() < 2.5
        assert np.abs(one.astype(float) - wrong).mean() > 10


def test_it_needs_no_torch():
    """Tasks start in a second because of that."""
    code = "import sys, massl_ray.data.making; print(sorted({'torch', 'torchvision', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def settings(source, *flags):
    return load([*TINY, "--data.source", str(source), *flags])


def test_rows_are_places_in_the_run(tmp_path):
    """Row 5 of a worker whose share is images 2 and 3 of every batch of 4, from step 1 on: step 3, its second image."""
    images = open_source(str(make_images(tmp_path / "images", 16)))
    config = settings(tmp_path)
    made = ViewMaker(images, config, 4, 1, 2, 2)({"id": np.array([5])})
    whole = ViewMaker(images, config, 4, 0, 0, 4)({"id": np.array([15])})
    assert np.array_equal(made["global_views"], whole["global_views"])
    assert made["local_views"].shape == (1, 2, 16, 16, 3) and made["skipped"].tolist() == [""]


def test_too_many_pixels_are_passed_over(tmp_path):
    folder = make_images(tmp_path / "images", 3)
    Image.new("RGB", (30, 30)).save(folder / "001.png")
    made = ViewMaker(open_source(str(folder)), settings(tmp_path, "--data.max_pixels", "400"), 3, 0, 0, 3)({"id": np.arange(3)})
    (skipped,) = [line for line in made["skipped"] if line]
    assert skipped.endswith("001.png: DecompressionBombError: 30 x 30 pixels, more than data.max_pixels 400 allows")


def test_what_use_cannot_read_is_passed_over(tmp_path):
    images = open_source(str(make_images(tmp_path / "images", 3)))

    def use(data: bytes) -> int:
        if data == open(images.path(2), "rb").read():
            raise ValueError("not this one")
        return len(data)

    found, skipped = first_readable(images, 2, use)
    assert found == len(open(images.path(0), "rb").read()) and skipped == [f"{images.path(2)}: ValueError: not this one"]
