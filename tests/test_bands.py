"""Arrays and TIFF files of many bands: the levels that were written, and one kind of error for the rest."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from massl_ray.data.bands import bands, to_8_bits
from massl_ray.data.decode import UNREADABLE, Decoding, Encoded
from tests.helpers import encoded, photograph

BANDS = np.random.default_rng(0).integers(0, 256, (6, 7, 5), dtype=np.uint8)


def npy(levels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, levels, **options)
    return buffer.getvalue()


def tiff(levels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, levels, **options)
    return buffer.getvalue()


def pixels(data: bytes, channels: int, max_pixels: int = 10**6, white: int = 65535) -> np.ndarray:
    image = Encoded(data, Decoding(max_pixels, channels, white))
    found, shrunk = image.pixels(4)
    assert shrunk == 1 and image.size == (found.shape[1], found.shape[0]) and found.dtype == np.uint8
    return found


@pytest.mark.parametrize(
    "data",
    [
        npy(BANDS),
        npy(np.moveaxis(BANDS, 2, 0)),
        npy(np.asfortranarray(BANDS)),
        npy(BANDS.astype(np.uint16) * 257),
        npy(BANDS.astype(">u2") * 257),
        npy(BANDS / np.float32(255)),
        tiff(BANDS, photometric="minisblack"),
        tiff(np.moveaxis(BANDS, 2, 0), photometric="minisblack", planarconfig="separate"),
        tiff(np.moveaxis(BANDS, 2, 0), photometric="minisblack"),  # a page a band
        tiff(BANDS, photometric="minisblack", compression="zlib"),
        tiff(BANDS, photometric="minisblack", bigtiff=True),
        tiff(BANDS, photometric="minisblack", byteorder=">"),
        tiff(BANDS.astype(np.uint16) * 257, photometric="minisblack"),
    ],
)
def test_every_layout_of_five_bands(data):
    assert np.array_equal(pixels(data, 5), BANDS)


def test_one_channel():
    assert np.array_equal(pixels(npy(BANDS[..., 0]), 1), BANDS[..., :1])
    assert np.array_equal(pixels(npy(BANDS[..., 0] > 99), 1)[..., 0], 255 * (BANDS[..., 0] > 99))
    assert np.array_equal(pixels(npy(BANDS[..., :3]), 3), BANDS[..., :3])


def test_white_of_more_than_8_bits():
    """A camera of 12 bits writes levels up to 4095; brighter is as white. Pictures of Pillow's alike, 8 bits and floats as ever."""
    levels = np.array([[0, 16, 4080, 4095, 5000, 65535]], np.uint16)
    expected = [0, 1, 254, 255, 255, 255]
    assert pixels(npy(levels), 1, white=4095)[0, :, 0].tolist() == expected
    assert pixels(encoded(Image.fromarray(levels), "PNG"), 1, white=4095)[0, :, 0].tolist() == expected
    assert pixels(encoded(Image.fromarray(levels), "TIFF"), 3, white=4095)[0, :, 2].tolist() == expected
    assert pixels(tiff(np.dstack([levels] * 5), photometric="minisblack"), 5, white=4095)[0, :, 4].tolist() == expected
    assert pixels(npy(levels), 1)[0, :, 0].tolist() == [0, 0, 16, 16, 19, 255]
    assert np.array_equal(pixels(npy(BANDS), 5, white=10), BANDS)
    assert pixels(npy(levels / 65535), 1, white=10)[0, :, 0].tolist() == [0, 0, 16, 16, 19, 255]


def test_as_many_rows_as_channels():
    square = BANDS[:5, :5]
    assert np.array_equal(pixels(npy(square), 5), square)  # channels last wins


def test_pictures_of_other_than_three_channels():
    image = photograph(60, 40)
    alpha = image.copy()
    alpha.putalpha(7)
    assert np.array_equal(pixels(encoded(alpha, "PNG"), 4), np.asarray(alpha))
    gray = np.asarray(image.convert("L"), dtype=float)
    assert np.array_equal(pixels(encoded(image, "PNG"), 1)[..., 0], gray)
    (jpeg, shrunk) = Encoded(encoded(image, "JPEG", quality=97, subsampling=0), Decoding(channels=1)).pixels(1)
    assert shrunk == 1 and jpeg.shape == (40, 60, 1) and abs(jpeg[..., 0] - gray).mean() < 1
    assert Encoded(encoded(image, "JPEG"), Decoding(channels=1)).pixels(2)[0].shape == (20, 30, 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(BANDS[..., :4]), r"its shape is \(6, 7, 4\), not \(height, width, 5\)"),
        (npy(BANDS[0, 0]), r"its shape is \(5,\)"),
        (npy(BANDS[:0]), "its shape is"),
        (tiff(BANDS[..., :4], photometric="minisblack"), "its shape is"),
        (encoded(photograph(8, 8), "PNG"), "its channels are R, G, B, and data.channels is 5"),
        (npy(BANDS)[:100], "."),
        (npy(BANDS)[:-1], "."),
        (tiff(BANDS, photometric="minisblack")[:120], "."),
        (b"\x93NUMPY", "."),
        (npy(np.array([{}]), allow_pickle=True), "."),
    ],
)
def test_others_are_unreadable(data, words):
    with pytest.raises(UNREADABLE, match=words):
        Encoded(data, Decoding(channels=5)).pixels()


def test_no_pickle_is_opened(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (tmp_path.joinpath("was_here").touch, ())

    with pytest.raises(UNREADABLE):
        Encoded(npy(np.array([[Hostile()]], dtype=object), allow_pickle=True), Decoding(channels=1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [npy(BANDS), tiff(BANDS, photometric="minisblack")])
def test_more_pixels_than_allowed_are_not_decoded(data):
    assert pixels(data, 5, 6 * 7).shape == BANDS.shape
    with pytest.raises(UNREADABLE, match="data.max_pixels"):
        pixels(data, 5, 6 * 7 - 1)


def test_a_header_that_promises_much():
    """The file is small; nobody takes the memory that it asks for."""
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 5)})
    with pytest.raises(ValueError, match=r"1000000 x 1000000 x 5 levels, more than data.max_pixels"):
        bands(huge.getvalue() + bytes(100), 10**6, 5, 65535)


def test_floats_by_their_brightest_level():
    levels = np.array([0, 0.25, 1.0, np.nan])
    assert to_8_bits(levels, 65535).tolist() == [0, 64, 255, 0]
    assert to_8_bits(levels * 200, 65535).tolist() == [0, 50, 200, 0]
    assert to_8_bits(levels * 65535, 65535).tolist() == [0, 64, 255, 0]
