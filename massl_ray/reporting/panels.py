"""Sheets of pictures, pixel by pixel: photographs resized smoothly, maps of patches in blocks, so that nothing looks finer than it
was computed."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from massl_ray.reporting.pictures import shown
from massl_ray.shown import in_a_line

TILE = 168  # pixels of a picture in a sheet
GAP, LINE, TEXT = 6, 18, 13  # pixels between tiles, of a line of text, of its letters
INK, QUIET, GREEN = (29, 33, 41), (90, 96, 107), (28, 124, 60)
DIMMED = 0.3  # of the brightness of what a mask leaves out
EDGE = (255, 214, 10)  # around what it keeps, which may be dark itself
LEAST = 4.0  # times as much as even attention that are yellow at least: even attention has to look even
HEAT = colormaps["inferno"]


@dataclass(frozen=True)
class Tile:
    pixels: np.ndarray  # (h, w, 3) uint8, shown at TILE x TILE
    caption: str = ""
    frame: tuple[int, int, int] | None = None


def photo(view: np.ndarray, side: int = TILE) -> np.ndarray:
    """(h, w, C) uint8 as people can see it, (side, side, 3)."""
    return np.asarray(shown(view).resize((side, side), Image.Resampling.LANCZOS))


def blocks(values: np.ndarray, side: int = TILE) -> np.ndarray:
    """A map (h, w) or (h, w, 3), each value a block: (side, side) or (side, side, 3)."""
    rows, columns = (np.arange(side) * size // side for size in values.shape[:2])
    return values[rows][:, columns]


def heat(view: np.ndarray, values: np.ndarray, side: int = TILE) -> np.ndarray:
    """A map (h, w) of shares as colours over the photograph in gray, (side, side, 3): from 0, black, to its own largest value, or
    LEAST times its mean if that is more, yellow."""
    gray = photo(view, side).astype(np.float64).mean(2, keepdims=True)
    top = max(float(values.max()), LEAST * float(values.mean()), 1e-30)
    coloured = HEAT(blocks(values / top, side))[..., :3] * 255
    return np.round(0.3 * gray + 0.7 * coloured).astype(np.uint8)


def masked(view: np.ndarray, mask: np.ndarray, side: int = TILE, *, gray: bool = False) -> np.ndarray:
    """The photograph, dark outside of the mask (h, w), and a line around it, or without a line and in gray: (side, side, 3)."""
    kept = blocks(mask, side)
    made = photo(view, side) * np.where(kept, 1.0, DIMMED)[..., None]
    if gray:
        return np.round(np.repeat(made.mean(2, keepdims=True), 3, axis=2)).astype(np.uint8)
    inside = np.pad(kept, 1, constant_values=True)  # no line along the photograph's own border
    inside = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    made[kept & ~inside] = EDGE
    return np.round(made).astype(np.uint8)


def sheet(rows: Sequence[Sequence[Tile | None]], labels: Sequence[str] = (), titles: Sequence[str] = ()) -> Image.Image:
    """Tiles in rows, each with its label above, under the columns' titles."""
    columns = max((len(row) for row in rows), default=1)
    head = LINE if any(titles) else 0
    labelled = [LINE if number < len(labels) and labels[number] else 0 for number in range(len(rows))]
    captioned = [LINE if any(tile and tile.caption for tile in row) else 0 for row in rows]
    heights = [above + TILE + below + GAP for above, below in zip(labelled, captioned, strict=True)]
    image = Image.new("RGB", (GAP + columns * (TILE + GAP), GAP + head + sum(heights)), "white")
    draw = ImageDraw.Draw(image)
    for column, title in enumerate(titles):
        write(draw, (GAP + column * (TILE + GAP), GAP), title, QUIET, TILE)
    top = GAP + head
    for number, row in enumerate(rows):
        if labelled[number]:
            write(draw, (GAP, top), labels[number], INK, image.width - 2 * GAP)
        for column, tile in enumerate(row):
            if tile is not None:
                _paste(image, draw, tile, GAP + column * (TILE + GAP), top + labelled[number])
        top += heights[number]
    return image


