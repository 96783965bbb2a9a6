"""Pictures of what a backbone sees in a few images."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from massl_ray.evaluation.attention import CLASS, MASS, Attention, NoAttention, mass_mask, peaks, self_attention
from massl_ray.evaluation.correspondence import Pair, any_two_px, correspondences, errors_px, patch_px, two_views
from massl_ray.evaluation.patches import CLIP, colours, components, foreground
from massl_ray.evaluation.subjects import Subject
from massl_ray.evaluation.tokens import patch_tokens
from massl_ray.method.views import center_view
from massl_ray.reporting.album import Album, Picture
from massl_ray.reporting.panels import LEAST, Tile, blocks, connected, heat, masked, photo, sheet, stacked
from massl_ray.reporting.pictures import png_bytes

PAIRS = 4  # images that are shown in two views, and pairs of images
SIDE = 336  # pixels of a photograph with lines
FAR = 2.0  # patches: a correspondence that is off by more gets crosses
FEWEST = 4  # patches a side: on fewer, any two are near each other, and there is nothing to see
EVEN = 0.4  # of the area: heads that spread most of their attention over more do so before any training, too
ABREAST = 7  # maps of attention in a row: more would be too small on a page


@dataclass(frozen=True)
class Photos:
    """What is shown: the images themselves, decoded for one number of channels each."""

    names: Sequence[str]  # where each is from, for people
    pixels: Callable[[int], Sequence[np.ndarray]]  # of a number of channels: (h, w, channels) uint8 each

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Gallery:
    """Gathers pictures of one kind after another."""

    photos: Photos
    size: int | None = None  # side of the views, in pixels; None: what each was made for
    fore: bool = False
    pictures: list[Picture] = field(default_factory=list)

    @property
    def album(self) -> Album:
        return Album(self.photos.names, self.pictures)

    def add(self, title: str, note: str, png: bytes = b"", name: str = "", files: Sequence[tuple[str, Sequence[str]]] = ()) -> None:
        self.pictures.append(Picture(title, note, png, name, files))

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
        seen = _attention(subject, views)
    except (NoAttention, ValueError) as error:
        gallery.add(title, _sentence(error))
        return
    side = seen.patches.shape[-1]
    query = (
        "from the class token, which is what the pooled features are made of"
        if seen.query == CLASS
        else "as the mean over all patches, because this model's pooled features are not made of a class token"
    )
    note = (
        f"Attention to {side} x {side} patches {query}. Above: black is 0 and yellow the head's own largest value, which is so "
        f"many times what even attention would be, or {LEAST:g}x if that is more. Below: the fewest patches that hold {MASS:.0%} "
        f"of what the head gives to patches. Even attention would take {MASS:.0%} of the area; a head that takes more than "
        f"{EVEN:.0%} looks at nothing in particular, and is gray.{_prefix_note(seen)}"
    )
    gallery.add(title, note, png_bytes(sheet(*attention_rows(views, seen))), f"attention_{slug}.png")


def attention_rows(views: np.ndarray, seen: Attention) -> tuple[list[list[Tile | None]], list[str]]:
    rows: list[list[Tile | None]] = []
    labels = []
    for number, (view, maps) in enumerate(zip(views, seen.patches.numpy(), strict=True), 1):
        shown = [*((f"head {head}", each) for head, each in enumerate(maps, 1)), ("mean", maps.mean(0))]
        for start in range(0, len(shown), ABREAST):
            part = shown[start : start + ABREAST]
            above = [Tile(heat(view, each), f"{name}: peak {peaks(each):.1f}x even") for name, each in part]
            rows.append([None if start else Tile(photo(view)), *above])
            rows.append([None, *(_mass(view, each) for _, each in part)])
            labels += ["" if start else f"image {number}", ""]
    return rows, labels


def _mass(view: np.ndarray, weights: np.ndarray) -> Tile:
    """Where most of the attention goes; gray where it goes everywhere, for the outlines of noise look like a find."""
    mask = mass_mask(weights)
    return Tile(masked(view, mask, gray=bool(mask.mean() > EVEN)), f"{MASS:.0%} in {mask.mean():.0%} of area")


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
            missing.append(f" {subject.name}: {error}.")
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
    drawn = len(rows) > 1
    png = png_bytes(sheet(rows, labels, [str(number) for number in range(1, len(gallery.photos) + 1)])) if drawn else b""
    said = "".join([note] * drawn + missing).strip()
    gallery.add("Principal components of patch tokens", said, png, "pca.png" if drawn else "")


def pca_rows(gallery: Gallery, subject: Subject, *, fore: bool) -> tuple[list[list[Tile | None]], list[str]]:
    views = gallery.views(subject)
    tokens = _tokens(subject, views)
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
            made, caption, shares = _views_matched(subject, two_views(image, side, sample=number))
            drawn.append(made)
            captions.append(f"image {number}, two views: {caption}")
            near.append(shares)
        views = gallery.views(subject)
        for number in range(min(PAIRS, len(views) - 1)):
            made, caption = _images_matched(subject, views[number : number + 2])
            drawn.append(made)
            captions.append(f"images {number + 1} and {number + 2}: {caption}")
    except ValueError as error:
        gallery.add(title, _sentence(error))
        return
    found, chance = np.mean(near, 0)
    note = (
        "Patches that are each other's most similar, the most similar pairs. Of two views of one image, cut, mirrored and "
        f"coloured as in training, it is known what belongs together: crosses mark pairs that are more than {FAR:g} patches off; "
        f"on average {found:.0%} are not, and of patches taken at random {chance:.0%}. Of two images nothing is known: some "
        "patches are always each other's nearest, so that there are lines says nothing; where they lead does."
    )
    gallery.add(title, note, png_bytes(stacked(drawn, captions)), f"correspondence_{slug}.png")


def _views_matched(subject: Subject, pair: Pair) -> tuple[Image.Image, str, tuple[float, float]]:
    """The picture, its caption, and the shares of its correspondences and of any two patches that are right to FAR patches."""
    left, right = _tokens(subject, np.stack(pair.pixels))
    found = correspondences(left, right)
    errors, patch, random = errors_px(found, pair), patch_px(left.shape, pair), any_two_px(left.shape, pair)
    far, chance = errors > FAR * patch, float((random <= FAR * patch).mean())
    photos = [photo(view, SIDE) for view in pair.pixels]
    made = connected(photos[0], photos[1], (found.left, found.right), far, SIDE)
    if not len(found):
        return made, "no two patches are each other's nearest", (0.0, chance)
    caption = (
        f"{(~far).sum()} of {len(found)} within {FAR:g} patches (at random {chance:.0%}); median error "
        f"{np.median(errors) / patch:.1f} patches (at random {random.mean() / patch:.1f})"
    )
    return made, caption, (float((~far).mean()), chance)


def _images_matched(subject: Subject, views: np.ndarray) -> tuple[Image.Image, str]:
    """The picture of two views (2, side, side, C), and its caption."""
    left, right = _tokens(subject, views)
    found = correspondences(left, right)
    photos = [photo(view, SIDE) for view in views]
    made = connected(photos[0], photos[1], (found.left, found.right), np.zeros(len(found), bool), SIDE)
    if not len(found):
        return made, "no two patches are each other's nearest"
    low, high = found.similarity.min(), found.similarity.max()
    return made, f"the best {len(found)}, cosine similarity {low:.2f} to {high:.2f}"


def draw_comparison(gallery: Gallery, subjects: Sequence[Subject]) -> None:
    """Several models as rows, for the same images; nothing where none has attention, for then `draw_pca` shows the same."""
    rows: list[list[Tile | None]] = [[Tile(photo(view)) for view in gallery.views(subjects[0])]]
    labels, attentive = ["images"], False
    for subject in subjects:
        views = gallery.views(subject)
        try:
            made, said = pca_rows(gallery, subject, fore=False)
            rows += made
            labels += said
        except ValueError:
            pass
        try:
            seen = _attention(subject, views)
        except (NoAttention, ValueError):
            continue
        attentive = True
        maps = seen.patches.mean(1).numpy()
        tiles: list[Tile | None] = [Tile(heat(v, m), f"peak {peaks(m):.1f}x even") for v, m in zip(views, maps, strict=True)]
        rows.append(tiles)
        labels.append(f"{subject.name}: attention, mean of {seen.patches.shape[1]} heads, {seen.query}")
    if attentive:
        note = (
            "Principal components of patch tokens and, where there is one, the mean attention of the last block; each as in its "
            "own section below."
        )
        gallery.add("The models side by side", note, png_bytes(sheet(rows, labels)), "comparison.png")


def _tokens(subject: Subject, views: np.ndarray) -> np.ndarray:
    """Of patches, (n, h, w, D). Raises ValueError."""
    tokens = patch_tokens(inner(subject), _normalized(subject, views)).numpy()
    _enough(views, tokens.shape[1])
    return tokens


def _attention(subject: Subject, views: np.ndarray) -> Attention:
    """Raises NoAttention, ValueError."""
    seen = self_attention(inner(subject), _normalized(subject, views))
    _enough(views, seen.patches.shape[-1])
    return seen


def _enough(views: np.ndarray, patches: int) -> None:
    if patches < FEWEST:
        side = views.shape[1]
        raise ValueError(
            f"it sees {patches} x {patches} patches in an image of {side} px, too few to show anything: give a larger --size, "
            f"{FEWEST * side // max(1, patches - 1)} for instance"
        )


def inner(subject: Subject) -> nn.Module:
    """The backbone that has features before they are pooled. Raises ValueError."""
    backbone = getattr(subject.backbone, "inner", subject.backbone)
    if not hasattr(backbone, "forward_features"):
        raise ValueError("it has no features of patches")
    return backbone


def _sentence(error: Exception) -> str:
    said = str(error).removesuffix(".")
    return f"{said[:1].upper()}{said[1:]}."


def slugs(names: Sequence[str]) -> list[str]:
    """Names for files: the letters and digits of each, with a number where two would be the same."""
    made: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-60:] or "model"
        made.append(plain if plain not in made else next(f"{plain}-{n}" for n in range(2, 999) if f"{plain}-{n}" not in made))
    return made


def _normalized(subject: Subject, views: np.ndarray) -> Tensor:
    device: Any = next(iter(subject.backbone.parameters()), torch.empty(0)).device
    return subject.normalized(torch.from_numpy(views).to(device))
