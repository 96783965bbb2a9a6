"""The sets: which image is on which side, what is read of each package, and what is said where one cannot be had."""

import gzip
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from massl_ray.benches import labelled_sets
from massl_ray.benches.labelled_sets import elpv, every_nth, fashion, icons, open_sets, photo_tiles, photos, stamps
from massl_ray.errors import UserError
from tests.images import write_images


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def speckles(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MASSL_RAY_PACKAGES", raising=False)


def test_no_icon_is_on_both_sides(tmp_path):
    base = tmp_path / "usr/share/icons/oxygen/base"
    for size in (48, 64, 128, 32):
        for number in range(40):
            save(base / f"{size}x{size}" / ("apps" if number % 2 else "places") / f"icon{number}.png", speckles(size, size, 4))
    save(base / "64x64/status/icon3.png", speckles(64, 64, 4))  # the same name in another category
    (base / "48x48/apps/alias.png").symlink_to("icon1.png")
    save(base / "48x48/emotes/laugh.png", speckles(48, 48, 4))  # no category of ours
    sides: dict[str, set[str]] = {"train": set(), "test": set()}
    made = list(icons([tmp_path]))
    for part, _, name, _ in made:
        sides[part].add(name.rsplit("-", 1)[0])
    assert not sides["train"] & sides["test"] and 4 <= len(sides["test"]) <= 18
    assert len(made) == 3 * 40 + 1 and sides["train"] | sides["test"] == {f"icon{number}" for number in range(40)}


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((48, 48, 4))
    pixels[:, :24, 3] = 255  # black, the right half unseen
    save(tmp_path / "usr/share/icons/oxygen/base/48x48/apps/half.png", pixels)
    image = np.asarray(next(icons([tmp_path]))[3])
    assert image.shape == (48, 48, 3) and (image[:, :24] == 0).all() and (image[:, 24:] == 255).all()


def test_stamps_of_small_folders_are_no_class(tmp_path):
    root = tmp_path / "usr/share/tuxpaint/stamps"
    for number in range(13):
        save(root / "animals" / ("birds" if number % 2 else ".") / f"{number:02d}.png", speckles(300, 150, 3))
    for number in range(11):
        save(root / "medical" / f"{number}.png", speckles(20, 20, 3))
    made = list(stamps([tmp_path]))
    assert {kind for _, kind, _, _ in made} == {"animals"} and len({name for _, _, name, _ in made}) == 13
    assert [part for part, *_ in made].count("test") == 3
    assert {image.size for *_, image in made} == {(64, 128)}


def test_every_fourth_solar_cell_is_for_test(tmp_path):
    data = tmp_path / "elpv_dataset/data"
    for number in range(8):
        save(data / f"images/cell{number}.png", np.full((300, 300), 10 * number))
    lines = [f"images/cell{number}.png  {(0.0, 0.3333333)[number % 2]}   mono" for number in reversed(range(8))]
    (data / "labels.csv").write_text("\n".join(lines) + "\n")
    made = list(elpv([tmp_path]))
    assert [name for part, _, name, _ in made if part == "test"] == ["cell3", "cell7"]
    assert [kind for _, kind, _, _ in made[:2]] == ["defect_0.00", "defect_0.33"]
    assert np.asarray(made[5][3]).shape == (96, 96) and (np.asarray(made[5][3]) == 50).all()


def test_the_first_images_of_fashion(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled_sets, "FASHION", {"train": ("train", 3), "test": ("t10k", 2)})
    for prefix, offset in (("train", 0), ("t10k", 100)):
        pixels = np.arange(4, dtype=np.uint8)[:, None, None] + np.full((28, 28), offset, np.uint8)
        for what, values in (("images-idx3", pixels), ("labels-idx1", np.array([7, 5, 0, 1], np.uint8))):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (tmp_path / f"{prefix}-{what}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    found = [(part, kind, int(np.asarray(image)[0, 0])) for part, kind, _, image in fashion([tmp_path])]
    train = [("train", "class_7", 0), ("train", "class_5", 1), ("train", "class_0", 2)]
    assert found == [*train, ("test", "class_7", 100), ("test", "class_5", 101)]


def test_test_tiles_come_from_blocks_of_their_own():
    """Each tile holds its row and column; of 12 x 12 tiles the blocks of 4 x 4 with (row + column) % 3 == 2 are for test."""
    picture = speckles(12 * 64, 12 * 64, 3)
    for row in range(12):
        for column in range(12):
            picture[row * 64, column * 64] = [row, column, 0]
    tiles = photo_tiles(picture)
    places = {part: [tuple(int(value) for value in tile[0, 0, :2]) for tile in made] for part, made in tiles.items()}
    assert len(places["train"]) == 96 and len(places["test"]) == 48
    assert all((row // 4 + column // 4) % 3 == 2 for row, column in places["test"])
    assert not set(places["train"]) & set(places["test"])


def test_flat_tiles_abstract_pictures_and_small_ones_are_left_out(tmp_path):
    picture = speckles(12 * 64, 12 * 64, 3)
    picture[:64] = 7  # a row of tiles that show nothing
    for name in ("nature/meadow", "abstract/waves"):
        save(tmp_path / "usr/share/backgrounds/mate" / f"{name}.jpg", picture)
    save(tmp_path / "usr/share/backgrounds/small.jpg", speckles(200, 200, 3))
    made = list(photos([tmp_path]))
    assert {kind for _, kind, _, _ in made} == {"meadow"}
    assert [part for part, *_ in made].count("train") == 88 and [part for part, *_ in made].count("test") == 44


def test_every_nth_by_hand():
    assert every_nth(np.array([0, 1, 0, 0, 1, 0, 1, 0]), 2).tolist() == [False, False, True, False, True, True, False, False]


def test_folders_of_the_user(tmp_path):
    whole = write_images(tmp_path / "whole", 24)
    ((only, pair), missing) = open_sets(f"mine={whole},two={whole}:{write_images(tmp_path / 'other', 6)}")
    assert not missing and len(only.train) == 18 and len(only.test) == 6
    names = [{listing.name(place) for place in range(len(listing))} for listing in (only.train, only.test)]
    assert not names[0] & names[1]
    assert np.bincount(only.test.labels).tolist() == [2, 2, 2]
    assert len(pair.train) == 24 and len(pair.test) == 6 and pair.content != only.content


def test_labels_of_test_are_numbered_as_those_of_train(tmp_path):
    train, test = write_images(tmp_path / "train", 12), tmp_path / "test"
    for kind in ("stripes", "spots"):  # no ramps
        for number in range(2):
            save(test / kind / f"{number}.png", speckles(8, 8, 3))
    ((found,), _) = open_sets(f"mine={train}:{test}")
    assert found.test.classes == ("ramps", "spots", "stripes") and found.test.labels.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("nothing", "no set 'nothing'"),
        ("a/b=x", "is no name"),
        ("mine={flat}", "no labels"),
        ("mine={good}:{bad}", "class 'circles', which"),
    ],
)
def test_mistakes_are_refused(asked, words, tmp_path):
    save(tmp_path / "flat/one.png", speckles(8, 8, 3))
    for name in ("circles/1", "circles/2", "spots/1", "spots/2"):
        save(tmp_path / f"bad/{name}.png", speckles(8, 8, 3))
    good = write_images(tmp_path / "good", 6)
    with pytest.raises(UserError, match=words):
        open_sets(asked.format(flat=tmp_path / "flat", bad=tmp_path / "bad", good=good))


def test_a_set_is_made_once_of_a_package_that_lies_there(tmp_path, monkeypatch):
    """From a wheel in MASSL_RAY_PACKAGES; the second time without it. Nothing else is left in the cache."""
    data = tmp_path / "wheel/elpv_dataset/data"
    for number in range(16):
        save(data / f"images/cell{number:02d}.png", speckles(30, 30))
    (data / "labels.csv").write_text("\n".join(f"images/cell{number:02d}.png {number // 4 % 2} mono" for number in range(16)))
    (tmp_path / "packages").mkdir()
    wheel = tmp_path / "packages/elpv_dataset-9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted(data.rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path / "wheel"))
    monkeypatch.setenv("MASSL_RAY_PACKAGES", str(tmp_path / "packages"))
    ((first,), _) = open_sets("elpv")
    wheel.unlink()
    ((second,), missing) = open_sets("elpv")
    assert not missing and len(second.train) == 12 and len(second.test) == 4 and first.content == second.content
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["labelled-sets"]
    assert [path.name for path in (tmp_path / "cache/labelled-sets").iterdir()] == ["elpv-1"]


def test_a_set_that_cannot_be_fetched_is_skipped_with_a_sentence(tmp_path, monkeypatch):
    broken = tmp_path / "bin/apt-get"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'E: no network' >&2\nexit 100\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{broken.parent}:/usr/bin:/bin")
    found, missing = open_sets("icons,stamps")
    assert not found and len(missing) == 2
    assert "icons" in missing[0] and "E: no network" in missing[0] and "apt-get download oxygen-icon-theme" in missing[0]
    assert not list((tmp_path / "cache/labelled-sets").iterdir())
