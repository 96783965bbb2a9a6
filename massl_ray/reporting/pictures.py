"""Pixels for people: grids of views and thumbnails."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from massl_ray.config import DataSection
from massl_ray.data.decode import UNREADABLE, Decoding, Encoded
from massl_ray.data.listing import Listing

GAP = 4  # pixels between tiles
SIDE = 96  # pixels of a tile


def view_grid(global_views: np.ndarray, local_views: np.ndarray) -> np.ndarray:
    """One row an image: its global views (n, 2, H, W, C), then its local ones (n, m, h, w, C), all at one height; uint8 RGB."""
    rows = []
    for image in range(len(global_views)):
        views = [*global_views[image], *local_views[image]]
        tiles = [np.asarray(shown(view).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for view in views]
        rows.append(np.concatenate([_framed(tile) for tile in tiles], axis=1))
    return np.concatenate(rows)


def shown(pixels: np.ndarray) -> Image.Image:
    """(h, w, C) as people can see it: gray, colours, or the first three bands as if they were."""
    bands = pixels[..., :3]
    if bands.shape[2] == 1:
        bands = np.repeat(bands, 3, axis=2)
    missing = 3 - bands.shape[2]
    return Image.fromarray(np.ascontiguousarray(np.pad(bands, ((0, 0), (0, 0), (0, missing)))))


def save_png(path: Path, pixels: np.ndarray) -> None:
    aside = path.with_name(f".{path.name}")
    Image.fromarray(pixels).save(aside, format="PNG")
    aside.replace(path)


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def thumbnail(image: Image.Image, side: int = SIDE) -> Image.Image:
    """The centred square, `side` pixels wide."""
    cut = min(image.size)
    left, top = (image.width - cut) // 2, (image.height - cut) // 2
    return image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + cut, top + cut))


def add_pictures(entries: Iterable[dict[str, Any]], listing: Listing, data: DataSection) -> None:
    """Give each entry with a `sample` its `picture`, a thumbnail as PNG in base64, for a report that outlives the images; None
    where an image cannot be read any more."""
    for entry in entries:
        try:
            pixels, _ = Encoded(listing.read(entry["sample"]), Decoding.of(data)).pixels()
            entry["picture"] = base64.b64encode(png_bytes(thumbnail(shown(pixels)))).decode()
        except UNREADABLE:
            entry["picture"] = None


def _framed(tile: np.ndarray) -> np.ndarray:
    return np.pad(tile, ((0, GAP), (0, GAP), (0, 0)), constant_values=255)
