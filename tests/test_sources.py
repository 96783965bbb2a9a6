"""Where images come from: what is found, in which order, with which labels, and what is refused before work starts."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_ray.data import sources
from massl_ray.data.sources import SUFFIXES, Listing, fault, hold_out, listing, open_source, probe
from massl_ray.errors import UserError
from tests.helpers import make_images


def touch(folder: Path, *names: str) -> Path:
    """Empty files of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(folder: Path) -> list[str]:
    return open_source(str(folder)).paths.tolist()


# ---- what is found ---------------------------------------------------------------------------------------------------


def test_any_depth_sorted(tmp_path):
    touch(tmp_path, "b/2.png", "b/1.jpg", "a/deep/er/x.webp", "z.gif", "a/y.tiff")
    assert found(tmp_path) == ["a/deep/er/x.webp", "a/y.tiff", "b/1.jpg", "b/2.png", "z.gif"]


def test_suffixes_in_any_case_and_nothing_else(tmp_path):
    images = ["a.JPG", "b.jpeg", "c.Png", "d.WEBP", "e.tif", "f.TIFF", "g.bmp", "h.GIF"]
    touch(tmp_path, *images, "notes.txt", "png", ".png", "x.png.txt", "model.safetensors")
    assert found(tmp_path) == images
    assert {os.path.splitext(name)[1].lower() for name in images} == SUFFIXES


def test_a_folder_that_is_named_like_an_image(tmp_path):
    assert found(touch(tmp_path, "folder.png/inside.png")) == ["folder.png/inside.png"]


@pytest.mark.parametrize(
    "name", ["mit Leerzeichen.png", "größe/ß.png", "猫/犬.jpg", "two\nlines.png", "'\"&<>.png", "a%20b#?.png", " .png"]
)
def test_any_name(tmp_path, name):
    images = open_source(str(touch(tmp_path, name, "zz.png")))
    assert name in images.paths.tolist()
    assert os.path.isfile(images.path(images.paths.tolist().index(name)))


def test_names_that_are_no_text(tmp_path):
    raw = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    try:
        open(raw, "wb").close()
    except OSError:
        pytest.skip("this file system takes only text")
    images = open_source(str(tmp_path))
    assert os.fsencode(images.path(0)) == raw and os.path.isfile(images.path(0))


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "pictures/a.png")
    assert found(Path("~/pictures")) == ["a.png"]


def test_the_order_does_not_come_from_the_file_system(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{folder}/{index}.png" for folder in "cab" for index in range(5)))
    before = found(tmp_path)
    scandir = os.scandir

    class Backwards:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(sources.os, "scandir", Backwards)
    assert found(tmp_path) == before == sorted(before)


def test_the_demo_is_its_parts(monkeypatch, tmp_path):
    touch(tmp_path, "train/a/0.png", "test/b/1.png", "test/b/2.png")
    monkeypatch.setattr(sources, "demo_folder", lambda part: tmp_path / part)
    assert open_source("demo").paths.tolist() == ["a/0.png"]
    assert open_source("demo", "test").paths.tolist() == ["b/1.png", "b/2.png"]


# ---- links -----------------------------------------------------------------------------------------------------------


def test_a_link_that_leads_back_ends(tmp_path):
    touch(tmp_path, "a/1.png", "a/b/2.png")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "itself").symlink_to(tmp_path / "a")
    (tmp_path / "dot").symlink_to(".")
    assert found(tmp_path) == ["a/1.png", "a/b/2.png"]


def test_two_folders_that_link_to_each_other(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    assert found(tmp_path) == ["a/1.png", "b/2.png"]


def test_links_to_elsewhere_are_followed_once(tmp_path):
    touch(tmp_path, "elsewhere/1.png", "elsewhere/deep/2.png", "elsewhere/single.png", "data/0.png")
    (tmp_path / "data" / "second").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "first").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "one.png").symlink_to(tmp_path / "elsewhere" / "single.png")
    assert found(tmp_path / "data") == ["0.png", "first/1.png", "first/deep/2.png", "first/single.png", "one.png"]


