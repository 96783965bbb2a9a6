"""Where images come from: what is found, in which order, with which labels, and what is refused before work starts."""

import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from massl_ray.data import files, sources
from massl_ray.data.files import SUFFIXES, by_folder
from massl_ray.data.listing import Listing
from massl_ray.data.making import first_readable
from massl_ray.data.sources import fault, hold_out, open_source, probe
from massl_ray.errors import UserError
from massl_ray.storage import Folder
from tests.helpers import decode, encoded, listed, make_images, names
from tests.sources import KINDS, encoded_images, write_list, write_parquet, write_tar
from tests.storages import in_memory, on_s3, s3_server


def touch(folder: Path, *names: str) -> Path:
    """Empty files of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(folder: Path) -> list[str]:
    return names(open_source(str(folder)))


# ---- what is found ---------------------------------------------------------------------------------------------------


def test_any_depth_sorted(tmp_path):
    touch(tmp_path, "b/2.png", "b/1.jpg", "a/deep/er/x.webp", "z.gif", "a/y.tiff")
    assert found(tmp_path) == ["a/deep/er/x.webp", "a/y.tiff", "b/1.jpg", "b/2.png", "z.gif"]


def test_suffixes_in_any_case_and_nothing_else(tmp_path):
    images = ["a.JPG", "b.jpeg", "c.Png", "d.WEBP", "e.tif", "f.TIFF", "g.bmp", "h.GIF", "i.npy"]
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
    assert name in names(images)
    assert os.path.isfile(images.path(names(images).index(name)))


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

    monkeypatch.setattr(files.os, "scandir", Backwards)
    assert found(tmp_path) == before == sorted(before)


def test_the_demo_is_its_parts(monkeypatch, tmp_path):
    touch(tmp_path, "train/a/0.png", "test/b/1.png", "test/b/2.png")
    monkeypatch.setattr(sources, "demo_folder", lambda part: tmp_path / part)
    assert names(open_source("demo")) == ["a/0.png"]
    assert names(open_source("demo", "test")) == ["b/1.png", "b/2.png"]


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
    assert "FileNotFoundError" in str(fault(open_source(str(tmp_path)), 1))


def test_the_source_itself_may_be_a_link(tmp_path):
    touch(tmp_path, "data/x/0.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert found(tmp_path / "link") == ["x/0.png"]


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_class_folders():
    images = by_folder(Folder("/images"), ["cat/1.png", "cat/deep/2.png", "dog/3.png", "ape/4.png", "ape/5.png", "dog/cat/6.png"])
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
    images = by_folder(Folder("/images"), paths)
    assert images.labels is None and images.classes == () and names(images) == paths


def test_two_images_a_class_are_enough():
    assert by_folder(Folder("/images"), ["a/1.png", "a/2.png", "a/3.png", "b/4.png"]).classes == ("a", "b")


def test_take_keeps_images_and_labels_together():
    images = by_folder(Folder("/images"), ["a/1.png", "a/2.png", "b/3.png", "b/4.png"])
    taken = images.take(np.array([3, 0]))
    assert [taken.path(0), taken.path(1)] == ["/images/b/4.png", "/images/a/1.png"]
    assert taken.labels.tolist() == [1, 0] and taken.classes == ("a", "b") and len(taken) == 2
    assert by_folder(Folder("/images"), ["1.png", "2.png"]).take(np.array([1])).labels is None


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"data\.source: there is no folder or file .*missing.*or 'demo'"):
        open_source(str(tmp_path / "missing"))


def test_an_image_instead_of_a_folder(tmp_path):
    touch(tmp_path, "a.png")
    with pytest.raises(UserError, match="a.png is neither a folder nor a text file with a path a line"):
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

    monkeypatch.setattr(files.os, "scandir", refusing)
    with pytest.raises(UserError, match=r"data\.source: .*closed cannot be read \(Permission denied\)\. Mend"):
        open_source(str(tmp_path))


# ---- every kind of source --------------------------------------------------------------------------------------------


IMAGES = encoded_images(8)


def by_class(images: Listing) -> list[tuple[bytes, str]]:
    return sorted((images.read(sample), images.classes[images.labels[sample]]) for sample in range(len(images)))


EXPECTED = sorted((image, ("cat", "dog")[number % 2]) for number, image in enumerate(IMAGES))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_images(tmp_path, kind):
    images = open_source(str(KINDS[kind](tmp_path, IMAGES)))
    assert by_class(images) == EXPECTED and images.classes == ("cat", "dog")
    assert by_class(pickle.loads(pickle.dumps(images))) == EXPECTED
    again = open_source(str(KINDS[kind](tmp_path / "again", IMAGES)))
    assert images.identity() == again.identity()  # wherever it lies
    assert all(fault(images, sample) is None for sample in range(8))


def test_of_a_folder_with_several_kinds_images_come_first_then_tables(tmp_path):
    write_tar(tmp_path / "a.tar", IMAGES)
    assert names(open_source(str(tmp_path)))[0] == "a.tar/000000.png"
    write_parquet(tmp_path / "b.parquet", IMAGES)
    assert names(open_source(str(tmp_path)))[0] == "b.parquet:0"
    (tmp_path / "manifest.json").write_text("{}")  # anybody's
    touch(tmp_path, "z/c.png")
    assert found(tmp_path) == ["z/c.png"]


@pytest.fixture(scope="module")
def s3():
    with s3_server() as options:
        yield options


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "saved"])
@pytest.mark.parametrize("place", ["memory", "s3"])
def test_every_kind_at_a_uri(tmp_path, request, kind, place):
    there = in_memory() if place == "memory" else on_s3(request.getfixturevalue("s3"))
    local = KINDS[kind](tmp_path, IMAGES)
    for path in Folder(tmp_path).files():
        there.upload(tmp_path / path, path)
    address, mark, options = str(there).partition("?")
    images = open_source(f"{address}/{local.relative_to(tmp_path)}{mark}{options}")
    assert by_class(images) == EXPECTED
    assert images.identity() == open_source(str(local)).identity()
    assert images.path(0).startswith(address) and "?" not in images.path(0)
    assert by_class(pickle.loads(pickle.dumps(images))) == EXPECTED


def test_only_the_bytes_that_are_needed_are_fetched(tmp_path, s3):
    """A member of a tar file at a URI is read by its place."""
    there = on_s3(s3)
    there.upload(write_tar(tmp_path / "a.tar", encoded_images(50, side=100)), "a.tar")
    images = open_source(str(there))
    assert len(images) == 50
    with mock.patch.object(Folder, "read_bytes", autospec=True, side_effect=Folder.read_bytes) as read:
        data = images.read(30)
    ((_, name, offset, size), _) = read.call_args
    assert (name, size) == ("a.tar", len(data)) and (tmp_path / "a.tar").read_bytes()[offset : offset + size] == data


def test_a_saved_data_set_at_a_uri_is_refused(tmp_path):
    there = in_memory()
    there.write_text("state.json", "{}")
    with pytest.raises(UserError, match="is a data set saved by Hugging Face, and those are read from a disk"):
        open_source(str(there))


@contextmanager
def refusing_server() -> Iterator[str]:
    """An S3 server that lets nobody in, as options of an s3:// URI."""

    class Refuse(BaseHTTPRequestHandler):
        def refuse(self):
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = refuse

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http"
        server.shutdown()


