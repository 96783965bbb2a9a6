"""The demo tiles: how a picture is cut, and that the folder is made once and whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from massl_ray.data import demo
from massl_ray.data.demo import BLOCK, TILE, cut_tiles, demo_folder
from massl_ray.errors import UserError


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """A gray picture of so many tiles, no two alike."""
    return np.random.default_rng(seed).integers(0, 256, (rows * TILE, columns * TILE)).astype(float)


def tile_at(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    tile = picture[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
    return np.clip(np.rint(128 + 48 * (tile - np.mean(tile)) / np.sqrt(np.mean((tile - np.mean(tile)) ** 2))), 0, 255)


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """Two pictures instead of the packages', and an empty cache; returns the cache."""
    for package, name in (("skimage", "one.png"), ("sklearn", "two.png")):
        folder = tmp_path / package / demo.FOLDERS[package]
        folder.mkdir(parents=True)
        Image.fromarray(noise(12, 12, len(name) + len(package)).astype(np.uint8)).save(folder / name)
    monkeypatch.setattr(demo, "PICTURES", {"skimage": ["one.png"], "sklearn": ["two.png"]})
    monkeypatch.setattr(demo, "_package_folder", lambda package: tmp_path / package)
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_small_picture_is_all_for_training():
    picture = noise(2, 3)
    tiles = cut_tiles(picture)
    assert tiles["test"] == []
    expected = [tile_at(picture, row, column) for row in range(2) for column in range(3)]
    assert np.array_equal(tiles["train"], expected)
    assert tiles["train"][0].dtype == np.uint8


def test_every_third_block_is_for_test():
    picture = noise(3 * BLOCK, 3 * BLOCK)
    tiles = cut_tiles(picture)
    blocks = {"train": [], "test": []}
    for row in range(3 * BLOCK):
        for column in range(3 * BLOCK):
            on_test_diagonal = (row // 4, column // 4) in {(0, 2), (1, 1), (2, 0)}
            blocks["test" if on_test_diagonal else "train"].append(tile_at(picture, row, column))
    assert np.array_equal(tiles["train"], blocks["train"])
    assert np.array_equal(tiles["test"], blocks["test"])
    assert (len(tiles["train"]), len(tiles["test"])) == (96, 48)


def test_brightness_and_contrast_give_nothing_away():
    picture = noise(2, 2)
    for tile in cut_tiles(picture)["train"]:
        assert tile.mean() == pytest.approx(128, abs=0.5)
        assert tile.std() == pytest.approx(48, abs=0.5)
    assert np.array_equal(cut_tiles(20 + picture / 5)["train"], cut_tiles(picture)["train"])


def test_flat_tiles_and_the_rest_at_the_edges_are_dropped():
    picture = np.full((TILE * 2 + 31, TILE * 2 + 5), 77.0)
    assert cut_tiles(picture) == {"train": [], "test": []}
    picture[:TILE, TILE : 2 * TILE] += 3.9 * np.where(np.arange(TILE) % 2, 1, -1)
    assert cut_tiles(picture)["train"] == []
    picture[TILE : 2 * TILE, :TILE] += 4.1 * np.where(np.arange(TILE) % 2, 1, -1)
    (tile,) = cut_tiles(picture)["train"]
    assert np.array_equal(tile[:, :4], [[80, 176, 80, 176]] * TILE)


def test_the_folder_holds_a_class_a_picture(pictures):
    folder = demo_folder("train")
    assert folder == pictures / f"demo-tiles-{demo.VERSION}" / "train"
    assert files_in(folder) == [f"{name}/{number:04d}.png" for name in ("one", "two") for number in range(96)]
    assert files_in(demo_folder("test")) == [f"{name}/{number:04d}.png" for name in ("one", "two") for number in range(48)]
    picture = np.asarray(Image.open(pictures.parent / "skimage/data/one.png"), dtype=float)
    assert np.array_equal(np.asarray(Image.open(folder / "one/0001.png")), tile_at(picture, 0, 1))
    assert [path.name for path in pictures.iterdir()] == [f"demo-tiles-{demo.VERSION}"]


def test_the_folder_is_made_once(pictures, monkeypatch):
    before = demo_folder("train")
    monkeypatch.setattr(demo, "_cut_all", lambda folder: pytest.fail("cut twice"))
    assert demo_folder("train") == before


def test_another_process_may_be_faster(pictures):
    folder = demo_folder("train").parent
    (folder / "train/one/0000.png").write_bytes(b"theirs")
    demo._cut_all(folder)
    assert (folder / "train/one/0000.png").read_bytes() == b"theirs"
    assert [path.name for path in pictures.iterdir()] == [folder.name]


def test_a_cut_that_fails_leaves_no_folder_to_trust(pictures, monkeypatch):
    def fail(picture):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(demo, "cut_tiles", fail)
        demo_folder("train")
    assert not (pictures / f"demo-tiles-{demo.VERSION}").exists()
    assert len(files_in(demo_folder("train"))) == 192


def test_without_scikit_image_the_user_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "find_spec", lambda package: None)
    with pytest.raises(UserError) as caught:
        demo_folder("train")
    assert str(caught.value) == (
        "The demo images come with scikit-image, which is not installed: pip install 'massl-ray[demo]', or "
        "give --data.source a folder."
    )
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_packages_hold_all_pictures():
    pytest.importorskip("skimage")
    for package, names in demo.PICTURES.items():
        for name in names:
            with Image.open(demo._package_folder(package) / demo.FOLDERS[package] / name) as picture:
                tiles = cut_tiles(np.asarray(picture.convert("L"), dtype=float))
            assert len(tiles["train"]) >= 10 and len(tiles["test"]) >= 5, name
