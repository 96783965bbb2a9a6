"""Clips with masks on disk or at a URI, laid out as DAVIS 2017 is, and how well a subject's patch features carry their masks on."""

import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from massl_ray.data.decode import UNREADABLE, Decoding, Encoded
from massl_ray.data.decode import reason as fault
from massl_ray.data.files import SUFFIXES, find
from massl_ray.errors import UserError
from massl_ray.evaluation.propagation import Clip, Settings, object_scores, summary
from massl_ray.evaluation.results import Result
from massl_ray.evaluation.subjects import Pixels, Subject
from massl_ray.evaluation.tokens import as_map, stride
from massl_ray.storage import Folder, reason

FRAMES, MASKS = "JPEGImages", "Annotations"
USUAL = "480p"  # the folder of resolution that is taken where there are several
NAMES = "ImageSets/2017/val.txt"
VOID = 255  # of masks: counted as background, as DAVIS's own evaluation does

CELL = 8  # pixels a side of a patch of raw pixels: 16 px of the frame at half its size
PIXELS_SIZE = 224  # shorter side of frames of which raw pixels are taken, before they are halved

Shape = tuple[int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class ClipFiles:
    """Frames and masks of one clip, T of each."""

    name: str
    folder: Folder
    frames: tuple[str, ...]  # below the folder, in order
    masks: tuple[str, ...]
    size: Shape  # (H, W) of all of them

    def frame(self, number: int, channels: int) -> np.ndarray:
        """(H, W, channels) uint8. Raises UserError."""
        return _read(self.folder, self.frames[number], lambda data: Encoded(data, Decoding(channels=channels)).pixels()[0])

    def mask(self, number: int) -> np.ndarray:
        """(H, W) uint8: 0 is background, 1 to N are objects. Raises UserError."""
        return _read(self.folder, self.masks[number], lambda data: _objects(_mask_image(data)))


def open_clips(folder: str) -> list[ClipFiles]:
    """DIR/JPEGImages/480p/NAME/00000.jpg and DIR/Annotations/480p/NAME/00000.png, whose pixels are numbers of objects, of the clips
    that DIR/ImageSets/2017/val.txt names, or else of all that have masks. Another resolution will do if it is the only one, and so
    do clips without such a folder. Every file is looked at.

    Raises:
        UserError: something is missing, cannot be read or does not fit.
    """
    place = Folder(os.path.expanduser(folder))
    try:
        frames, masks = _by_clip(place, FRAMES, SUFFIXES), _by_clip(place, MASKS, {".png"})
        listed = place.kind(NAMES) == "file"
        names = [line.strip() for line in place.read_text(NAMES).splitlines() if line.strip()] if listed else sorted(masks)
        if not names:
            raise UserError(f"{place / NAMES} names no clip.")
        return [_clip(place, name, frames.get(name, []), masks.get(name, [])) for name in dict.fromkeys(names)]
    except UnicodeDecodeError:
        raise UserError(f"{place / NAMES} is no text file with the name of a clip a line.") from None
    except OSError as error:
        raise UserError(
            f"{place} cannot be read ({reason(error)}). Mend the address, its permissions or its credentials."
        ) from None


def clip_result(
    subject: Subject,
    clips: Sequence[ClipFiles],
    device: torch.device,
    *,
    size: int | None = None,
    counted: Callable[[Iterator[int], int], Iterator[int]] = lambda amounts, total: amounts,
) -> Result:
    """Label propagation by the subject's patch features; in memory are those of a few frames.

    Args:
        size: of the frames' shorter side, in pixels; that of the subject's view where it is None.
        counted: shows how far it is; takes numbers of frames, a clip at a time, and their total.

    Raises:
        UserError: the backbone has no map of patches, or a file cannot be read.
    """
    moved, settings, scores = subject.to(device), Settings(), []
    shapes, view = _shapes(moved, {clip.size for clip in clips}, size, device)

    def patches(clip: ClipFiles) -> Iterator[Tensor]:
        for number in range(len(clip.frames)):
            yield _patches(moved, _resized(clip.frame(number, subject.channels), shapes[clip.size]), device)

    def amounts() -> Iterator[int]:
        for clip in clips:
            masks = np.stack([clip.mask(number) for number in range(len(clip.masks))])
            scores.append(object_scores(Clip(patches(clip), masks, f"clip {clip.name}"), settings))
            yield len(clip.frames)

    for _ in counted(amounts(), sum(len(clip.frames) for clip in clips)):
        pass
    result = summary(scores, settings)
    return replace(result, parameters={**result.parameters, **view})


# ---- files -----------------------------------------------------------------------------------------------------------


def _by_clip(place: Folder, part: str, suffixes: Iterable[str]) -> Mapping[str, Sequence[str]]:
    """Files of each clip in the folder of its resolution, in order."""
    if place.kind(part) != "folder":
        raise UserError(f"{place} has no folder {part}: give that of DAVIS 2017, or one with {FRAMES} and {MASKS} like it.")
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in find(place / part, suffixes):
        resolution, _, clip = os.path.dirname(name).rpartition("/")
        if clip:
            found[resolution][clip].append(f"{part}/{name}")
    if not found:
        raise UserError(f"{place / part} has no folders with {', '.join(sorted(suffixes))} files: each clip has to have one.")
    if len(found) > 1 and USUAL not in found:
        raise UserError(f"{place / part} has several resolutions, {', '.join(sorted(found))}: keep one, or call one {USUAL}.")
    return found[USUAL] if USUAL in found else next(iter(found.values()))


def _clip(place: Folder, name: str, frames: Sequence[str], masks: Sequence[str]) -> ClipFiles:
    where = f"clip {name} in {place}"
    if not frames:
        raise UserError(f"{where}: there are no frames of it in {FRAMES}. Unpack them, or take it out of {NAMES} and {MASKS}.")
    odd = next((pair for pair in zip_longest(map(_stem, frames), map(_stem, masks)) if pair[0] != pair[1]), None)
    if odd:
        raise UserError(
            f"{where}: there are {len(frames)} frames and {len(masks)} masks, and each frame needs a mask of its name; see "
            f"{min(filter(None, odd))}. Clips of a test set, of which only the first mask is known, will not do."
        )
    if len(frames) < 3:
        raise UserError(f"{where}: there are {len(frames)} frames, and the first and the last do not count. Give it 3 or more.")
    sizes = {file: _read(place, file, _frame_size if file in frames else _mask_size) for file in (*frames, *masks)}
    width, height = sizes[frames[0]]
    for file, size in sizes.items():
        if size != (width, height):
            raise UserError(
                f"{where}: {file} is {size[0]} x {size[1]} px, {frames[0]} is {width} x {height}. Make all files alike."
            )
    clip = ClipFiles(name, place, tuple(frames), tuple(masks), (height, width))
    if not clip.mask(0).any():
        raise UserError(
            f"{where}: the first mask, {masks[0]}, has no object. Pixels are numbers of objects, 0 is background and {VOID} counts "
            f"as background: in masks of 0 and {VOID}, as DAVIS 2016 has them, write 1 for {VOID}."
        )
    return clip


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _read(folder: Folder, name: str, decode: Callable[[bytes], T]) -> T:
    try:
        return decode(folder.read_bytes(name))
    except UNREADABLE as error:
        raise UserError(f"{folder / name} cannot be read ({fault(error)}). Mend it, or leave its clip out.") from None


def _frame_size(data: bytes) -> Shape:
    return Encoded(data).size


def _mask_size(data: bytes) -> Shape:
    return _mask_image(data).size


def _mask_image(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    if image.mode not in ("P", "L", "1"):
        raise ValueError(f"its pixels are {image.mode}, not numbers of objects: it needs a palette, or gray levels")
    return image


def _objects(image: Image.Image) -> np.ndarray:
    numbers = np.asarray(image).astype(np.uint8)
    return np.where(numbers == VOID, 0, numbers).astype(np.uint8)


# ---- patches ---------------------------------------------------------------------------------------------------------


def _shapes(
    subject: Subject, sizes: Iterable[Shape], size: int | None, device: torch.device
) -> tuple[Mapping[Shape, Shape], Mapping[str, Any]]:
    """To which (h, w) in pixels frames of each size (H, W) are resized: whole numbers of patches in their own proportions or, where
    the backbone refuses that, the subject's square. And what the record says of it."""
    if isinstance(subject.backbone, Pixels):
        side, step = (size or PIXELS_SIZE) // 2, CELL
    else:
        side, step = size or subject.size, stride(_inner(subject))
    own = {each: _whole_patches(each, side, step) for each in sizes}
    square = dict.fromkeys(own, (side, side))
    refused = ""
    for shapes, words in ((own, "whole, in their own proportions"), (square, "squeezed into a square")):
        try:
            grids = {shape: _grid(subject, shape, device) for shape in sorted(set(shapes.values()))}
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # backbones refuse in many ways
            refused = " ".join(str(error).split())[:200].rstrip(".")
        else:
            facts = {"view": f"frames {words}", "size_px": side}
            return shapes, facts | {"frames_px": [*map(list, grids)], "patches": [*map(list, grids.values())]}
    raise UserError(
        f"{subject.name} gives no map of patches for frames of {side} px: {refused}. Leave it out, or try another size."
    )


def _inner(subject: Subject) -> Any:
    """The backbone that has features before they are pooled."""
    backbone = getattr(subject.backbone, "inner", subject.backbone)
    if not hasattr(backbone, "forward_features"):
        raise UserError(f"{subject.name} has no features of patches, as it has no forward_features: leave it out of segmentation.")
    return backbone


def _whole_patches(size: Shape, side: int, step: int) -> Shape:
    """(H, W) with `side` pixels as the shorter side, and both rounded to multiples of `step`."""
    height, width = (max(1, round(edge * side / min(size) / step)) * step for edge in size)
    return height, width


def _grid(subject: Subject, shape: Shape, device: torch.device) -> Shape:
    h, w, _ = _patches(subject, np.zeros((*shape, subject.channels), np.uint8), device).shape
    return h, w


def _resized(frame: np.ndarray, shape: Shape) -> np.ndarray:
    """(H, W, C) uint8 -> (h, w, C) uint8 of the given shape, by Pillow's antialiased bicubic filter."""
    height, width = shape
    planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in np.moveaxis(frame, 2, 0)]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


@torch.inference_mode()
def _patches(subject: Subject, frame: np.ndarray, device: torch.device) -> Tensor:
    """(H, W, C) uint8 -> (h, w, D) float32 on the device. Raises what the backbone likes where it refuses such frames."""
    images = subject.normalized(torch.from_numpy(frame).to(device)[None])
    if isinstance(subject.backbone, Pixels):
        return images[0].unflatten(2, (-1, CELL)).unflatten(1, (-1, CELL)).permute(1, 3, 0, 2, 4).flatten(2)
    backbone = _inner(subject)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=subject.precision == "bf16"):
        found = backbone.forward_features(images)
    return as_map(backbone, found, (frame.shape[0], frame.shape[1]))[0].float()
