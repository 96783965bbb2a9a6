"""Pictures for people: where each view lands in the grid, thumbnails, files written whole."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from massl_ray.config import DataSection
from massl_ray.data.sources import open_source
from massl_ray.reporting.pictures import GAP, SIDE, add_pictures, png_bytes, save_png, thumbnail, view_grid
from tests.helpers import photograph, smooth
from tests.sources import write_parquet

CELL = SIDE + GAP


def colours(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 200, (*shape, 1, 1, 3), dtype=np.uint8)


def test_grid_has_a_row_an_image_globals_first():
    two, three = colours(5, 2), colours(5, 3)
    grid = view_grid(np.tile(two, (1, 1, 32, 32, 1)), np.tile(three, (1, 1, 16, 16, 1)))
    assert grid.shape == (5 * CELL, 5 * CELL, 3) and grid.dtype == np.uint8
    for image in range(5):
        for view, colour in enumerate([*two[image], *three[image]]):
            tile = grid[image * CELL : image * CELL + SIDE, view * CELL : view * CELL + SIDE]
            assert (tile == colour).all()
    gaps = np.ones(grid.shape[:2], dtype=bool)
    for image in range(5):
        for view in range(5):
            gaps[image * CELL : image * CELL + SIDE, view * CELL : view * CELL + SIDE] = False
    assert (grid[gaps] == 255).all()


def test_grid_shows_the_views_themselves():
    views = np.stack([np.asarray(photograph(40, 40)), np.asarray(photograph(40, 40))[:, ::-1]])[None]
    grid = view_grid(views, np.empty((1, 0, 16, 16, 3), np.uint8))
    for view in range(2):
        expected = np.asarray(Image.fromarray(views[0, view]).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        assert np.array_equal(grid[:SIDE, view * CELL : view * CELL + SIDE], expected)
    assert grid.shape == (CELL, 2 * CELL, 3)


def test_saved_pixels_come_back_and_nothing_is_left_beside(tmp_path):
    save_png(tmp_path / "x.png", smooth())
    save_png(tmp_path / "x.png", 255 - smooth())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), 255 - smooth())
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_crash_leaves_the_former_picture(tmp_path, monkeypatch):
    save_png(tmp_path / "x.png", smooth())

    def full(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space"):
        save_png(tmp_path / "x.png", 255 - smooth())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), smooth())


def test_png_bytes_lose_nothing():
    found = Image.open(io.BytesIO(png_bytes(Image.fromarray(smooth()))))
    assert found.format == "PNG" and np.array_equal(np.asarray(found), smooth())


@pytest.mark.parametrize(("width", "height"), [(160, 120), (120, 160), (100, 100)])
def test_thumbnail_is_the_centred_square(width, height):
    image = photograph(width, height)
    cut = min(width, height)
    left, top = (width - cut) // 2, (height - cut) // 2
    expected = image.crop((left, top, left + cut, top + cut)).resize((48, 48), Image.Resampling.BICUBIC)
    found = np.asarray(thumbnail(image, 48), dtype=float)
    assert np.abs(found - np.asarray(expected)).mean() < 1  # the outermost pixels look past the cut
    assert np.array_equal(found[3:-3, 3:-3], np.asarray(expected)[3:-3, 3:-3])
    assert thumbnail(image).size == (SIDE, SIDE)


def test_thumbnail_of_a_pixel():
    assert (np.asarray(thumbnail(Image.new("RGB", (1, 1), (1, 2, 3)))) == (1, 2, 3)).all()


def test_pictures_come_from_where_the_images_are(tmp_path):
    """Here in a table, where no path leads to one image."""
    data = [png_bytes(Image.fromarray(np.full((40, 60, 3), level, np.uint8))) for level in (10, 200)]
    write_parquet(tmp_path / "images.parquet", [*data, b"broken"])
    entries = [{"sample": 1}, {"sample": 0}, {"sample": 2}]
    add_pictures(entries, open_source(str(tmp_path / "images.parquet")), DataSection())
    for entry, level in zip(entries[:2], (200, 10), strict=True):
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["picture"]))))
        assert found.shape == (SIDE, SIDE, 3) and (found == level).all()
    assert entries[2] == {"sample": 2, "picture": None}