@pytest.mark.parametrize("name", ["images", "*.png", "list.txt", "a.parquet", "a.tar"])
def test_without_credentials(monkeypatch, name):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with refusing_server() as options:
        with pytest.raises(UserError) as caught:
            open_source(f"s3://private/{name}?{options}")
    message = str(caught.value)
    assert message.startswith("data.source: s3://private") and "cannot be read (" in message and "\n" not in message
    assert "ACCESS_DENIED" in message and message.endswith("Mend the address, its permissions or its credentials.")


def test_an_unknown_scheme(tmp_path):
    with pytest.raises(UserError, match=r"data\.source: nosuch://host/images cannot be read \(.*nosuch"):
        open_source("nosuch://host/images")


def test_http(tmp_path):
    """A list and an archive on a web server."""
    write_list(tmp_path / "list.txt", IMAGES)
    write_tar(tmp_path / "images.tar", IMAGES)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert by_class(open_source(f"http://127.0.0.1:{server.server_port}/list.txt")) == EXPECTED
        with pytest.raises(UserError, match="there is no folder or file http"):
            open_source(f"http://127.0.0.1:{server.server_port}/gone.txt")
        server.shutdown()


# ---- what cannot be read ---------------------------------------------------------------------------------------------


def bad_images(folder: Path) -> dict[str, str]:
    """Files by name, and what is said of each."""
    good = IMAGES[0]
    contents = {"cut.png": good[:300], "empty.jpg": b"", "page.jpg": b"<html>", "noise.png": bytes(range(256)) * 9}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "closed.png").write_bytes(good)
    (folder / "really a jpeg.png").write_bytes(encoded(Image.new("RGB", (40, 40), "red"), "JPEG"))
    (folder / "z\nü 猫.png").write_bytes(good)
    return {
        "closed.png": "PermissionError: [Errno 13] Permission denied",
        "cut.png": "OSError: ",
        "empty.jpg": "UnidentifiedImageError: cannot identify image file",
        "gone.png": "FileNotFoundError: ",
        "noise.png": "UnidentifiedImageError: cannot identify image file",
        "page.jpg": "UnidentifiedImageError: cannot identify image file",
    }


