"""massl-ray visualize: every kind of picture for transformers and conv nets, and sentences for what cannot be drawn."""

import base64
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from massl_ray import report, visualize
from massl_ray.config import keys
from massl_ray.data.decode import Decoding
from massl_ray.data.sources import open_source
from massl_ray.evaluation.attention import CLASS, Attention
from massl_ray.evaluation.subjects import open_subject
from massl_ray.method.network import build_encoder
from massl_ray.reporting import html
from massl_ray.reporting.album import WIDEST, Album, Picture, data_url, read_album, write_album
from massl_ray.reporting.gallery import (
    Gallery,
    Photos,
    attention_rows,
    draw_attention,
    draw_comparison,
    draw_correspondences,
    draw_pca,
    slugs,
    view_side,
)
from massl_ray.reporting.html import album_html, page
from massl_ray.reporting.pictures import png_bytes
from massl_ray.reporting.surroundings import draw_landscape, draw_neighbours, look_around
from massl_ray.training.checkpoint import write_checkpoint
from tests.helpers import tiny_run
from tests.images import write_images
from tests.test_html import Page

HOSTILE = "a<b>&\"'\u202egnp.exe\n.png"


def photos(*names: str) -> Photos:
    random = np.random.default_rng(0)
    made = [random.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in names]
    return Photos(names, lambda channels: [pixels[..., :channels] for pixels in made])


