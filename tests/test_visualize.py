"""massl-ray visualize: every kind of picture for transformers and conv nets, and sentences for what cannot be drawn."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from massl_ray import visualize
from massl_ray.data.decode import Decoding
from massl_ray.data.sources import open_source
from massl_ray.evaluation.subjects import open_subject
from massl_ray.reporting.gallery import (
    Gallery,
    Photos,
    draw_attention,
    draw_comparison,
    draw_correspondences,
    draw_pca,
    slugs,
    view_side,
)
from massl_ray.reporting.surroundings import draw_landscape, draw_neighbours, look_around
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
    flags = ["--data.source", str(source), "--out", str(tmp_path / "out"), "--images", "2", "--size", "70", "--foreground"]
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
    page = Page(tmp_path / "out" / "visualize.html")
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == len(expected) and all(src and src.startswith("data:image/") for src in pictures)
    assert any("has no token that attends" in text or "have no attention" in text for text in page.texts)
    assert any("4 x 4 patches" in text for text in page.texts)  # 70 px are 4 patches of 16


def test_hostile_names_are_text(tmp_path):
    gallery = Gallery(tmp_path, photos(HOSTILE, "<script>alert(1)</script>.png"))
    subject = open_subject("untrained:test_vit", size=32)
    draw_pca(gallery, [subject])
    source = write_images(tmp_path / "images", 6)
    os.rename(source / "spots", source / "<script>spots")
    for path in sorted((source / "ramps").iterdir())[:1]:
        path.rename(path.with_name(HOSTILE))
    listing = open_source(str(source))
    around = look_around(subject, listing, Decoding())
    draw_neighbours(gallery, subject, "x", around, Decoding())
    draw_landscape(gallery, subject, "x", around, thumbnails=False)
    page = Page(gallery.write())
    assert not {tag for tag, _ in page.tags} & {"script", "b"} and "<script>" in "".join(page.texts)
    assert "\u202e" not in page.source


def test_channels_follow_the_model(tmp_path):
    subject = open_subject("untrained:test_vit", size=32)
    gray = Gallery(tmp_path, Photos(["a"], lambda channels: [np.full((40, 30, channels), 90, np.uint8)]))
    assert gray.views(subject).shape == (1, 32, 32, 3)
    draw_attention(gray, subject, "flat")
    draw_correspondences(gray, subject, "flat")
    assert all(picture.png for picture in gray.pictures)


def test_pixels_have_no_patches_and_say_so(tmp_path):
    gallery, subject = Gallery(tmp_path, photos("a", "b")), open_subject("pixels")
    draw_attention(gallery, subject, "pixels")
    draw_correspondences(gallery, subject, "pixels")
    draw_pca(gallery, [subject])
    draw_comparison(gallery, [subject, subject])
    assert [bool(picture.png) for picture in gallery.pictures] == [False, False, False, True]
    assert all("pixels has no features of patches" in picture.note for picture in gallery.pictures[:3])


def test_pictures_of_one_seed_are_the_same_bits_and_leave_the_generators_alone(tmp_path):
    subject = open_subject("untrained:test_vit", size=32)
    before = torch.random.get_rng_state()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        gallery = Gallery(tmp_path / name, photos("a", "b"))
        draw_attention(gallery, subject, "x")
        draw_correspondences(gallery, subject, "x")
        draw_pca(gallery, [subject])
    assert (torch.random.get_rng_state() == before).all()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_unreadable_images_of_a_source_are_left_out(tmp_path, capsys):
    source = write_images(tmp_path / "images", 9)
    broken = sorted(source.rglob("*.png"))[0]
    broken.write_bytes(b"no image")
    flags = ["--data.source", str(source), "--out", str(tmp_path / "out"), "--kinds", "pca,neighbours", "--images", "9"]
    assert visualize.main(["untrained:test_resnet", *flags, "--size", "32"]) == 0
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