def test_what_cannot_be_read_is_named_and_the_next_is_taken(tmp_path, monkeypatch):
    expected = bad_images(tmp_path)
    read = Folder.read_bytes

    def refusing(self, name="", *place):  # the tests may run as root, who may read anything
        if name == "closed.png":
            raise PermissionError(13, "Permission denied")
        return read(self, name, *place)

    monkeypatch.setattr(Folder, "read_bytes", refusing)
    images = open_source(str(tmp_path))
    assert names(images) == [*expected, "really a jpeg.png", "z\nü 猫.png"]
    for sample, reason in enumerate(expected.values()):
        assert str(fault(images, sample)).startswith(reason)
        image, skipped = first_readable(images, sample, decode)
        assert image.getpixel((0, 0))[0] > 250 and image.size == (40, 40)  # the red one
        assert [line.partition(": ")[0] for line in skipped] == [f"{tmp_path}/{name}" for name in list(expected)[sample:]]
    assert first_readable(images, 7, decode)[1] == []
    (tmp_path / "z\nü 猫.png").unlink()  # it vanishes during the run
    assert first_readable(images, 7, decode)[1][0].startswith(f"{tmp_path}/z\nü 猫.png: FileNotFoundError")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "closed.png").write_bytes(IMAGES[0])
    (tmp_path / "closed.png").chmod(0)
    assert str(fault(open_source(str(tmp_path)), 0)).startswith("PermissionError")


@pytest.mark.parametrize("kind", ["parquet", "tar", "saved"])
def test_broken_images_in_tables_and_archives_are_skipped_too(tmp_path, kind):
    broken = [IMAGES[0], b"", IMAGES[2][:100], b"no image", IMAGES[4], IMAGES[5], IMAGES[6], IMAGES[7]]
    images = open_source(str(KINDS[kind](tmp_path, broken)))
    image, skipped = first_readable(images, 1, decode)
    assert len(skipped) == 3 and skipped[0].startswith(f"{images.path(1)}: ")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(decode(IMAGES[4])))


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
    assert sum(fault(images, sample) is not None for sample in range(20)) == broken
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
    monkeypatch.setattr(sources, "fault", lambda images, sample, *form: tried.append(images.path(sample)))
    images = listed("/images", map(str, range(10_000)))
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
    (tmp_path / "x" / "bad.png").write_bytes(b"no image")
    images = listed(str(tmp_path / "x"), ["000.png", "bad.png", "none.png"])
    assert fault(images, 0) is None
    assert fault(images, 1) == "UnidentifiedImageError: cannot identify image file"
    assert str(fault(images, 2)).startswith("FileNotFoundError")


# ---- hold_out --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 500), share=st.floats(0.01, 0.9))
def test_hold_out_splits_in_two_and_always_alike(size, share):
    images = listed("/images", (f"{number:04d}" for number in range(size)), np.arange(size) % 3, ("a", "b", "c"))
    bank, queries = hold_out(images, share)
    assert sorted([*names(bank), *names(queries)]) == names(images)
    for part in (bank, queries):
        assert names(part) == sorted(names(part))
        assert all(label == int(path) % 3 for path, label in zip(names(part), part.labels, strict=True))
    again = hold_out(images, share)
    assert names(again[1]) == names(queries)


def test_hold_out_is_a_tenth_and_a_side_does_not_change_as_images_come_after():
    few, many = (listed("/images", (f"{number:05d}" for number in range(size))) for size in (5000, 20_000))
    queries = names(hold_out(few)[1])
    assert len(queries) == pytest.approx(500, abs=4 * np.sqrt(5000 * 0.09))
    assert queries == [path for path in names(hold_out(many)[1]) if int(path) < 5000]


def test_hold_out_draws_from_its_own_key():
    images = listed("/images", map(str, range(100)))
    draws = np.random.Generator(np.random.Philox(key=np.array([0, 7], dtype=np.uint64))).random(100)
    assert names(hold_out(images, 0.3)[1]) == [str(number) for number in range(100) if draws[number] < 0.3]
