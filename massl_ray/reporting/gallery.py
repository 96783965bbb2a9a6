"""Pictures of what a backbone sees: one PNG file each, and visualize.html with all of them."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from massl_ray.evaluation.attention import CLASS, MASS, Attention, NoAttention, mass_mask, peaks, self_attention
from massl_ray.evaluation.correspondence import Pair, chance_px, correspondences, errors_px, patch_px, two_views
from massl_ray.evaluation.patches import CLIP, colours, components, foreground
from massl_ray.evaluation.subjects import Subject
from massl_ray.evaluation.tokens import patch_tokens
from massl_ray.method.views import center_view
from massl_ray.reporting.html import page, text
from massl_ray.reporting.panels import LEAST, Tile, blocks, connected, heat, masked, photo, sheet, stacked
from massl_ray.reporting.pictures import png_bytes
from massl_ray.training.run import write_atomically

PAIRS = 4  # images that are shown in two views, and pairs of images
SIDE = 336  # pixels of a photograph with lines
FAR = 2.0  # patches: a correspondence that is off by more gets crosses
LARGE = 300_000  # bytes of a picture that is not embedded as it is
FLAT = 1.5  # times as much as even attention: a head whose peak is lower looks at nothing in particular


@dataclass(frozen=True)
class Photos:
    """What is shown: the images themselves, decoded for one number of channels each."""

    names: Sequence[str]  # where each is from, for people
    pixels: Callable[[int], Sequence[np.ndarray]]  # of a number of channels: (h, w, channels) uint8 each

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Picture:
    title: str
    note: str  # says what is shown, as HTML
    png: bytes = b""  # none where there is nothing to show, which the note says
    name: str = ""  # of the file


@dataclass
class Gallery:
    """Draws pictures of one kind after another into a folder."""

    out: Path
    photos: Photos
    size: int | None = None  # side of the views, in pixels; None: what each was made for
    fore: bool = False
    pictures: list[Picture] = field(default_factory=list)

    def add(self, title: str, note: str, png: bytes = b"", name: str = "") -> None:
        picture = Picture(title, note, png, name)
        if png:
            (self.out / name).write_bytes(png)
        self.pictures.append(picture)

    def write(self) -> Path:
        """visualize.html; returns its path."""
        names = "".join(f"<tr><td>{number}</td><td>{text(name)}</td></tr>" for number, name in enumerate(self.photos.names, 1))
        sections = ["<h1>What the features see</h1>", f"<details open><summary>Images</summary><table>{names}</table></details>"]
        for picture in self.pictures:
            shown = f"<img class='views' alt='{text(picture.title)}' src='{_url(picture.png)}'>" if picture.png else ""
            sections.append(f"<h2>{text(picture.title)}</h2><p class='note'>{picture.note}</p>{shown}")
        path = self.out / "visualize.html"
        write_atomically(path, page("visualize", sections))
        return path

    def views(self, subject: Subject) -> np.ndarray:
        """Centred squares (n, side, side, C) uint8 of the images, whole in their shorter side."""
        side = view_side(subject, self.size)
        return np.stack([center_view(pixels, side, 1.0) for pixels in self.photos.pixels(subject.channels)])


def view_side(subject: Subject, size: int | None) -> int:
    """In pixels, a whole number of patches."""
    patch = getattr(getattr(subject.backbone, "patch_embed", None), "patch_size", None)
    side, step = size or subject.size, int(patch[0]) if isinstance(patch, tuple) else 1
    return max(step, side // step * step)


def draw_attention(gallery: Gallery, subject: Subject, slug: str) -> None:
    title = f"Self-attention of the last block: {subject.name}"
    views = gallery.views(subject)
    try:
        seen = self_attention(inner(subject), _normalized(subject, views))
    except (NoAttention, ValueError) as error:
        gallery.add(title, f"{text(error).removesuffix('.')}.")
        return
    rows, labels = attention_rows(views, seen)
    heads = seen.patches.shape[1]
    titles = ["image", *(f"head {head}" for head in range(1, heads + 1)), "mean of heads"]
    side = seen.patches.shape[-1]
    query = (
        "from the class token, which is what the pooled features are made of"
        if seen.query == CLASS
        else "as the mean over all patches, because this model's pooled features are not made of a class token"
    )
    note = (
        f"Attention to {side} x {side} patches {query}. Above: black is 0 and yellow the head's own largest value, which is so "
        f"many times what even attention would be, or {LEAST:g}x if that is more; a head that stays below {FLAT:g}x looks at "
        f"nothing in particular. Below: the fewest patches that hold {MASS:.0%} of what the head gives to patches; even attention "
        f"would take {MASS:.0%} of the area.{_prefix_note(seen)}"
    )
    gallery.add(title, note, png_bytes(sheet(rows, labels, titles)), f"attention_{slug}.png")


def attention_rows(views: np.ndarray, seen: Attention) -> tuple[list[list[Tile | None]], list[str]]:
    rows: list[list[Tile | None]] = []
    labels = []
    for number, (view, maps) in enumerate(zip(views, seen.patches.numpy(), strict=True), 1):
        shown = [*maps, maps.mean(0)]
        marks = [mass_mask(each) for each in shown]
        rows.append([Tile(photo(view)), *(Tile(heat(view, each), f"peak {peaks(each):.1f}x even") for each in shown)])
        rows.append([None, *(Tile(masked(view, mask), f"{MASS:.0%} in {mask.mean():.0%} of area") for mask in marks)])
        labels += [f"image {number}", ""]
    return rows, labels


def _prefix_note(seen: Attention) -> str:
    if not seen.prefix.shape[-1]:
        return ""
    share = f"{seen.prefix.sum(-1).mean():.0%}"
    return f" {share} of all attention goes to the class token and registers, which have no place in the image."


def draw_pca(gallery: Gallery, subjects: Sequence[Subject]) -> None:
    rows: list[list[Tile | None]] = [[Tile(photo(view)) for view in gallery.views(subjects[0])]]
    labels, missing = ["images"], []
    for subject in subjects:
        try:
            made, said = pca_rows(gallery, subject, fore=gallery.fore)
        except ValueError as error:
            missing.append(f" {text(subject.name)}: {text(error)}.")
            continue
        rows += made
        labels += said
    note = (
        "The first three principal components of all patch tokens of a row as red, green and blue: patches that the backbone takes "
        "for alike have one colour, in all images of the row. Colours mean nothing from row to row. Each component is stretched "
        f"from its {CLIP:g}nd to its {100 - CLIP:g}th percentile, so even one that explains little looks strong: its share of the "
        "variance is given."
    )
    if gallery.fore:
        note += (
            " Foreground is a guess for images of one kind of thing: the side of the first component that is rarer at the borders."
        )
    png = png_bytes(sheet(rows, labels, [str(number) for number in range(1, len(gallery.photos) + 1)])) if len(rows) > 1 else b""
    gallery.add("Principal components of patch tokens", note + "".join(missing), png, "pca.png")


def pca_rows(gallery: Gallery, subject: Subject, *, fore: bool) -> tuple[list[list[Tile | None]], list[str]]:
    views = gallery.views(subject)
    tokens = patch_tokens(inner(subject), _normalized(subject, views)).numpy()
    found = components(tokens)
    rows: list[list[Tile | None]] = [[Tile(blocks(colour)) for colour in colours(found.scores)]]
    labels = [f"{subject.name}: {tokens.shape[1]} x {tokens.shape[2]} patches, {_shares(found.shares)} of the variance"]
    if fore:
        mask = foreground(found.scores)
        again = components(tokens, mask=mask)
        rows.append([Tile(blocks(colour)) for colour in colours(again.scores, mask)])
        labels.append(f"{subject.name}: foreground alone, {_shares(again.shares)}")
    return rows, labels


def _shares(shares: np.ndarray) -> str:
    return " + ".join(f"{share:.0%}" for share in shares)


def draw_correspondences(gallery: Gallery, subject: Subject, slug: str) -> None:
    title = f"Correspondences: {subject.name}"
    images, side = gallery.photos.pixels(subject.channels)[:PAIRS], view_side(subject, gallery.size)
    drawn, captions, near = [], [], []
    try:
        for number, image in enumerate(images, 1):
            made, caption, share = _views_matched(subject, two_views(image, side, sample=number))
            drawn.append(made)
            captions.append(f"image {number}, two views: {caption}")
            near.append(share)
        views = gallery.views(subject)
        for number in range(min(PAIRS, len(views) - 1)):
            made, caption = _images_matched(subject, views[number : number + 2])
            drawn.append(made)
            captions.append(f"images {number + 1} and {number + 2}: {caption}")
    except ValueError as error:
        gallery.add(title, f"{text(error)}.")
        return
    note = (
        "Patches that are each other's most similar, the most similar pairs. Of two views of one image, cut, turned over and "
        f"coloured as in training, it is known what belongs together: crosses mark pairs that are more than {FAR:g} patches off; "
        f"on average {np.mean(near):.0%} are not. Of two images nothing is known: some patches are always each other's nearest, so "
        "that there are lines says nothing; where they lead does."
    )
    gallery.add(title, note, png_bytes(stacked(drawn, captions)), f"correspondence_{slug}.png")


def _views_matched(subject: Subject, pair: Pair) -> tuple[Image.Image, str, float]:
    """The picture, its caption, and the share of correspondences that are right to FAR patches."""
    left, right = patch_tokens(inner(subject), _normalized(subject, np.stack(pair.pixels))).numpy()
    found = correspondences(left, right)
    errors, patch, chance = errors_px(found, pair), patch_px(left.shape, pair), chance_px(left.shape, pair)
    far = errors > FAR * patch
    photos = [photo(view, SIDE) for view in pair.pixels]
    made = connected(photos[0], photos[1], (found.left, found.right), far, SIDE)
    if not len(found):
        return made, "no two patches are each other's nearest", 0.0
    caption = (
        f"{(~far).sum()} of {len(found)} within {FAR:g} patches; median error {np.median(errors):.0f} px of the image "
        f"(a patch: {patch:.0f}, at random: {chance:.0f})"
    )
    return made, caption, float((~far).mean())


def _images_matched(subject: Subject, views: np.ndarray) -> tuple[Image.Image, str]:
    """The picture of two views (2, side, side, C), and its caption."""
    left, right = patch_tokens(inner(subject), _normalized(subject, views)).numpy()
    found = correspondences(left, right)
    photos = [photo(view, SIDE) for view in views]
    made = connected(photos[0], photos[1], (found.left, found.right), np.zeros(len(found), bool), SIDE)
    if not len(found):
        return made, "no two patches are each other's nearest"
    low, high = found.similarity.min(), found.similarity.max()
    return made, f"the best {len(found)}, cosine similarity {low:.2f} to {high:.2f}"


def draw_comparison(gallery: Gallery, subjects: Sequence[Subject]) -> None:
    """Several models as rows, for the same images."""
    rows: list[list[Tile | None]] = [[Tile(photo(view)) for view in gallery.views(subjects[0])]]
    labels = ["images"]
    for subject in subjects:
        views = gallery.views(subject)
        try:
            made, said = pca_rows(gallery, subject, fore=False)
            rows += made
            labels += said
        except ValueError:
            pass
        try:
            seen = self_attention(inner(subject), _normalized(subject, views))
        except (NoAttention, ValueError):
            continue
        maps = seen.patches.mean(1).numpy()
        tiles: list[Tile | None] = [Tile(heat(v, m), f"peak {peaks(m):.1f}x even") for v, m in zip(views, maps, strict=True)]
        rows.append(tiles)
        labels.append(f"{subject.name}: attention, mean of {seen.patches.shape[1]} heads, {seen.query}")
    note = (
        "Principal components of patch tokens and, where there is one, the mean attention of the last block; each as in its own "
        "section below."
    )
    gallery.add("The models side by side", note, png_bytes(sheet(rows, labels)), "comparison.png")


def inner(subject: Subject) -> nn.Module:
    """The backbone that has features before they are pooled. Raises ValueError."""
    backbone = getattr(subject.backbone, "inner", subject.backbone)
    if not hasattr(backbone, "forward_features"):
        raise ValueError(f"{subject.name} has no features of patches")
    return backbone


def slugs(names: Sequence[str]) -> list[str]:
    """Names for files: the letters and digits of each, with a number where two would be the same."""
    made: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-60:] or "model"
        made.append(plain if plain not in made else next(f"{plain}-{n}" for n in range(2, 999) if f"{plain}-{n}" not in made))
    return made


def _url(png: bytes) -> str:
    """Of the picture itself; a large one as JPEG, or the page would have tens of megabytes."""
    if len(png) <= LARGE:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).save(buffer, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _normalized(subject: Subject, views: np.ndarray) -> Tensor:
    device: Any = next(iter(subject.backbone.parameters()), torch.empty(0)).device
    return subject.normalized(torch.from_numpy(views).to(device))
