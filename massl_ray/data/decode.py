"""Bytes to pixels: JPEG by libjpeg-turbo, at a fraction of its size where that is enough, arrays and pictures of many bands by
`massl_ray.data.bands`, everything else by Pillow."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import (
    ExifTags,
    Image,
    TiffImagePlugin,  # noqa: F401 - Pillow opens these two kinds of files
    WebPImagePlugin,  # noqa: F401 - only where their modules are loaded
)

from massl_ray.config import DataSection
from massl_ray.data.bands import bands, is_bands, to_8_bits
from massl_ray.shown import redacted

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
"""What is decoded. Pillow knows more formats, and runs other programs for some."""

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
    return redacted(f"{type(error).__name__}: {text.split(' <_io.')[0]}")


@dataclass(frozen=True)
class Decoding:
    """How images are decoded; the settings of the same names."""

    max_pixels: int = DataSection().max_pixels
    """Those of more are refused."""
    channels: int = DataSection().channels
    """1 is gray, 3 are red, green and blue, any other number has to be that of the image."""
    white: int = DataSection().white
    """The level of images of more than 8 bits that becomes 255."""

    @staticmethod
    def of(data: DataSection) -> "Decoding":
        return Decoding(data.max_pixels, data.channels, data.white)


PLAIN = Decoding()


class Encoded:
    """An image of which the header has been read: `size` is its upright (width, height).

    Raises one of UNREADABLE where `data` is no image, or one of more pixels than are allowed.
    """

    def __init__(self, data: bytes, how: Decoding = PLAIN):
        self._data, self._how, self._bands, self._turn = data, how, None, None
        with _unreadable():
            if is_bands(data, how.channels):
                self._bands = bands(data, how.max_pixels, how.channels, how.white)
                self.size = self._bands.shape[1], self._bands.shape[0]
                return
            self._image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = self._image.size
            if width * height > how.max_pixels:
                raise Image.DecompressionBombError(f"{width} x {height} pixels, more than data.max_pixels {how.max_pixels} allows")
            # Pillow turns TIFF files itself
            orientation = 1 if self._image.format == "TIFF" else self._image.getexif().get(ExifTags.Base.Orientation, 1)
            self._turn = TURNS.get(orientation)
            self.size = (height, width) if orientation in (5, 6, 7, 8) else (width, height)

    def pixels(self, shrink: int = 1) -> tuple[np.ndarray, int]:
        """Decode to (h, w, channels) uint8, upright; more than 8 bits are scaled to 8, transparency that is no channel dropped.

        A JPEG may come up to `shrink` (a power of two) times smaller. Also returns how many times smaller it is. Raises one
        of UNREADABLE.
        """
        if self._bands is not None:
            return self._bands, 1
        with _unreadable():
            pixels, shrunk = self._jpeg(min(shrink, 8)), min(shrink, 8)
            if pixels is None:
                pixels, shrunk = _to_channels(self._image, self._how), 1
            if self._turn is not None:  # not ImageOps.exif_transpose: it writes the EXIF block anew, and fails where that is broken
                pixels = as_pixels(to_image(pixels).transpose(self._turn))
            return pixels, shrunk

    def _jpeg(self, shrink: int) -> np.ndarray | None:
        """None for what libjpeg-turbo refuses or has no such channels for: Pillow has the last word."""
        wanted = {1: "GRAY", 3: "RGB"}.get(self._how.channels)
        if self._image.format not in ("JPEG", "MPO") or not wanted:
            return None
        try:
            width, height = self._image.size
            *size, colours, _ = simplejpeg.decode_jpeg_header(self._data)
            if size != [height, width] or colours not in ("YCbCr", "RGB", "Gray"):
                return None
            least_height, least_width = math.ceil(height / shrink), math.ceil(width / shrink)
            return simplejpeg.decode_jpeg(self._data, wanted, min_height=least_height, min_width=least_width)
        except ValueError:
            return None


@contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    except (*UNREADABLE, MemoryError):
        raise
    except Exception as error:  # broken metadata makes Pillow's parsers raise TypeError, struct.error and more
        raise ValueError(f"{type(error).__name__}: {error}") from error


def to_image(pixels: np.ndarray) -> Image.Image:
    """Of (h, w, channels) uint8, up to four of them."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def as_pixels(image: Image.Image) -> np.ndarray:
    """(h, w, channels) uint8."""
    pixels = np.asarray(image)
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels


def _to_channels(image: Image.Image, how: Decoding) -> np.ndarray:
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_8_bits(np.asarray(image), how.white))
    mode = {1: "L", 3: "RGB"}.get(how.channels)
    if mode:
        image.info.pop("transparency", None)
        return as_pixels(image.convert(mode))
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if len(image.getbands()) != how.channels:
        raise ValueError(f"its channels are {', '.join(image.getbands())}, and data.channels is {how.channels}")
    return as_pixels(image)
