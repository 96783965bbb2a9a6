"""Bytes to pixels."""

import io

import numpy as np
from PIL import Image, ImageOps

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for files that are missing, truncated, hostile or no images."""


def decode(data: bytes) -> Image.Image:
    """Decode an image to mode RGB, upright by its EXIF orientation; 16-bit gray is scaled to 8 bits, transparency dropped.

    Raises one of UNREADABLE.
    """
    image = Image.open(io.BytesIO(data))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    return image.convert("RGB")


def read(path: str) -> Image.Image:
    """Read and decode one file. Raises one of UNREADABLE."""
    with open(path, "rb") as file:
        return decode(file.read())


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    scale = (
        255.0
        if pixels.dtype.kind == "f" and pixels.max(initial=0) <= 1
        else 1.0
        if pixels.max(initial=0) <= 255
        else 255.0 / 65535.0
    )
    return np.clip(np.round(pixels * scale), 0, 255).astype(np.uint8)