def write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: tuple[int, int, int], width: int) -> None:
    """A line of text, cut to `width` pixels; letters that the font may lack are spelled out."""
    font = ImageFont.load_default(TEXT)
    line = in_a_line(text).encode("latin-1", "backslashreplace").decode("latin-1")
    if draw.textlength(line, font) > width:
        while line and draw.textlength(line + "...", font) > width:
            line = line[:-1]
        line += "..."
    draw.text(place, line, colour, font)


def distinct(number: int) -> list[tuple[int, int, int]]:
    """So many colours, neighbours in the list far apart on the colour wheel."""
    turns = [(index * 0.618034) % 1 for index in range(number)]
    made = [colorsys.hsv_to_rgb(turn, 0.85, 1.0 if index % 2 else 0.8) for index, turn in enumerate(turns)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in made]


def connected(left: np.ndarray, right: np.ndarray, ends: tuple[np.ndarray, np.ndarray], far: np.ndarray, side: int) -> Image.Image:
    """Two photographs beside each other with lines between them.

    Args:
        left, right: (side, side, 3) uint8.
        ends: (m, 2) each, shares of width and height.
        far: (m,) bool: lines that get a cross at each end instead of a dot.
    """
    scale, gap = 2, 24  # drawn twice as large, for smooth lines
    canvas = Image.new("RGB", ((2 * side + gap) * scale, side * scale), "white")
    for number, pixels in enumerate((left, right)):
        big = Image.fromarray(pixels).resize((side * scale, side * scale), Image.Resampling.BICUBIC)
        canvas.paste(big, (number * (side + gap) * scale, 0))
    draw = ImageDraw.Draw(canvas)
    for (start, end), colour, cross in zip(zip(*ends, strict=True), distinct(len(far)), far, strict=True):
        points = [(start[0] * side * scale, start[1] * side * scale), ((end[0] * side + side + gap) * scale, end[1] * side * scale)]
        draw.line(points, "black", 5)
        draw.line(points, colour, 3)
        for x, y in points:
            if cross:
                for reach, ink, wide in ((11, "black", 8), (10, colour, 4)):
                    draw.line([(x - reach, y - reach), (x + reach, y + reach)], ink, wide)
                    draw.line([(x - reach, y + reach), (x + reach, y - reach)], ink, wide)
            else:
                draw.ellipse([x - 9, y - 9, x + 9, y + 9], colour, "black", 2)
    return canvas.resize((canvas.width // scale, side), Image.Resampling.LANCZOS)


def stacked(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """One below the other, each with a line of text under it."""
    width = max(image.width for image in images)
    canvas = Image.new("RGB", (width + 2 * GAP, GAP + sum(image.height + LINE + 2 * GAP for image in images)), "white")
    draw, top = ImageDraw.Draw(canvas), GAP
    for image, caption in zip(images, captions, strict=True):
        canvas.paste(image, (GAP, top))
        write(draw, (GAP, top + image.height + 2), caption, QUIET, width)
        top += image.height + LINE + 2 * GAP
    return canvas


def _paste(image: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    smooth = min(tile.pixels.shape[:2]) >= TILE / 2  # maps come as blocks of TILE pixels; what is small is enlarged smoothly
    made = tile.pixels
    if made.shape[:2] != (TILE, TILE):
        how = Image.Resampling.LANCZOS if smooth else Image.Resampling.BICUBIC
        made = np.asarray(Image.fromarray(made).resize((TILE, TILE), how))
    image.paste(Image.fromarray(made), (x, y))
    if tile.frame:
        draw.rectangle([x, y, x + TILE - 1, y + TILE - 1], outline=tile.frame, width=3)
    write(draw, (x, y + TILE + 1), tile.caption, QUIET, TILE)
