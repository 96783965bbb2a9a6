"""Bytes to pixels: JPEG by libjpeg-turbo, at a fraction of its size where that is enough, everything else by Pillow."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import (
    ExifTags,
    Image,
    TiffImagePlugin,  # noqa: F401 - Pillow opens these two kinds of files
    WebPImagePlugin,  # noqa: F401 - only where their modules are loaded
)

from massl_ray.config import DataSection

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
"""What is decoded. Pillow knows more formats, and runs other programs for some."""

MAX_PIXELS = DataSection().max_pixels
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which would come before ours

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
"""What is raised for files that are missing, truncated, hostile or no images."""


def reason(error: BaseException) -> str:
    """Why an image could not be read, in words that are the same each time."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text.split(' <_io.')[0]}"


class Encoded:
    """An image of which the header has been read: `size` is its upright (width, height).

    Raises one of UNREADABLE where `data` is no image, or one of more than `max_pixels` pixels.
    """

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS):
        with _unreadable():
            self._data, self._image = data, Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = self._image.size
            if width * height > max_pixels:
                raise Image.DecompressionBombError(f"{width} x {height} pixels, more than data.max_pixels {max_pixels} allows")
            # Pillow turns TIFF files itself
            orientation = 1 if self._image.format == "TIFF" else self._image.getexif().get(ExifTags.Base.Orientation, 1)
            self._turn = TURNS.get(orientation)
            self.size = (height, width) if orientation in (5, 6, 7, 8) else (width, height)

    def pixels(self, shrink: int = 1) -> tuple[np.ndarray, int]:
        """Decode to (h, w, 3) uint8, RGB, upright; 16-bit gray is scaled to 8 bits, transparency dropped.

        A JPEG may come up to `shrink` (a power of two) times smaller. Also returns how many times smaller it is. Raises one
        of UNREADABLE.
        """
        with _unreadable():
            pixels, shrunk = self._jpeg(min(shrink, 8)), min(shrink, 8)
            if pixels is None:
                pixels, shrunk = _to_rgb(self._image), 1
            if self._turn is not None:  # not ImageOps.exif_transpose: it writes the EXIF block anew, and fails where that is broken
                pixels = np.asarray(Image.fromarray(pixels).transpose(self._turn))
            return pixels, shrunk

    def _jpeg(self, shrink: int) -> np.ndarray | None:
        """None for what libjpeg-turbo refuses or has no RGB for: Pillow has the last word."""
        if self._image.format not in ("JPEG", "MPO"):
            return None
        try:
            width, height = self._image.size
            *size, colours, _ = simplejpeg.decode_jpeg_header(self._data)
            if size != [height, width] or colours not in ("YCbCr", "RGB", "Gray"):
                return None
            least_height, least_width = math.ceil(height / shrink), math.ceil(width / shrink)
            return simplejpeg.decode_jpeg(self._data, "RGB", min_height=least_height, min_width=least_width)
        except ValueError:
            return None


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image at full size to mode RGB, as `Encoded` does. Raises one of UNREADABLE."""
    return Image.fromarray(Encoded(data, max_pixels).pixels()[0])


def read(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read and decode one file. Raises one of UNREADABLE."""
    with open(path, "rb") as file:
        return decode(file.read(), max_pixels)


@contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    except (*UNREADABLE, MemoryError):
        raise
    except Exception as error:  # broken metadata makes Pillow's parsers raise TypeError, struct.error and more
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    image.info.pop("transparency", None)
    return np.asarray(image.convert("RGB"))


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Whole numbers are taken as 0..65535 whatever is in the image, so that dark images stay dark. Floats have no such range:
    the smallest of 0..1, 0..255 and 0..65535 that holds the brightest pixel."""
    scale = 255 / 65535
    if pixels.dtype.kind == "f":
        pixels = np.nan_to_num(pixels)
        brightest = pixels.max(initial=0)
        scale = 255.0 if brightest <= 1 else 1.0 if brightest <= 255 else scale
    return np.clip(np.round(pixels * scale), 0, 255).astype(np.uint8)
