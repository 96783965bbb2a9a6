"""Pixels that are no pictures to Pillow: arrays of numpy and TIFF files of any number of bands."""

import io
import math

import numpy as np

NUMPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
HEADER = 10_000  # bytes of an array's header at most


def is_bands(data: bytes, channels: int) -> bool:
    """Whether `bands` reads it. Gray and coloured TIFF files are Pillow's."""
    return data.startswith(NUMPY) or (channels not in (1, 3) and data.startswith(TIFF))


def bands(data: bytes, max_pixels: int, channels: int, white: int) -> np.ndarray:
    """(h, w, channels) uint8 of an array or TIFF file that has its channels first or last, or one channel and no axis for it.

    Raises ValueError for another number of channels and for more than `max_pixels` pixels, before they are decoded, and whatever
    reading a damaged file raises.
    """
    levels = _array(data, max_pixels * channels) if data.startswith(NUMPY) else _tiff(data, max_pixels * channels)
    if levels.ndim == 2:
        levels = levels[..., np.newaxis]
    if levels.ndim == 3 and levels.shape[0] == channels != levels.shape[2]:
        levels = np.moveaxis(levels, 0, 2)
    if levels.ndim != 3 or levels.shape[2] != channels or not levels.size:
        raise ValueError(f"its shape is {levels.shape}, not (height, width, {channels}) as data.channels says")
    return np.ascontiguousarray(levels if levels.dtype == np.uint8 else to_8_bits(levels, white))


def to_8_bits(levels: np.ndarray, white: int) -> np.ndarray:
    """Whole numbers are taken as 0..`white` whatever is in the image, so that dark images stay dark. Floats have no such range:
    the smallest of 0..1, 0..255 and 0..`white` that holds the brightest pixel."""
    scale = 255 / white
    if levels.dtype.kind == "b":
        scale = 255.0
    elif levels.dtype.kind == "f":
        levels = np.nan_to_num(levels)
        brightest = levels.max(initial=0)
        scale = 255.0 if brightest <= 1 else 1.0 if brightest <= 255 else scale
    return np.clip(np.round(levels * scale), 0, 255).astype(np.uint8)


def _array(data: bytes, most: int) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, *_ = read(file, max_header_size=HEADER)
    _check(shape, most)
    return np.load(io.BytesIO(data), allow_pickle=False)


def _tiff(data: bytes, most: int) -> np.ndarray:
    import tifffile  # late: only those who have such files wait for it

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        _check(series.shape, most)
        return series.asarray()


def _check(shape: tuple[int, ...], most: int) -> None:
    if math.prod(shape) > most:
        raise ValueError(f"{' x '.join(map(str, shape))} levels, more than data.max_pixels allows")