def test_command_draws_everything_for_several_models(tmp_path, capsys):
    source = write_images(tmp_path / "images", 24)
    what = ["untrained:test_vit", "untrained:test_resnet"]
    flags = ["--data.source", str(source), "--out", str(tmp_path / "out"), "--images", "2", "--size", "130", "--foreground"]
    assert visualize.main([*what, *flags, "--thumbnails"]) == 0
    printed = capsys.readouterr().out.splitlines()
    kinds = ["attention", "correspondence", "neighbours", "map"]
    expected = {"comparison.png", "pca.png", *(f"{kind}_untrained-test_{name}.png" for kind in kinds for name in ("vit", "resnet"))}
    expected -= {"attention_untrained-test_resnet.png"}
    assert {Path(line).name for line in printed} == expected | {"visualize.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected | {"visualize.html"}
    for name in expected:
        with Image.open(tmp_path / "out" / name) as image:
            image.load()
            assert image.width > 200 and np.ptp(np.asarray(image)) > 200
    made = Page(tmp_path / "out" / "visualize.html")
    pictures = [attributes["src"] for tag, attributes in made.tags if tag == "img"]
    assert len(pictures) == len(expected) and all(src and src.startswith("data:image/") for src in pictures)
    assert any("has no token that attends" in text or "have no attention" in text for text in made.texts)
    assert any("8 x 8 patches" in text for text in made.texts)  # 130 px are 8 patches of 16


def test_hostile_names_are_text(tmp_path):
    gallery = Gallery(photos(HOSTILE, "<script>alert(1)</script>.png"))
    subject = open_subject("untrained:test_vit", size=64)
    draw_pca(gallery, [subject])
    source = write_images(tmp_path / "images", 6)
    os.rename(source / "spots", source / "<script>spots")
    for path in sorted((source / "ramps").iterdir())[:1]:
        path.rename(path.with_name(HOSTILE))
    listing = open_source(str(source))
    around = look_around(subject, listing, Decoding())
    draw_neighbours(gallery, subject, "x", around, Decoding())
    draw_landscape(gallery, subject, "x", around, thumbnails=False)
    gallery.add("</h3><b>", "<script>")
    write_album(tmp_path / "pictures", gallery.album)
    (tmp_path / "x.html").write_text(page("x", [album_html(read_album(tmp_path / "pictures") or gallery.album)]))
    made = Page(tmp_path / "x.html")
    assert not {tag for tag, _ in made.tags} & {"script", "b"} and "<script>" in "".join(made.texts)
    assert "\u202e" not in made.source and len(made.images()) == 3


def test_channels_follow_the_model():
    subject = open_subject("untrained:test_vit", size=64)
    gray = Gallery(Photos(["a"], lambda channels: [np.full((40, 30, channels), 90, np.uint8)]))
    assert gray.views(subject).shape == (1, 64, 64, 3)
    draw_attention(gray, subject, "flat")
    draw_correspondences(gray, subject, "flat")
    assert all(picture.png for picture in gray.pictures)


def test_pixels_have_no_patches_and_say_so():
    gallery, subject = Gallery(photos("a", "b")), open_subject("pixels")
    draw_attention(gallery, subject, "pixels")
    draw_correspondences(gallery, subject, "pixels")
    draw_pca(gallery, [subject])
    draw_comparison(gallery, [subject, subject])
    assert [picture.png for picture in gallery.pictures] == [b""] * 3
    said = "It has no features of patches."
    assert [picture.note for picture in gallery.pictures] == [said, said, "pixels: it has no features of patches."]


def test_maps_of_a_few_patches_are_not_drawn():
    gallery, subject = Gallery(photos("a", "b")), open_subject("untrained:test_vit", size=48)  # 3 patches a side
    for draw in (draw_attention, draw_correspondences):
        draw(gallery, subject, "x")
    draw_pca(gallery, [subject])
    assert not any(picture.png for picture in gallery.pictures)
    for picture in gallery.pictures:
        assert "it sees 3 x 3 patches in an image of 48 px" in picture.note.replace("It sees", "it sees")
        assert picture.note.endswith("give a larger --size, 96 for instance.")


def test_many_heads_are_wrapped_and_even_ones_are_gray():
    maps = torch.full((1, 9, 4, 4), 1 / 16)
    maps[0, 1] = 0.475 / 15
    maps[0, 1, 0, 0] = 0.525
    view = np.full((1, 64, 64, 3), (200, 100, 0), np.uint8)
    rows, labels = attention_rows(view, Attention(maps, torch.zeros(1, 9, 1), CLASS))
    assert [len(row) for row in rows] == [8, 8, 4, 4] and labels == ["image 1", "", "", ""]
    above = [tile.caption for row in (rows[0], rows[2]) for tile in row[1:] if tile]
    assert above == [f"head {head}: peak {8.4 if head == 2 else 1.0}x even" for head in range(1, 10)] + ["mean: peak 1.8x even"]
    below = [tile for row in (rows[1], rows[3]) for tile in row[1:] if tile]
    assert [tile.caption for tile in below[:3]] == [
        "60% in 62% of area",
        "60% in 25% of area",
        "60% in 62% of area",
    ]
    assert [bool(np.ptp(tile.pixels, axis=2).max()) for tile in below] == [head == 1 for head in range(10)]


def test_pictures_of_one_seed_are_the_same_bits_and_leave_the_generators_alone():
    subject = open_subject("untrained:test_vit", size=64)
    before, made = torch.random.get_rng_state(), []
    for _ in range(2):
        gallery = Gallery(photos("a", "b"))
        draw_attention(gallery, subject, "x")
        draw_correspondences(gallery, subject, "x")
        draw_pca(gallery, [subject])
        made.append([picture.png for picture in gallery.pictures])
    assert (torch.random.get_rng_state() == before).all()
    assert made[0] == made[1] and all(made[0])


def test_neighbours_have_their_distances_and_are_counted(tmp_path):
    subject, listing = open_subject("pixels"), open_source(str(write_images(tmp_path / "images", 12)))
    gallery, around = Gallery(photos()), look_around(subject, listing, Decoding())
    draw_neighbours(gallery, subject, "x", around, Decoding(), queries=3)
    (picture,) = gallery.pictures
    rows = torch.nn.functional.normalize(around.features.rows, dim=1).double()
    similarity = rows @ rows.T
    off = 1 - (similarity.sum() - 12) / 132
    assert f"Any two images are {off:.2g} apart on average" in picture.note
    places = [0, 6, 11]  # evenly spaced, halves to even
    nearest = similarity.fill_diagonal_(-2)[places].topk(6).indices
    assert picture.files == [
        (listing.path(place), [listing.path(int(other)) for other in others]) for place, others in zip(places, nearest, strict=True)
    ]
    labels = listing.labels
    assert labels is not None
    same = sum(int(labels[place] == labels[other]) for place, others in zip(places, nearest, strict=True) for other in others)
    assert f"green frames mark the query's: {same} of 18, where images chosen at random would be 5." in picture.note  # 18 * 3 / 11


def test_unreadable_images_of_a_source_are_left_out(tmp_path, capsys):
    source = write_images(tmp_path / "images", 9)
    broken = sorted(source.rglob("*.png"))[0]
    broken.write_bytes(b"no image")
    flags = ["--data.source", str(source), "--out", str(tmp_path / "out"), "--kinds", "pca,neighbours", "--images", "9"]
    assert visualize.main(["untrained:test_resnet", *flags, "--size", "128"]) == 0
    assert str(broken) not in "".join(Page(tmp_path / "out" / "visualize.html").texts)
    capsys.readouterr()
    for path in source.rglob("*.png"):
        path.write_bytes(b"no image")
    assert visualize.main(["untrained:test_resnet", *flags]) == 2
    assert "none of the images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kinds", "atention", "--image", "x.png"], "There is no kind of picture 'atention'; the nearest is 'attention'"),
        ([], "Give images: --data.source SOURCE, or --image FILE"),
        (["--image", "nowhere.png"], "nowhere.png cannot be read"),
        (["--data.source", "nowhere"], "data.source: there is no"),
        (["--image", __file__], "cannot be shown: UnidentifiedImageError"),
        (["--image", "x.png", "--size", "3"], "--size is 3: it must be 8 or more"),
        (["--image", "x.png", "--images", "0"], "--images is 0"),
        (["--image", "x.png", "--memory.size", "5"], "takes settings of the data section alone, not of memory"),
        (["--image", "x.png", "--data.wite", "5"], "There is no setting 'data.wite'; the nearest is 'data.white'"),
    ],
)
def test_mistakes_are_sentences(flags, said, tmp_path, capsys):
    assert visualize.main(["untrained:test_vit", "--out", str(tmp_path / "out"), *flags]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_size_that_the_model_does_not_take_is_refused(tmp_path, capsys):
    source = write_images(tmp_path / "images", 3)
    flags = ["--data.source", str(source), "--out", str(tmp_path / "out"), "--size", "64"]
    assert visualize.main(["untrained:swin_tiny_patch4_window7_224", *flags]) == 2
    assert "does not take images of --size 64 px" in capsys.readouterr().err


def test_names_of_files():
    assert slugs(["runs/a b", "runs/a b", "../..", "x" * 99]) == ["runs-a-b", "runs-a-b-2", "model", "x" * 60]
    vit, conv = (open_subject(f"untrained:test_{name}", size=64) for name in ("vit", "resnet"))
    assert [view_side(vit, size) for size in (None, 70, 8)] == [64, 64, 16]
    assert [view_side(conv, size) for size in (None, 70)] == [64, 70]


# ---- pictures of a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run directory with a checkpoint, and the images beside it."""
    folder = tmp_path_factory.mktemp("pictures")
    run = tiny_run(write_images(folder / "images", 9), folder / "run")
    backbone = build_encoder(run.config).backbone
    tensors = {f"teacher/backbone.{name}": value.contiguous() for name, value in backbone.state_dict().items()} | {
        "step": torch.tensor(4)
    }
    write_checkpoint(run.checkpoints, tensors, {"images_seen": 32, "config": keys(run.config)}, keep=2)
    return folder


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    return shutil.copytree(trained / "run", tmp_path / "run")


def draw(run_dir: Path, trained: Path, *flags: str) -> int:
    return visualize.main([str(run_dir), "--data.source", str(trained / "images"), "--images", "2", "--size", "64", *flags])


def pictures(run_dir: Path) -> dict[str, bytes]:
    """What the report shows, by title."""
    return Page(run_dir / "report.html").images()


def test_the_report_of_a_run_shows_the_pictures_drawn_last(run_dir, trained, capsys):
    assert draw(run_dir, trained, "--kinds", "attention,map") == 0
    folder = run_dir / "eval" / "pictures"
    names = ["attention_run-step_4.png", "map_run-step_4.png"]
    assert capsys.readouterr().out.splitlines() == [*(str(folder / name) for name in names), str(run_dir / "report.html")]
    titles = ["Self-attention of the last block: run/step_4", "Map of the embeddings: run/step_4"]
    assert pictures(run_dir) == {title: (folder / name).read_bytes() for title, name in zip(titles, names, strict=True)}
    notes = [entry["note"] for entry in json.loads((folder / "pictures.json").read_text())["pictures"]]
    assert len(notes) == 2 and set(notes) <= set(Page(run_dir / "report.html").texts)

    assert draw(run_dir, trained, "--kinds", "pca,map") == 0
    assert {path.name for path in folder.iterdir()} == {"map_run-step_4.png", "pca.png", "pictures.json"}
    assert list(pictures(run_dir)) == ["Principal components of patch tokens", titles[1]]
    before = (run_dir / "report.html").read_bytes()
    (run_dir / "report.html").unlink()
    assert report.main([str(run_dir)]) == 0
    assert (run_dir / "report.html").read_bytes() == before


def test_with_out_the_run_is_left_alone(run_dir, trained, tmp_path):
    assert draw(run_dir, trained, "--kinds", "pca", "--out", str(tmp_path / "out")) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pca.png", "visualize.html"}
    assert not (run_dir / "eval" / "pictures").exists() and not (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    "index",
    [
        None,
        "",
        "[]",
        '{"images": [], "pictures": 3}',
        '{"images": [], "pictures": [{"title": "x"}]}',
        '{"images": [], "pictures": [{"title": "x", "note": "", "file": "../../config.toml", "rows": []}]}',
        '{"images": [], "pictures": [{"title": "x", "note": "", "file": 7, "rows": []}]}',
        '{"images": [], "pictures": [{"title": "x", "note": "", "file": "a.png", "rows": [1]}]}',
        "[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_damaged_index_leaves_the_section_out(trained, run_dir, index):
    folder = run_dir / "eval" / "pictures"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(png_bytes(Image.new("RGB", (4, 4))))
    if index is not None:
        (folder / "pictures.json").write_bytes(index if isinstance(index, bytes) else index.encode())
    assert report.main([str(run_dir)]) == 0
    made = Page(run_dir / "report.html")
    assert "Pictures" not in made.texts and made.images() == {} and "All" in made.text


def test_a_picture_that_is_gone_or_damaged_is_named(tmp_path):
    png = png_bytes(Image.new("RGB", (4, 4), "red"))
    write_album(tmp_path, Album(["x"], [Picture(name, "", png, f"{name}.png") for name in ("gone", "broken", "good")]))
    (tmp_path / "gone.png").unlink()
    (tmp_path / "broken.png").write_bytes(png[:20])
    album = read_album(tmp_path)
    assert album is not None and [picture.png for picture in album.pictures] == [b"", png[:20], png]
    made = album_html(album)
    assert made.count("<img") == 1 and "gone.png is not shown here" in made and "broken.png is not shown here" in made


def test_pages_have_an_end(monkeypatch):
    random = np.random.default_rng(0)
    noise = [png_bytes(Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))) for _ in range(3)]
    monkeypatch.setattr(html, "PAGE", 2 * len(data_url(noise[0])) + 99)
    made = album_html(Album([], [Picture(f"{n}", "", png, f"{n}.png") for n, png in enumerate(noise)]))
    assert made.count("<img") == 2 and "2.png is not shown here: this page would have more than" in made


def test_large_pictures_are_embedded_smaller():
    random = np.random.default_rng(0)
    for shape in ((400, 400, 4), (40, WIDEST + 200, 3)):  # with an alpha channel, as matplotlib's; wide
        url = data_url(png_bytes(Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))))
        kind, data = url.split(",")
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert kind == "data:image/jpeg;base64" and image.mode == "RGB" and image.width == min(shape[1], WIDEST)
    assert data_url(png_bytes(Image.new("RGB", (40, 40)))).startswith("data:image/png;")


