"""Photographs for measurements: real, of one size, none flat, from wherever there are some."""

import io

import numpy as np
import pytest
from PIL import Image

from massl_ray.benches import photographs as module
from massl_ray.benches.photographs import LEAST_BYTES, photographs
from massl_ray.errors import UserError


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG" and image.size == (500, 375) and len(data) >= LEAST_BYTES
    return image


def test_a_cut_of_each_picture_before_a_second_of_any(tmp_path):
    for number, (width, height) in enumerate([(1100, 400), (500, 375), (1000, 800), (499, 900)]):
        (tmp_path / "deep").mkdir(exist_ok=True)
        noise(width, height, number).save(tmp_path / "deep" / f"{number}.jpg", quality=97)
    Image.new("RGB", (1000, 800)).save(tmp_path / "flat.jpeg")
    cuts = photographs(9, str(tmp_path))
    firsts = [opened(cut).tobytes() for cut in cuts]
    assert len(set(firsts)) == 7 and firsts[7:] == firsts[:2]  # two, one and four cuts; none of the flat and the narrow one
    assert photographs(3, str(tmp_path)) == cuts[:3]


def test_a_folder_without_photographs(tmp_path):
    with pytest.raises(UserError, match="--photos: .* holds no JPEG photographs of at least 500 x 375 pixels"):
        photographs(2, str(tmp_path))


def test_those_of_packages_where_the_system_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "INSTALLED", (str(tmp_path),))
    cuts = photographs(20)
    assert len(cuts) == 20 and len(set(cuts)) >= 4  # of two photographs there are in any case
    assert np.mean([len(cut) for cut in cuts]) * 8 / 500 / 375 >= 2
    for cut in cuts:
        opened(cut)
