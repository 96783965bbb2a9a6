"""Images that are a file each: lists of paths, patterns, and what a million paths cost."""

import os
import pickle
import time
from pathlib import Path

import pytest

from massl_ray.data.files import files, find, from_list, is_pattern, matches
from massl_ray.data.listing import Listing
from massl_ray.data.sources import open_source
from massl_ray.errors import UserError
from massl_ray.storage import Folder
from tests.helpers import names
from tests.storages import in_memory


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


# ---- lists -----------------------------------------------------------------------------------------------------------


def listing(text: bytes) -> Listing:
    return from_list(Folder("/data"), text, "/data/list.txt")


def test_a_list_keeps_its_order_and_repetitions():
    images = listing(b"b.png\na.png\n\nb.png\n")
    assert names(images) == ["b.png", "a.png", "b.png"] and images.labels is None
    assert images.path(1) == "/data/a.png"


def test_a_list_from_windows_with_a_byte_order_mark():
    assert names(listing(b"\xef\xbb\xbf\xc3\xa4 b.png\r\nc.png")) == ["ä b.png", "c.png"]


def test_labels_stand_after_the_last_tab():
    images = listing(b"a\tb.png\tcat\nc.png\tdog\nd.png\tcat\n")
    assert names(images) == ["a\tb.png", "c.png", "d.png"]
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 1, 0]


def test_a_line_without_a_label_is_named():
    with pytest.raises(UserError, match=r"the list /data/list\.txt has labels, but none for 'b c\.png'\. Give every line one"):
        listing(b"a.png\tcat\nb c.png\n")


def test_paths_in_a_list_may_be_anywhere(tmp_path):
    there = in_memory()
    there.write_text("deep/b.png", "remote")
    touch(tmp_path, "data/a.png", "elsewhere/c d.png")
    lines = ["a.png", "../elsewhere/c d.png", f"{tmp_path}/elsewhere/c d.png", f"{there}/deep/b.png", "gone.png"]
    (tmp_path / "data" / "list.txt").write_text("\n".join(lines))
    images = open_source(f"{tmp_path}/data/list.txt")
    assert [images.read(sample) for sample in range(4)] == [b"data/a.png", b"elsewhere/c d.png", b"elsewhere/c d.png", b"remote"]
    assert images.path(0) == f"{tmp_path}/data/a.png" and images.path(3) == f"{there}/deep/b.png"
    with pytest.raises(FileNotFoundError):
        images.read(4)


def test_a_list_at_a_uri_means_what_lies_beside_it():
    there = in_memory()
    there.write_text("set/x y/ü.png", "image")
    there.write_text("set/list.txt", "x y/ü.png\n")
    images = open_source(f"{there}/set/list.txt")
    assert images.read(0) == b"image" and images.root == f"{there}/set" and images.path(0) == f"{there}/set/x y/ü.png"


@pytest.mark.parametrize("text", [b"", b"\n\n"])
def test_an_empty_list_is_refused(tmp_path, text):
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(UserError, match=r"there are no images in .*list\.txt"):
        open_source(str(tmp_path / "list.txt"))


@pytest.mark.parametrize("name", ["images.zip", "shard.tar.gz", "no suffix"])
def test_what_is_no_list_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04\0\0\0")
    with pytest.raises(UserError, match=f"{name} is neither a folder nor a text file"):
        open_source(str(tmp_path / name))


def test_a_million_paths(tmp_path):
    """Listed in seconds, and as small as their letters on the way to a task."""
    text = "".join(f"train/class_{number % 1000:04d}/image_{number:07d}.jpg\t{number % 1000}\n" for number in range(1_000_000))
    (tmp_path / "list.txt").write_text(text)
    began = time.process_time()
    images = open_source(str(tmp_path / "list.txt"))
    assert time.process_time() - began < 20
    assert len(images) == 1_000_000 and len(images.classes) == 1000 and images.classes[:3] == ("0", "1", "2")
    assert images.name(999_999) == "train/class_0999/image_0999999.jpg" and images.labels[999_999] == 999
    letters = sum(map(len, text.splitlines())) - sum(len(f"\t{number % 1000}") for number in range(1_000_000))
    assert len(pickle.dumps(images)) < letters + 2 * 8 * 1_000_000 + 100_000  # letters, where each begins, its label
    assert pickle.loads(pickle.dumps(images)).name(123_456) == images.name(123_456)


