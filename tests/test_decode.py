"""Decoding: every format, mode and orientation comes out as upright 8-bit RGB; everything else raises one of UNREADABLE."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from massl_ray.data import decode as module
from massl_ray.data.decode import UNREADABLE, decode, read, reason
from tests.helpers import encoded, smooth

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def rgb() -> Image.Image:
    return Image.fromarray(smooth())


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def with_orientation(kind: str, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.ImageDescription] = "ramps"
    return encoded(rgb(), kind, exif=exif, **options)


# ---- formats and modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 6),
        ("JPEG", {"quality": 98, "subsampling": 0}, 3),
        ("JPEG", {"quality": 98, "subsampling": 0, "progressive": True}, 3),
        ("GIF", {}, 24),
    ],
)
def test_formats(kind, options, error):
    found = pixels(encoded(rgb(), kind, **options))
    assert np.abs(found.astype(int) - smooth()).max() <= error


def test_first_frame_of_an_animation():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [Image.new("RGB", (6, 5), colour) for colour in colours]
    for kind in ("GIF", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert (pixels(data) == (255, 0, 0)).all(), kind
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels(data) == (255, 0, 0)).all()


def test_alpha_is_dropped():
    alpha = np.linspace(0, 255, 24 * 16).reshape(16, 24, 1).astype(np.uint8)
    image = Image.fromarray(np.concatenate([smooth(), alpha], axis=2))
    assert image.mode == "RGBA"
    assert np.array_equal(pixels(encoded(image, "PNG")), smooth())
    gray = Image.merge("LA", (rgb().getchannel(0), Image.fromarray(alpha[..., 0])))
    assert np.array_equal(pixels(encoded(gray, "PNG")), np.repeat(smooth()[..., :1], 3, axis=2))


def test_gray_is_repeated():
    gray = rgb().getchannel(0)
    assert np.array_equal(pixels(encoded(gray, "PNG")), np.repeat(smooth()[..., :1], 3, axis=2))
    bits = gray.point(lambda level: 255 * (level > 99), mode="1")
    assert np.array_equal(pixels(encoded(bits, "PNG")), np.repeat(255 * (smooth()[..., :1] > 99), 3, axis=2))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))], ids=["none", "one", "many"])
def test_palette(transparency):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    image.putpalette(palette.tobytes())
    assert image.mode == "P"
    options = {} if transparency is None else {"transparency": transparency}
    assert np.array_equal(pixels(encoded(image, "PNG", **options)), palette.reshape(16, 16, 3))


def test_cmyk():
    ink = np.stack([np.full((16, 24), 64), smooth()[..., 0], np.zeros((16, 24)), np.full((16, 24), 30)], axis=2).astype(np.uint8)
    expected = (255 - ink[..., :3].astype(float)) * (255 - 30) / 255
    for kind, options, error in (("TIFF", {}, 1.01), ("JPEG", {"quality": 98}, 4)):
        image = Image.frombytes("CMYK", (24, 16), ink.tobytes())
        assert np.abs(pixels(encoded(image, kind, **options)) - expected).max() <= error


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_16_bit_ramp_is_scaled_to_8_bits(kind):
    data = encoded(Image.fromarray(RAMP), kind)
    expected = np.round(RAMP / 257)
    assert np.array_equal(pixels(data), np.repeat(expected[..., None], 3, axis=2))


def test_the_scale_of_16_bits_does_not_depend_on_what_is_in_the_image():
    whole = pixels(encoded(Image.fromarray(RAMP), "PNG"))
    for rows in (slice(0, 1), slice(0, 2), slice(100, 104), slice(255, 256)):  # the first holds nothing above 255
        assert np.array_equal(pixels(encoded(Image.fromarray(RAMP[rows]), "PNG")), whole[rows])


def test_32_bit_whole_numbers_are_taken_as_16_bits():
    values = np.array([[-5, 0, 257, 65535, 10**6]], dtype=np.int32)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 0, 1, 255, 255]


@pytest.mark.parametrize("highest", [1, 255, 65535])
def test_floats_by_the_smallest_usual_range_that_holds_them(highest):
    values = np.linspace(0, highest, 256, dtype=np.float32).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    assert np.array_equal(pixels(encoded(Image.fromarray(values), "TIFF"))[..., 1], expected)


def test_floats_that_are_no_numbers_are_black():
    values = np.array([[0.0, np.nan, 1.0, -1.0]], dtype=np.float32)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 0, 255, 0]


# ---- orientation -----------------------------------------------------------------------------------------------------

UPRIGHT = {  # what a viewer does with each orientation, in numpy
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
    9: lambda stored: stored,  # no such orientation
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("JPEG", {"quality": 98})])
def test_orientation(kind, options, orientation):
    found = pixels(with_orientation(kind, orientation, **options)).astype(int)
    expected = UPRIGHT[orientation](smooth())
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (4 if kind == "JPEG" else 0)


def test_orientation_of_16_bits():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    found = pixels(encoded(Image.fromarray(RAMP[:, :100]), "PNG", exif=exif))
    assert np.array_equal(found[..., 0], np.rot90(np.round(RAMP[:, :100] / 257), -1))


def test_broken_metadata_beside_the_orientation_spoils_nothing():
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "ramps"
    exif[ExifTags.Base.Orientation] = 6
    block = bytearray(exif.tobytes())
    entry = block.index(struct.pack("<HH" if b"II*" in block else ">HH", ExifTags.Base.ImageDescription, 2))
    block[entry + 2 : entry + 4] = struct.pack("<H" if b"II*" in block else ">H", 11)  # text declared as floats
    data = encoded(rgb(), "PNG", exif=bytes(block))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow tells of it
        assert np.array_equal(pixels(data), UPRIGHT[6](smooth()))


# ---- what cannot be read ---------------------------------------------------------------------------------------------

GOOD = {
    "jpeg": encoded(rgb(), "JPEG"),
    "png": encoded(rgb(), "PNG"),
    "webp": encoded(rgb(), "WEBP"),
    "tiff": encoded(rgb(), "TIFF"),
    "bmp": encoded(rgb(), "BMP"),
    "gif": encoded(rgb(), "GIF"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_truncated(kind):
    whole = GOOD[kind]
    for size in (4, 20, len(whole) // 2, len(whole) - 60):
        with pytest.raises(UNREADABLE):
            decode(whole[:size])


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 500, b"hello, I am a text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n"]
)
def test_no_images(data):
    with pytest.raises(UNREADABLE):
        decode(data)


def test_an_image_that_claims_to_be_enormous():
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(Image.DecompressionBombError):
        decode(data)


@pytest.mark.parametrize(
    "error", [TypeError("no len"), struct.error("unpack requires 4 bytes"), KeyError("I;17"), ZeroDivisionError()]
)
def test_whatever_a_parser_raises_counts_as_unreadable(error, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(module.Image, "open", fail)
    with pytest.raises(UNREADABLE, match=type(error).__name__):
        decode(b"")


def test_lack_of_memory_is_not_the_images_fault(monkeypatch):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(module.Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(b"")


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(sorted(GOOD)), edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_damaged_bytes_give_an_image_or_unreadable(kind, edits):
    data = bytearray(GOOD[kind])
    for place, value in edits:
        data[place % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert decode(bytes(data)).mode == "RGB"
        except UNREADABLE:
            pass


def test_read(tmp_path):
    path = tmp_path / "a b\nü.png"
    path.write_bytes(GOOD["png"])
    assert np.array_equal(np.asarray(read(str(path))), smooth())
    for wrong in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(UNREADABLE):
            read(str(wrong))


def test_reason_is_the_same_each_time():
    reasons = set()
    for _ in range(3):
        with pytest.raises(UNREADABLE) as caught:
            decode(b"no image")
        reasons.add(reason(caught.value))
    assert reasons == {"UnidentifiedImageError: cannot identify image file"}
    assert reason(OSError("image file\n is  truncated")) == "OSError: image file is truncated"
