"""Bytes to pixels."""

import io

import numpy as np
from PIL import ExifTags, Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright."""

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for files that are missing, truncated, hostile or no images."""


def reason(error: BaseException) -> str:
    """Why an image could not be read, in words that are the same each time."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text.split(' <_io.')[0]}"


def decode(data: bytes) -> Image.Image:
    """Decode an image to mode RGB, upright by its EXIF orientation; 16-bit gray is scaled to 8 bits, transparency dropped.

    Raises one of UNREADABLE.
    """
    try:
        return _decode(data)
    except (*UNREADABLE, MemoryError):
        raise
    except Exception as error:  # broken metadata makes Pillow's parsers raise TypeError, struct.error and more
        raise ValueError(f"{type(error).__name__}: {error}") from error


def read(path: str) -> Image.Image:
    """Read and decode one file. Raises one of UNREADABLE."""
    with open(path, "rb") as file:
        return decode(file.read())


def _decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:  # not ImageOps.exif_transpose: it also writes the EXIF block anew, and fails where that is broken
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Whole numbers are taken as 0..65535 whatever is in the image, so that dark images stay dark. Floats have no such range:
    the smallest of 0..1, 0..255 and 0..65535 that holds the brightest pixel."""
    scale = 255 / 65535
    if pixels.dtype.kind == "f":
        pixels = np.nan_to_num(pixels)
        brightest = pixels.max(initial=0)
        scale = 255.0 if brightest <= 1 else 1.0 if brightest <= 255 else scale
    return np.clip(np.round(pixels * scale), 0, 255).astype(np.uint8)
