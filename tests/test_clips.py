"""Clips as DAVIS lays them out: made ones with known masks, carried on by pixels and by an untrained transformer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from massl_ray.errors import UserError
from massl_ray.evaluation.clips import clip_result, open_clips
from massl_ray.evaluation.foreign import Pooled
from massl_ray.evaluation.subjects import Subject, open_subject
from tests.storages import in_memory

CPU = torch.device("cpu")
HEIGHT, WIDTH, SQUARE, STEP = 96, 160, 32, 16  # px, and px a frame


def texture(seed: int, height: int, width: int) -> np.ndarray:
    """Blocks of 4 px."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return blocks.repeat(4, 0).repeat(4, 1)


def draw(frames: int = 5, step: int = STEP, height: int = HEIGHT, width: int = WIDTH) -> list[tuple[np.ndarray, np.ndarray]]:
    """Frames (height, width, 3) and masks of a textured square, object 1, that moves to the right over a textured background."""
    ground, square, drawn = texture(0, height, width), texture(1, SQUARE, SQUARE), []
    for frame in range(frames):
        image, mask = ground.copy(), np.zeros((height, width), np.uint8)
        place = slice(32, 32 + SQUARE), slice(16 + step * frame, 16 + step * frame + SQUARE)
        image[place], mask[place] = square, 1
        drawn.append((image, mask))
    return drawn


def save_mask(numbers: np.ndarray, path: Path) -> None:
    """With a palette in which no colour is its own number."""
    image = Image.fromarray(numbers)
    image.putpalette([255 - level for level in range(256) for _ in range(3)])
    assert image.mode == "P"
    image.save(path)


def write(folder: Path, name: str = "goat", drawn=None, resolution: str = "480p") -> Path:
    places = [folder / part / resolution / name for part in ("JPEGImages", "Annotations")]
    for place in places:
        place.mkdir(parents=True)
    for number, (image, mask) in enumerate(drawn or draw()):
        Image.fromarray(image).save(places[0] / f"{number:05d}.jpg", quality=95)
        save_mask(mask, places[1] / f"{number:05d}.png")
    return folder


