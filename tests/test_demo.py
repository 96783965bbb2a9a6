"""The demo images: tiles that tell classes only by texture, test tiles from elsewhere than training tiles."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from massl_ray.data import demo
from massl_ray.data.demo import BLOCK, FLAT, PICTURES, TILE, cut_tiles, demo_folder
from massl_ray.errors import UserError

BOARD = TILE * BLOCK * 3


def noise(height: int, width: int, brightness: float = 100, contrast: float = 20) -> np.ndarray:
    return np.random.default_rng(1).normal(brightness, contrast, (height, width))


def cell(part: np.ndarray) -> np.ndarray:
    """What a tile becomes, by its definition."""
    return np.clip(np.round(128 + 48 * (part - part.mean()) / part.std()), 0, 255)


def test_tiles_are_cut_in_rows_and_the_rest_is_left():
    picture = noise(TILE * 2 + 31, TILE * 3 + 7)
    tiles = cut_tiles(picture)
    assert len(tiles["train"]) == 6 and tiles["test"] == []
    for number, tile in enumerate(tiles["train"]):
        row, column = divmod(number, 3)
        assert np.array_equal(tile, cell(picture[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]))


def test_brightness_and_contrast_give_nothing_away():
    base = noise(64, 64)
    for other in (base + 90, base * 3, base * 0.5 - 40):
        for one, two in zip(cut_tiles(base)["train"], cut_tiles(other)["train"], strict=True):
            assert np.abs(one.astype(int) - two).max() <= 1
    for tile in cut_tiles(base)["train"]:
        assert tile.dtype == np.uint8 and tile.mean() == pytest.approx(128, abs=1) and tile.std() == pytest.approx(48, abs=1)


def test_flat_tiles_are_dropped():
    picture = noise(TILE, TILE * 3)
    for column, contrast in ((1, FLAT * 0.98), (2, FLAT * 1.02)):
        part = picture[:, column * TILE : (column + 1) * TILE]
        part[:] = (part - part.mean()) / part.std() * contrast + 50
    tiles = cut_tiles(picture)["train"]
    assert len(tiles) == 2 and np.array_equal(tiles[1], cell(picture[:, 2 * TILE :]))
    assert cut_tiles(np.zeros((64, 64))) == {"train": [], "test": []}


def test_every_third_block_is_for_test():
    picture = noise(BOARD, BOARD)
    tiles = cut_tiles(picture)
    assert len(tiles["test"]) == 3 * 16 and len(tiles["train"]) == 6 * 16
    board = [[(row + column) % 3 == 2 for column in range(3)] for row in range(3)]
    expected = [
        cell(picture[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32])
        for row in range(12)
        for column in range(12)
        if board[row // 4][column // 4]
    ]
    assert all(np.array_equal(one, two) for one, two in zip(tiles["test"], expected, strict=True))


@pytest.fixture
def two_pictures(tmp_path, monkeypatch) -> Path:
    """A package of two pictures instead of the real ones; returns the cache."""
    package = tmp_path / "package"
    (package / "pictures").mkdir(parents=True)
    for number, name in enumerate(("first.png", "second.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (TILE * 4, BOARD, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(package / "pictures" / name)
    monkeypatch.setattr(demo, "PICTURES", {"package": ["first.png", "second.png"]})
    monkeypatch.setattr(demo, "FOLDERS", {"package": "pictures"})
    monkeypatch.setattr(demo, "_package_folder", lambda name: tmp_path / name)
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_cut_on_first_use_and_kept(two_pictures, monkeypatch):
    folder = demo_folder("train")
    assert folder == two_pictures / "demo-tiles-1" / "train"
    assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]
    counts = {part: len(list((folder.parent / part / "first").glob("*.png"))) for part in ("train", "test")}
    assert counts == {"train": 32, "test": 16}
    picture = np.asarray(Image.open(two_pictures.parent / "package" / "pictures" / "first.png").convert("L"), dtype=float)
    assert np.array_equal(np.asarray(Image.open(folder / "first" / "0001.png")), cell(picture[:32, 32:64]))

    def never(folder):
        raise AssertionError("cut again")

    monkeypatch.setattr(demo, "_cut_all", never)
    assert demo_folder("test") == two_pictures / "demo-tiles-1" / "test"
    assert [path.name for path in two_pictures.iterdir()] == ["demo-tiles-1"]


def test_a_folder_is_there_whole_or_not_at_all(two_pictures, monkeypatch):
    cut = demo.cut_tiles

    def failing(picture, calls=[]):  # noqa: B006 - counts the calls
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return cut(picture)

    monkeypatch.setattr(demo, "cut_tiles", failing)
    with pytest.raises(KeyboardInterrupt):
        demo_folder("train")
    assert not (two_pictures / "demo-tiles-1").exists()
    monkeypatch.setattr(demo, "cut_tiles", cut)
    assert len(list(demo_folder("train").glob("*/*.png"))) == 64


def test_another_process_was_faster(two_pictures, monkeypatch):
    cut = demo.cut_tiles

    def meanwhile(picture):
        (two_pictures / "demo-tiles-1" / "train" / "theirs").mkdir(parents=True, exist_ok=True)
        return cut(picture)

    monkeypatch.setattr(demo, "cut_tiles", meanwhile)
    folder = demo_folder("train")
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert [path.name for path in two_pictures.iterdir()] == ["demo-tiles-1"]  # ours is cleared away


def test_without_scikit_image(monkeypatch, tmp_path):
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"pip install 'massl-ray\[demo\]', or give --data\.source a folder"):
        demo_folder("train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
def test_the_real_pictures(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path))
    train, test = demo_folder("train"), demo_folder("test")
    names = sorted(Path(name).stem for names in PICTURES.values() for name in names)
    assert sorted(path.name for path in train.iterdir()) == names and len(names) == 19
    tiles = {part: {path.read_bytes() for path in folder.rglob("*.png")} for part, folder in (("train", train), ("test", test))}
    assert not tiles["train"] & tiles["test"]
    numbers = {folder.name: len(list(folder.rglob("*.png"))) for folder in (train, test)}
    assert numbers["train"] == pytest.approx(3149, abs=30) and numbers["test"] == pytest.approx(1518, abs=30)
    with Image.open(next(train.rglob("*.png"))) as tile:
        assert tile.size == (TILE, TILE) and tile.mode == "L"