def test_links_that_lead_nowhere_are_images_that_cannot_be_read(tmp_path):
    touch(tmp_path, "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "missing.png")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    assert found(tmp_path) == ["a.png", "gone.png"]
    assert "FileNotFoundError" in str(fault(str(tmp_path / "gone.png")))


def test_the_source_itself_may_be_a_link(tmp_path):
    touch(tmp_path, "data/x/0.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert found(tmp_path / "link") == ["x/0.png"]


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_class_folders():
    images = listing("/images", ["cat/1.png", "cat/deep/2.png", "dog/3.png", "ape/4.png", "ape/5.png", "dog/cat/6.png"])
    assert images.classes == ("ape", "cat", "dog")
    assert images.labels.tolist() == [1, 1, 2, 0, 0, 2]


@pytest.mark.parametrize(
    "paths",
    [
        ["1.png", "2.png", "3.png", "4.png"],  # no folders
        ["a/1.png", "a/2.png", "a/3.png", "a/4.png"],  # one folder
        ["a/1.png", "a/2.png", "b/3.png", "b/4.png", "5.png"],  # one image in none
        ["a/1.png", "b/2.png", "c/3.png"],  # a folder an image
        ["a/1.png", "a/2.png", "a/3.png", "b/4.png", "c/5.png"],  # under two images a folder
    ],
)
def test_no_class_folders(paths):
    images = listing("/images", paths)
    assert images.labels is None and images.classes == () and images.paths.tolist() == paths


def test_two_images_a_class_are_enough():
    assert listing("/images", ["a/1.png", "a/2.png", "a/3.png", "b/4.png"]).classes == ("a", "b")


def test_take_keeps_images_and_labels_together():
    images = listing("/images", ["a/1.png", "a/2.png", "b/3.png", "b/4.png"])
    taken = images.take(np.array([3, 0]))
    assert [taken.path(0), taken.path(1)] == ["/images/b/4.png", "/images/a/1.png"]
    assert taken.labels.tolist() == [1, 0] and taken.classes == ("a", "b") and len(taken) == 2
    assert listing("/images", ["1.png", "2.png"]).take(np.array([1])).labels is None


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"data\.source: there is no folder .*missing.*or 'demo'"):
        open_source(str(tmp_path / "missing"))


def test_a_file_instead_of_a_folder(tmp_path):
    touch(tmp_path, "a.png")
    with pytest.raises(UserError, match="there is no folder"):
        open_source(str(tmp_path / "a.png"))


def test_a_folder_without_images(tmp_path):
    touch(tmp_path, "notes.txt", "empty/readme.md")
    with pytest.raises(UserError, match=r"data\.source: no image files in .*\.bmp, \.gif, .*at any depth"):
        open_source(str(tmp_path))


def test_a_folder_that_cannot_be_searched(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "closed/b.png")
    scandir = os.scandir

    def refusing(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(sources.os, "scandir", refusing)
    with pytest.raises(UserError, match=r"the folder .*closed cannot be searched \(Permission denied\)"):
        open_source(str(tmp_path))


# ---- probe -----------------------------------------------------------------------------------------------------------


def broken_ones(folder: Path, number: int, broken: int) -> Listing:
    """A listing of `number` images of which the last `broken` are empty files."""
    make_images(folder, number)
    for index in range(number - broken, number):
        (folder / f"{index:03d}.png").write_bytes(b"")
    return open_source(str(folder))


@pytest.mark.parametrize(("broken", "share"), [(0, 0.01), (2, 0.1), (2, 0.2), (20, 1.0)])
def test_probe_lets_pass_what_is_allowed(tmp_path, broken, share):
    images = broken_ones(tmp_path / "x", 20, broken)
    assert sum(fault(images.path(sample)) is not None for sample in range(20)) == broken
    probe(images, share)


def test_probe_names_how_many_and_the_first(tmp_path):
    images = broken_ones(tmp_path / "x", 20, 3)
    with pytest.raises(UserError) as caught:
        probe(images, 0.1)
    message = str(caught.value)
    assert message.startswith(f"data.source: 3 of the 20 images tried in {images.root} cannot be read")
    assert f"first: {images.root}/017.png: UnidentifiedImageError" in message and "max_skipped 0.1" in message


def test_probe_of_nothing_that_can_be_read(tmp_path):
    with pytest.raises(UserError, match="none of the 4 images tried in .* can be read"):
        probe(broken_ones(tmp_path / "x", 4, 4), 0.5)


def test_probe_tries_a_spread_out_few(monkeypatch):
    tried = []
    monkeypatch.setattr(sources, "fault", lambda path, max_pixels: tried.append(path))
    images = Listing("/images", np.array([str(number) for number in range(10_000)]), None, ())
    probe(images, 0.05)
    places = sorted(int(os.path.basename(path)) for path in tried)
    assert len(set(places)) == 256 and places[0] == 0 and places[-1] == 9999
    assert set(np.diff(places)) <= {39, 40}
    tried.clear()
    probe(images.take(np.arange(7)), 0.05)
    assert len(tried) == 7
    tried.clear()
    probe(images, 0.05, at_most=3)
    assert sorted(int(os.path.basename(path)) for path in tried) == [0, 4999, 9999]


def test_fault(tmp_path):
    make_images(tmp_path / "x", 1)
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert fault(str(tmp_path / "x" / "000.png")) is None
    assert fault(str(tmp_path / "bad.png")) == "UnidentifiedImageError: cannot identify image file"
    assert str(fault(str(tmp_path / "none.png"))).startswith("FileNotFoundError")


# ---- hold_out --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 500), share=st.floats(0.01, 0.9))
def test_hold_out_splits_in_two_and_always_alike(size, share):
    images = Listing("/images", np.array([f"{number:04d}" for number in range(size)]), np.arange(size) % 3, ("a", "b", "c"))
    bank, queries = hold_out(images, share)
    assert sorted([*bank.paths, *queries.paths]) == images.paths.tolist()
    for part in (bank, queries):
        assert part.paths.tolist() == sorted(part.paths)
        assert all(label == int(path) % 3 for path, label in zip(part.paths, part.labels, strict=True))
    again = hold_out(images, share)
    assert again[1].paths.tolist() == queries.paths.tolist()


def test_hold_out_is_a_tenth_and_a_side_does_not_change_as_images_come_after():
    few, many = (Listing("/images", np.array([f"{number:05d}" for number in range(size)]), None, ()) for size in (5000, 20_000))
    queries = hold_out(few)[1].paths.tolist()
    assert len(queries) == pytest.approx(500, abs=4 * np.sqrt(5000 * 0.09))
    assert queries == [path for path in hold_out(many)[1].paths.tolist() if int(path) < 5000]


def test_hold_out_draws_from_its_own_key():
    images = Listing("/images", np.arange(100).astype(str), None, ())
    draws = np.random.Generator(np.random.Philox(key=np.array([0, 7], dtype=np.uint64))).random(100)
    assert hold_out(images, 0.3)[1].paths.tolist() == [str(number) for number in range(100) if draws[number] < 0.3]