def listed(folder: Path, *lines: str) -> Path:
    (folder / "ImageSets/2017").mkdir(parents=True)
    (folder / "ImageSets/2017/val.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def vit() -> Subject:
    return open_subject("untrained:test_vit", size=96)


def test_pixels_follow_what_moves(tmp_path):
    clips = open_clips(str(write(tmp_path)))
    found = clip_result(open_subject("pixels"), clips, CPU, size=96)
    assert found.figures["j"].value > 0.8 and found.figures["f"].value > 0.75
    masks = [mask for _, mask in draw()]
    still = [(masks[0] & mask).sum() / (masks[0] | mask).sum() for mask in masks[1:-1]]
    assert np.mean(still) < 0.2  # it took some following
    expected = {"view": "frames whole, in their own proportions", "size_px": 48, "frames_px": [[48, 80]], "patches": [[6, 10]]}
    assert {key: found.parameters[key] for key in expected} == expected
    assert (found.parameters["clips"], found.parameters["objects"], found.protocol) == (1, 1, "segmentation")


def test_what_stands_still_stays(tmp_path, vit):
    clips = open_clips(str(write(tmp_path, drawn=draw(step=0))))
    assert clip_result(vit, clips, CPU, size=192).figures["j"].value > 0.92
    assert clip_result(open_subject("pixels"), clips, CPU, size=96).figures["j"].value > 0.8


def test_frames_keep_their_proportions(tmp_path, vit):
    write(tmp_path, "goat")
    write(tmp_path, "tall", [(image.swapaxes(0, 1), mask.T) for image, mask in draw()])
    found = clip_result(vit, open_clips(str(tmp_path)), CPU)
    assert found.parameters["frames_px"] == [[96, 160], [160, 96]] and found.parameters["patches"] == [[6, 10], [10, 6]]
    found = clip_result(vit, open_clips(str(tmp_path)), CPU, size=40)  # 40 x 66.7 in patches of 16
    assert found.parameters["frames_px"] == [[32, 64], [64, 32]]
    assert found.parameters["objects"] == 2 and found.figures["j"].low is not None


class Strict(nn.Module):
    """Takes squares alone."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.model, self.num_prefix_tokens, self.seen = inner, 1, set()

    def forward_features(self, images: Tensor) -> Tensor:
        assert images.shape[2] == images.shape[3], "squares alone"
        self.seen.add(tuple(images.shape[2:]))
        return self.model.forward_features(images)  # type: ignore[operator]


def test_frames_are_squeezed_where_the_backbone_wants_squares(tmp_path, vit):
    strict = Strict(vit.backbone)
    clips = open_clips(str(write(tmp_path, drawn=draw(step=0))))
    found = clip_result(replace(vit, backbone=Pooled(strict)), clips, CPU, size=192)
    assert found.parameters["view"] == "frames squeezed into a square" and strict.seen == {(192, 192)}
    assert found.parameters["patches"] == [[12, 12]] and found.figures["j"].value > 0.7


def test_no_map_of_patches(tmp_path, vit):
    clips = open_clips(str(write(tmp_path)))
    with pytest.raises(UserError, match="untrained:test_vit has no features of patches, as it has no forward_features"):
        clip_result(replace(vit, backbone=nn.Flatten()), clips, CPU)
    strict = Strict(vit.backbone)
    strict.num_prefix_tokens = 0
    with pytest.raises(UserError, match=r"gives no map of patches for frames of 96 px: its 37 tokens are no square grid\. Leave"):
        clip_result(replace(vit, backbone=strict), clips, CPU)


def test_masks_are_numbers_of_objects_and_255_is_background(tmp_path):
    drawn = draw(3)
    numbers = drawn[0][1].copy()
    numbers[:8], numbers[80:] = 255, 7
    write(tmp_path, drawn=[(drawn[0][0], numbers), *drawn[1:]])
    (clip,) = open_clips(str(tmp_path))
    expected = drawn[0][1].copy()
    expected[80:] = 7
    assert (clip.mask(0) == expected).all() and clip.size == (HEIGHT, WIDTH)
    assert clip.frame(0, 3).shape == (HEIGHT, WIDTH, 3) and clip.frame(0, 1).shape == (HEIGHT, WIDTH, 1)
    assert np.abs(clip.frame(1, 3).astype(int) - drawn[1][0]).mean() < 20
    gray = tmp_path / "gray"
    write(gray, drawn=drawn)
    for file in (gray / "Annotations/480p/goat").iterdir():
        Image.fromarray(np.asarray(Image.open(file))).save(file)  # gray levels
    assert (open_clips(str(gray))[0].mask(2) == drawn[2][1]).all()


def test_which_clips(tmp_path):
    for name in ("cow", "goat", "bear"):
        write(tmp_path, name)
    (tmp_path / "JPEGImages/480p/extra").mkdir()
    Image.fromarray(draw(1)[0][0]).save(tmp_path / "JPEGImages/480p/extra/00000.jpg")  # without masks
    assert [clip.name for clip in open_clips(str(tmp_path))] == ["bear", "cow", "goat"]
    (tmp_path / "Annotations/480p/cow/00000.png").unlink()  # not asked for any more
    assert [clip.name for clip in open_clips(str(listed(tmp_path, "goat ", "bear", "", "goat")))] == ["goat", "bear"]


def test_resolutions(tmp_path):
    (full,) = open_clips(str(write(tmp_path / "full", resolution="Full-Resolution")))
    assert full.frames[4] == "JPEGImages/Full-Resolution/goat/00004.jpg"
    (direct,) = open_clips(str(write(tmp_path / "direct", resolution="")))
    assert direct.masks[0] == "Annotations/goat/00000.png"
    write(write(tmp_path / "full"), resolution="1080p")
    assert open_clips(str(tmp_path / "full"))[0].frames[0] == "JPEGImages/480p/goat/00000.jpg"
    write(write(tmp_path / "both", resolution="1080p"), resolution="720p")
    with pytest.raises(UserError, match="JPEGImages has several resolutions, 1080p, 720p: keep one, or call one 480p"):
        open_clips(str(tmp_path / "both"))


def test_at_a_uri_and_counted(tmp_path, vit):
    write(write(tmp_path, "goat"), "cow", draw(4))
    there = in_memory()
    for file in sorted(tmp_path.rglob("*.*")):
        there.upload(file, str(file.relative_to(tmp_path)))
    told: list[tuple[int, int]] = []

    def counted(amounts, total):
        for amount in amounts:
            told.append((amount, total))
            yield amount

    found = clip_result(vit, open_clips(there.uri), CPU, counted=counted)
    assert told == [(4, 9), (5, 9)]
    assert found.figures == clip_result(vit, open_clips(str(tmp_path)), CPU).figures


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        open_clips(str(folder))


def test_what_is_missing(tmp_path):
    refused(tmp_path / "none", "has no folder JPEGImages: give that of DAVIS 2017")
    write(tmp_path / "a")
    (tmp_path / "a/Annotations").rename(tmp_path / "a/Masks")
    refused(tmp_path / "a", "has no folder Annotations")
    (tmp_path / "a/Annotations/480p").mkdir(parents=True)
    refused(tmp_path / "a", r"Annotations has no folders with \.png files: each clip has to have one")
    refused(listed(write(tmp_path / "b"), "goat", "cow"), "clip cow in .*b: there are no frames of it in JPEGImages")
    refused(listed(write(tmp_path / "c"), ""), "val.txt names no clip")
    refused(write(tmp_path / "d", drawn=draw(2)), "clip goat in .*d: there are 2 frames, .* Give it 3 or more")
    (write(tmp_path / "e") / "Annotations/480p/goat/00003.png").unlink()
    refused(tmp_path / "e", "clip goat in .*: there are 5 frames and 4 masks, and each frame needs a mask of its name; see 00003")
    (write(tmp_path / "f") / "JPEGImages/480p/goat/00001.jpg").unlink()
    refused(tmp_path / "f", "4 frames and 5 masks, .*; see 00001")


def test_what_is_wrong(tmp_path):
    drawn = draw(3)
    small = [(drawn[0][0], drawn[0][1]), (drawn[1][0], drawn[1][1][:90]), drawn[2]]
    refused(write(tmp_path / "a", drawn=small), "goat/00001.png is 160 x 90 px, JPEGImages/480p/goat/00000.jpg is 160 x 96")
    void = [(image, mask * 255) for image, mask in drawn]
    refused(write(tmp_path / "b", drawn=void), "the first mask, .*00000.png, has no object.* write 1 for 255")
    colours = write(tmp_path / "c", drawn=drawn) / "Annotations/480p/goat/00001.png"
    Image.fromarray(drawn[0][0]).save(colours)
    refused(tmp_path / "c", "00001.png cannot be read .*its pixels are RGB, not numbers of objects")
    (write(tmp_path / "d", drawn=drawn) / "JPEGImages/480p/goat/00002.jpg").write_bytes(b"no image")
    refused(tmp_path / "d", r"00002.jpg cannot be read \(UnidentifiedImageError.*\)\. Mend it, or leave its clip out")
    (listed(write(tmp_path / "e"), "goat") / "ImageSets/2017/val.txt").write_bytes(b"\xff\xfe\xfa")
    refused(tmp_path / "e", "val.txt is no text file with the name of a clip a line")


def test_a_frame_that_breaks_off(tmp_path, vit):
    path = write(tmp_path) / "Annotations/480p/goat/00003.png"
    path.write_bytes(path.read_bytes()[:-40])  # its header is whole
    with pytest.raises(UserError, match="00003.png cannot be read .*leave its clip out"):
        clip_result(vit, open_clips(str(tmp_path)), CPU)