def test_without_a_place_to_write_to_it_says_so(trained, run_dir, tmp_path, capsys):
    flags = ["--image", str(trained / "images")]
    for what in ("untrained:test_vit", str(tmp_path / "nowhere"), "s3://bucket/run", str(run_dir / "checkpoints" / "step_4")):
        assert visualize.main([what, *flags]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("massl-ray: Say with --out DIR where pictures go") and printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize("place", ["eval", "eval/pictures"])
def test_a_run_that_cannot_be_written_to(place, trained, run_dir, capsys, monkeypatch):
    monkeypatch.setattr(visualize, "_opened", None)  # said before anything is opened
    (run_dir / place).parent.mkdir(exist_ok=True)
    if (run_dir / place).is_dir():
        (run_dir / place).rmdir()
    (run_dir / place).write_text("in the way, as a place is that is read only: tests may run as root")
    assert draw(run_dir, trained, "--kinds", "pca") == 2
    printed = capsys.readouterr()
    assert "eval/pictures cannot be written to (" in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_report_that_cannot_be_written(trained, run_dir, capsys):
    (run_dir / "report.html").mkdir()
    assert draw(run_dir, trained, "--kinds", "pca") == 2
    assert "report.html cannot be made (Is a directory)" in capsys.readouterr().err
    assert report.main([str(run_dir)]) == 2
    assert "report.html cannot be made (Is a directory)" in capsys.readouterr().err


def test_nothing_is_left_of_pictures_that_could_not_be_written(tmp_path, monkeypatch):
    png = png_bytes(Image.new("RGB", (4, 4)))
    write_album(tmp_path, Album([], [Picture("old", "", png, "old.png")]))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_album(tmp_path, Album([], [Picture("new", "", png, "new.png")]))
    assert read_album(tmp_path) is None and not (tmp_path / "new.png").exists()