# ---- patterns --------------------------------------------------------------------------------------------------------

TREE = ("a/1.jpg", "a/2.png", "a/b/3.jpg", "c/4.JPG", "c/5.jpg", "6.jpg", "a/7", "a/[8].jpg")


@pytest.mark.parametrize(
    ("pattern", "folder", "expected"),
    [
        ("*.jpg", "", ["6.jpg"]),
        ("*/*.jpg", "", ["a/1.jpg", "a/[8].jpg", "c/5.jpg"]),
        ("a/?.*", "a", ["1.jpg", "2.png"]),
        ("**/*.jpg", "", ["6.jpg", "a/1.jpg", "a/[8].jpg", "a/b/3.jpg", "c/5.jpg"]),
        ("a/**", "a", ["1.jpg", "2.png", "7", "[8].jpg", "b/3.jpg"]),
        ("[bc]/[0-4].*", "", ["c/4.JPG"]),
        ("a/b/*", "a/b", ["3.jpg"]),
    ],
)
def test_patterns(tmp_path, pattern, folder, expected):
    there = in_memory()
    touch(tmp_path, *TREE)
    for name in TREE:
        there.write_text(name, name)
    assert matches(f"{tmp_path}/{pattern}") == (Folder(tmp_path / folder), expected)
    if "?" not in pattern:
        assert matches(f"{there}/{pattern}") == (there / folder if folder else there, expected)


def test_options_of_a_uri_are_no_pattern_and_stay_with_its_files():
    assert not is_pattern("s3://bucket/images?scheme=http") and is_pattern("s3://bucket/*.jpg?scheme=http")
    assert is_pattern("/data/a?.png") and is_pattern("*.tar") and not is_pattern("/data/images")


def test_a_pattern_without_a_match(tmp_path):
    touch(tmp_path, "a.png")
    with pytest.raises(UserError, match=r"data\.source: no file matches .*\*\.jpg"):
        open_source(f"{tmp_path}/*.jpg")
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        open_source(f"{tmp_path}/nowhere/*.jpg")


def test_a_file_that_is_named_like_a_pattern(tmp_path):
    touch(tmp_path, "[1]/a.png")
    assert names(open_source(f"{tmp_path}/[1]")) == ["a.png"]


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_ten_thousand_files_and_ten_thousand_folders(tmp_path):
    for number in range(10_000):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{number}.png").touch()
        (tmp_path / "folders" / str(number)).mkdir(parents=True)
        (tmp_path / "folders" / str(number) / "image.png").touch()
    images = open_source(str(tmp_path / "files"))
    assert names(images) == sorted(f"{number}.png" for number in range(10_000))
    images = open_source(str(tmp_path / "folders"))
    assert names(images) == sorted(f"{number}/image.png" for number in range(10_000)) and images.labels is None


def test_find_is_the_same_at_a_uri(tmp_path):
    there = in_memory()
    touch(tmp_path, *TREE)
    for name in TREE:
        there.write_text(name, name)
    assert find(there, {".jpg"}) == find(Folder(tmp_path), {".jpg"}) == sorted(set(TREE) - {"a/2.png", "a/7"})


def test_names_are_any_bytes():
    store = files(Folder("/data"), [b"\xff\xfe.png", "two\nlines.png"])
    assert os.fsencode(store.name(0)) == b"\xff\xfe.png" and store.path(1) == "/data/two\nlines.png"
