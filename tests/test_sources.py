"""Sources: which files count, in which order, which classes they make, and what is refused in which words."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from massl_ray.data import sources
from massl_ray.data.sources import Listing, fault, hold_out, listing, open_source, probe
from massl_ray.errors import UserError
from tests.helpers import make_images


def touch(root, *paths: str):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


def paths_of(root, *names: str) -> list[str]:
    return open_source(str(touch(root, *names))).paths.tolist()


# ---- which files -----------------------------------------------------------------------------------------------------


def test_finds_images_at_any_depth_sorted(tmp_path):
    assert paths_of(tmp_path, "z.png", "b/c/d/e.jpg", "a/2.png", "a/10.png", "B/x.png") == [
        "B/x.png",
        "a/10.png",
        "a/2.png",
        "b/c/d/e.jpg",
        "z.png",
    ]


def test_suffixes_in_any_case_and_nothing_else(tmp_path):
    images = ["1.jpg", "2.JPG", "3.Jpeg", "4.PNG", "5.webp", "6.tif", "7.TIFF", "8.bmp", "9.gif"]
    others = ["a.txt", "b.jpg.txt", "jpg", "c.svg", "d.npy", "e.png~", ".png"]
    assert paths_of(tmp_path, *images, *others) == images


def test_odd_names(tmp_path):
    names = ["ein bild.png", "new\nline.png", "Ünïcode/猫.png", "quote'\"<&>.png", "tab\t.png", "-rf.png", "#%?.png"]
    found = open_source(str(make_images(tmp_path / "images", 2)))
    for name in names:
        path = tmp_path / "images" / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 3), (1, 2, 3)).save(path)
    found = open_source(str(tmp_path / "images"))
    assert sorted(found.paths.tolist()) == sorted([*names, "000.png", "001.png"])
    assert [fault(found.path(sample)) for sample in range(len(found))] == [None] * 9


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"\xff\xfe.png")
    Image.new("RGB", (3, 3)).save(tmp_path / "0.png")
    os.rename(tmp_path / "0.png", tmp_path / name)
    found = open_source(str(tmp_path))
    assert found.paths.tolist() == [name]
    assert fault(found.path(0)) is None


def test_equal_looking_names_stay_two(tmp_path):
    names = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    assert sorted(paths_of(tmp_path, *names)) == sorted(names)


def test_folders_named_like_images_are_searched(tmp_path):
    assert paths_of(tmp_path, "x.png/y.png") == ["x.png/y.png"]


def test_the_order_of_the_file_system_is_of_no_account(tmp_path, monkeypatch):
    touch(tmp_path / "images", "a/1.png", "b/1.png", "b/2.png", "c.png")
    touch(tmp_path / "far", "1.png", "deep/2.png")
    (tmp_path / "images/y").symlink_to(tmp_path / "far")
    (tmp_path / "images/x").symlink_to(tmp_path / "far/deep")
    expected = open_source(str(tmp_path / "images")).paths.tolist()
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=len(str(path)) % 2 == 0)

        def __enter__(self):
            return iter(reversed(self.entries))

        def __exit__(self, *error): ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert open_source(str(tmp_path / "images")).paths.tolist() == expected
    assert expected == ["a/1.png", "b/1.png", "b/2.png", "c.png", "x/2.png", "y/1.png"]


# ---- links -----------------------------------------------------------------------------------------------------------


def test_links_are_followed(tmp_path):
    touch(tmp_path / "far", "cats/1.png", "2.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/linked").symlink_to(tmp_path / "far")
    (tmp_path / "images/3.png").symlink_to(tmp_path / "far/2.png")
    assert open_source(str(tmp_path / "images")).paths.tolist() == ["3.png", "linked/2.png", "linked/cats/1.png"]
    assert open_source(str(tmp_path / "images/linked")).paths.tolist() == ["2.png", "cats/1.png"]


def test_links_that_lead_back_end(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png")
    for number in range(3):  # each alone would double the paths at every depth
        (tmp_path / f"a/up{number}").symlink_to(tmp_path)
        (tmp_path / f"b/across{number}").symlink_to(tmp_path / "a")
        (tmp_path / f"a/itself{number}").symlink_to(tmp_path / "a")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert open_source(str(tmp_path)).paths.tolist() == ["a/1.png", "b/2.png"]


def test_a_folder_linked_twice_counts_once(tmp_path):
    touch(tmp_path, "b/1.png")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    assert open_source(str(tmp_path)).paths.tolist() == ["b/1.png"]


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_labels_by_first_folder(tmp_path):
    found = open_source(str(touch(tmp_path, "dog/x/1.png", "dog/2.png", "cat/1.png", "cat/2.png", "cat/y/z/3.png")))
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 0, 1, 1]
    assert found.paths.tolist() == ["cat/1.png", "cat/2.png", "cat/y/z/3.png", "dog/2.png", "dog/x/1.png"]
    assert found.path(3) == str(tmp_path / "dog/2.png")
    assert len(found) == 5


@pytest.mark.parametrize(
    ("paths", "labelled"),
    [
        (["a/1", "a/2", "b/1", "b/2"], True),
        (["a/1", "a/2", "a/3", "b/1"], True),  # two a class on average
        (["a/1", "a/2", "b/1"], False),
        (["a/1", "b/1", "c/1", "d/1"], False),  # a folder an image
        (["a/1", "a/2", "a/3"], False),  # one class
        (["a/1", "a/2", "b/1", "b/2", "stray"], False),
        (["1", "2", "3", "4"], False),
    ],
)
def test_when_folders_are_classes(paths, labelled):
    found = listing("root", paths)
    assert (found.labels is not None, bool(found.classes)) == (labelled, labelled)
    assert found.paths.tolist() == paths


def test_take():
    found = listing("root", ["a/1", "a/2", "b/1", "b/2"]).take(np.array([3, 0]))
    assert found == Listing("root", found.paths, found.labels, ("a", "b"))
    assert (found.paths.tolist(), found.labels.tolist()) == (["b/2", "a/1"], [1, 0])
    assert listing("root", ["1", "2"]).take(np.array([1])).labels is None


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path):
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path / "none"))
    assert str(caught.value) == (
        f"data.source: there is no folder {tmp_path / 'none'}. Give a folder that holds images (at any depth), or 'demo'."
    )


def test_a_file_is_no_folder(tmp_path):
    touch(tmp_path, "1.png")
    with pytest.raises(UserError, match=r"there is no folder .*1\.png"):
        open_source(str(tmp_path / "1.png"))


def test_empty_folder(tmp_path):
    touch(tmp_path, "a/readme.txt")
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path))
    assert str(caught.value) == (
        f"data.source: no image files in {tmp_path}; looked for .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp at any depth."
    )


def test_a_folder_that_may_not_be_searched(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path))
    assert str(caught.value) == f"data.source: the folder {tmp_path / 'b'} cannot be searched (Permission denied)."


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "images/1.png")
    assert open_source("~/images").path(0) == str(tmp_path / "images/1.png")


def test_demo(tmp_path, monkeypatch):
    touch(tmp_path, "train/a/1.png", "test/a/2.png")
    monkeypatch.setattr(sources, "demo_folder", lambda part: tmp_path / part)
    assert open_source("demo").paths.tolist() == ["a/1.png"]
    assert open_source("demo", "test").paths.tolist() == ["a/2.png"]


# ---- probing ---------------------------------------------------------------------------------------------------------


def spoilt(folder, number: int, broken: list[int]) -> Listing:
    found = open_source(str(make_images(folder, number)))
    for sample in broken:
        with open(found.path(sample), "wb") as file:
            file.write(b"broken")
    return found


def test_probe_lets_the_allowed_share_pass(tmp_path):
    probe(spoilt(tmp_path / "one", 20, []), 0.05)
    probe(spoilt(tmp_path / "two", 20, [3]), 0.05)


def test_probe_refuses_more(tmp_path):
    found = spoilt(tmp_path / "images", 20, [3, 11])
    with pytest.raises(UserError) as caught:
        probe(found, 0.05)
    assert str(caught.value) == (
        f"data.source: 2 of the 20 images tried in {tmp_path / 'images'} cannot be read, more than data.max_skipped 0.05 allows "
        f"(first: {found.path(3)}: UnidentifiedImageError: cannot identify image file). "
        "Mend or remove them, or raise data.max_skipped."
    )
    probe(found, 0.1)


def test_probe_where_nothing_can_be_read(tmp_path):
    with pytest.raises(UserError, match="none of the 3 images tried in .* can be read, more than"):
        probe(spoilt(tmp_path / "images", 3, [0, 1, 2]), 0.5)


def test_probe_tries_a_spread_out_few(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(sources, "fault", tried.append)
    found = open_source(str(touch(tmp_path, *(f"{number:03d}.png" for number in range(100)))))
    probe(found, 0.05, at_most=5)
    assert sorted(os.path.basename(path) for path in tried) == ["000.png", "024.png", "049.png", "074.png", "099.png"]
    tried.clear()
    probe(found, 0.05, at_most=256)
    assert len(set(tried)) == len(tried) == 100


def test_fault(tmp_path):
    found = spoilt(tmp_path / "images", 2, [1])
    assert fault(found.path(0)) is None
    assert fault(found.path(1)) == "UnidentifiedImageError: cannot identify image file"
    assert fault(str(tmp_path / "gone.png")).startswith("FileNotFoundError: ")


# ---- holding out -----------------------------------------------------------------------------------------------------


def numbered(size: int) -> Listing:
    return Listing("", np.array([str(number) for number in range(size)]), np.arange(size), tuple(map(str, range(size))))


def test_hold_out_is_fixed_disjoint_and_a_tenth():
    bank, queries = hold_out(numbered(5000))
    assert sorted([*bank.labels.tolist(), *queries.labels.tolist()]) == list(range(5000))
    assert len(queries) == pytest.approx(500, abs=4 * 21.2)
    again = hold_out(numbered(5000))
    assert again[0].paths.tolist() == bank.paths.tolist() and again[1].paths.tolist() == queries.paths.tolist()
    assert np.abs(np.corrcoef(np.isin(np.arange(5000), queries.labels), np.arange(5000))[0, 1]) < 0.06


def test_hold_out_of_another_share():
    bank, queries = hold_out(numbered(5000), 0.5)
    assert len(queries) == pytest.approx(2500, abs=4 * 35.4)
    assert set(hold_out(numbered(5000))[1].labels.tolist()) <= set(queries.labels.tolist())


def test_an_images_side_does_not_change_as_images_are_appended():
    small, large = hold_out(numbered(100))[1].labels.tolist(), hold_out(numbered(5000))[1].labels.tolist()
    assert small == [label for label in large if label < 100]
