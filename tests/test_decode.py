"""Bytes to pixels: every kind of file people have, upright and in 8 bits, and one kind of error for the rest."""

import io
import math
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from massl_ray.data import decode as module
from massl_ray.data.decode import UNREADABLE, Decoding, Encoded, reason
from tests.helpers import decode, encoded, photograph, read, smooth

SHOTS = {kind: encoded(Image.fromarray(smooth()), kind) for kind in ("JPEG", "PNG", "WebP", "TIFF", "BMP", "GIF")}

GRAY_16 = Image.fromarray((np.arange(16 * 24).reshape(16, 24) * 170).astype(np.uint16))
KINDS = SHOTS | {
    "JPEG, progressive": encoded(Image.fromarray(smooth()), "JPEG", progressive=True),
    "JPEG, gray": encoded(Image.fromarray(smooth()[..., 0]), "JPEG"),
    "JPEG, CMYK": encoded(Image.fromarray(smooth()).convert("CMYK"), "JPEG"),
    "PNG, palette": encoded(Image.fromarray(smooth()).quantize(16), "PNG"),
    "PNG, 16-bit gray": encoded(GRAY_16, "PNG"),
    "TIFF, LZW": encoded(Image.fromarray(smooth()), "TIFF", compression="tiff_lzw"),
    "TIFF, JPEG": encoded(Image.fromarray(smooth()), "TIFF", compression="jpeg"),
    "TIFF, 16-bit gray": encoded(GRAY_16, "TIFF"),
    "WebP, lossless": encoded(Image.fromarray(smooth()), "WebP", lossless=True),
}


def difference(image: Image.Image, expected: np.ndarray) -> float:
    """Mean absolute difference in gray levels."""
    assert image.mode == "RGB" and np.asarray(image).shape == expected.shape
    return float(np.abs(np.asarray(image, dtype=float) - expected).mean())


def as_rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


# ---- kinds of files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WebP", {"lossless": True}, 0),
        ("WebP", {"quality": 95}, 4),
        ("JPEG", {"quality": 95, "subsampling": 0}, 2),
        ("JPEG", {"quality": 95, "progressive": True}, 4),
        ("GIF", {}, 16),
    ],
)
def test_formats(kind, options, most):
    assert difference(decode(encoded(Image.fromarray(smooth()), kind, **options)), smooth()) <= most


def test_the_first_frame_of_a_moving_gif():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(moving)).n_frames == 3  # type: ignore[attr-defined]
    assert (np.asarray(decode(moving)) == (255, 0, 0)).all()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 97}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_decoded_as_pillow_decodes_them(mode, options):
    data = encoded(photograph(75, 50).convert(mode), "JPEG", **options)
    assert difference(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))) == 0


@pytest.mark.parametrize(("kind", "orientation"), [("JPEG", 1), ("JPEG", 6), ("PNG", 1)])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8, 16])
def test_a_jpeg_can_come_smaller(kind, orientation, shrink):
    """Pixels are the means of what they cover; other formats come whole."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Encoded(encoded(photograph(160, 120), kind, exif=exif, quality=97, subsampling=0))
    pixels, shrunk = image.pixels(shrink)
    assert shrunk == (min(shrink, 8) if kind == "JPEG" else 1)
    assert image.size == ((160, 120) if orientation == 1 else (120, 160))
    expected = np.asarray(photograph(160, 120).reduce(shrunk).rotate(0 if orientation == 1 else -90, expand=True))
    assert difference(Image.fromarray(pixels), expected) < 4


@pytest.mark.parametrize("kind", ["PPM", "EPS", "ICO"])
def test_formats_that_no_source_lists_are_no_images(kind):
    """Pillow would hand some of them to other programs."""
    with pytest.raises(Image.UnidentifiedImageError):
        decode(encoded(Image.fromarray(smooth()), kind))


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_transparency_is_dropped_and_the_colours_under_it_stay():
    alpha = np.zeros((16, 24, 1), np.uint8)
    assert difference(decode(encoded(Image.fromarray(np.concatenate([smooth(), alpha], 2)), "PNG")), smooth()) == 0


def test_gray_with_alpha():
    gray = smooth()[..., 0]
    two = Image.merge("LA", (Image.fromarray(gray), Image.new("L", (24, 16), 7)))
    assert difference(decode(encoded(two, "PNG")), as_rgb(gray)) == 0


@pytest.mark.parametrize("transparent", [None, 1, b"\x00\x80\xff"])
def test_palette(transparent):
    places = (np.arange(24 * 16).reshape(16, 24) % 3).astype(np.uint8)
    colors = np.array([(250, 10, 20), (30, 240, 40), (50, 60, 230)], dtype=np.uint8)
    image = Image.fromarray(places)
    image.putpalette(colors.tobytes())
    options = {} if transparent is None else {"transparency": transparent}
    assert difference(decode(encoded(image, "PNG", **options)), colors[places]) == 0


def test_transparent_colour_of_an_rgb_file():
    data = encoded(Image.fromarray(smooth()), "PNG", transparency=(0, 0, 128))
    assert difference(decode(data), smooth()) == 0


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    image = Image.fromarray(smooth()).convert("CMYK")
    assert difference(decode(encoded(image, kind, quality=95)), smooth()) < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_gray(kind):
    gray = smooth()[..., 1]
    assert difference(decode(encoded(Image.fromarray(gray), kind)), as_rgb(gray)) == 0


def test_black_and_white():
    checks = np.indices((16, 24)).sum(0) % 2 * 255
    image = Image.fromarray(checks.astype(np.uint8)).convert("1")
    assert difference(decode(encoded(image, "PNG")), as_rgb(checks)) == 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_upper_byte(kind):
    levels = (np.arange(16 * 24).reshape(16, 24) * 170).astype(np.uint16)  # 0 .. 65110
    decoded = decode(encoded(Image.fromarray(levels), kind))
    assert difference(decoded, as_rgb(np.round(levels / 257.0))) == 0
    assert np.asarray(decoded).max() == 253


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("brightest", [40, 255, 256, 5000, 65535])
def test_dark_and_bright_16_bit_images_are_scaled_alike(kind, brightest):
    levels = np.linspace(0, brightest, 16 * 24).reshape(16, 24).astype(np.uint16)
    assert difference(decode(encoded(Image.fromarray(levels), kind)), as_rgb(np.round(levels / 257.0))) == 0


def test_16_bit_gray_with_its_upper_byte_first():
    image = Image.frombytes("I;16B", (3, 1), b"\x00\x00\x64\x64\xff\xff")
    assert np.asarray(decode(encoded(image, "TIFF")))[..., 0].tolist() == [[0, 100, 255]]


def test_whole_numbers_of_32_bits_are_cut_at_65535():
    levels = np.array([[-5, 0, 257, 25700], [65535, 70000, 2**31 - 1, 257 * 7]], dtype=np.int32)
    expected = np.array([[0, 0, 1, 100], [255, 255, 255, 7]])
    assert difference(decode(encoded(Image.fromarray(levels), "TIFF")), as_rgb(expected)) == 0


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([[0.0, 0.5, 1.0]], [[0, 128, 255]]),
        ([[0.0, 100.4, 255.0]], [[0, 100, 255]]),
        ([[0.0, 25700.0, 65535.0]], [[0, 100, 255]]),
        ([[float("nan"), 0.2, -1.0]], [[0, 51, 0]]),
    ],
)
def test_floats(levels, expected):
    data = encoded(Image.fromarray(np.array(levels, dtype=np.float32)), "TIFF")
    assert difference(decode(data), as_rgb(np.array(expected))) == 0


# ---- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "TIFF"])
def test_orientation(orientation, kind):
    image = Image.fromarray(smooth())
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WebP" else {}
    data = encoded(image, kind, exif=exif, quality=95, **options)
    opened = Image.open(io.BytesIO(data))
    assert opened.getexif()[0x0112] == orientation
    expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert expected.shape[:2] == ((16, 24) if orientation < 5 else (24, 16))
    assert difference(decode(data), expected) == 0


def test_orientation_by_hand():
    image = Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8))
    for orientation, upright in ((3, [[6, 5, 4], [3, 2, 1]]), (6, [[4, 1], [5, 2], [6, 3]]), (8, [[3, 6], [2, 5], [1, 4]])):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.asarray(decode(encoded(image, "PNG", exif=exif)))[..., 0].tolist() == upright


@pytest.mark.parametrize("orientation", [0, 9, 4711])
def test_an_orientation_that_is_none_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert difference(decode(encoded(Image.fromarray(smooth()), "PNG", exif=exif)), smooth()) == 0


def test_16_bit_gray_is_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    levels = np.array([[0, 257], [514, 771]], np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(levels), "PNG", exif=exif)))[..., 0].tolist() == [[2, 0], [3, 1]]


# ---- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"no image at all", b"%PDF-1.7 ...", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff"]
)
def test_no_image(data):
    with pytest.raises(UNREADABLE):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WebP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated(kind, share):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    with pytest.raises(UNREADABLE):
        decode(data[: int(share * len(data))])


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(sorted(SHOTS)), place=st.integers(0, 10**6), byte=st.integers(0, 255), length=st.integers(1, 40))
@pytest.mark.filterwarnings("ignore")  # Pillow warns of broken metadata
def test_broken_bytes_raise_nothing_else(kind, place, byte, length):
    data = bytearray(SHOTS[kind])
    place %= len(data)
    data[place : place + length] = bytes([byte]) * len(data[place : place + length])
    try:
        assert decode(bytes(data)).mode == "RGB"
    except UNREADABLE:
        pass


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """A few bytes changed, removed, put in or cut off, mostly in the header."""
    broken = bytearray(data)
    for _ in range(random.integers(1, 8)):
        place = int(len(broken) * random.random() ** random.choice([1, 3]))
        length, change = int(random.integers(1, 5)), random.integers(4)
        some = random.choice([random.bytes(length), b"\xff" * length, b"\x00" * length])
        broken[place : place + (0 if change == 0 else length)] = b"" if change == 1 else some
        if random.random() < 0.05:
            del broken[place:]
    return bytes(broken)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of broken metadata
@pytest.mark.parametrize("name", sorted(KINDS))
def test_mutated_files_raise_nothing_else_and_keep_their_word(name):
    random, outcomes = np.random.default_rng(0), set()
    for _ in range(200):
        try:
            image = Encoded(mutated(KINDS[name], random), Decoding(max_pixels=10**6))
            pixels, shrunk = image.pixels(2)
            assert pixels.dtype == np.uint8
            assert pixels.shape == (math.ceil(image.size[1] / shrunk), math.ceil(image.size[0] / shrunk), 3)
            outcomes.add("read")
        except UNREADABLE:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_what_pillows_parsers_raise_becomes_a_value_error(monkeypatch):
    def broken(self):
        raise TypeError("an integer is required")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    with pytest.raises(ValueError, match="TypeError: an integer is required"):
        decode(SHOTS["PNG"])


def test_no_memory_is_no_fault_of_the_file(monkeypatch):
    def full(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "getexif", full)
    with pytest.raises(MemoryError):
        decode(SHOTS["PNG"])


@pytest.mark.parametrize("kind", sorted(SHOTS))
def test_a_bomb(kind):
    assert decode(SHOTS[kind], max_pixels=16 * 24).size == (24, 16)
    with pytest.raises(Image.DecompressionBombError, match="24 x 16 pixels, more than data.max_pixels 383 allows"):
        decode(SHOTS[kind], max_pixels=16 * 24 - 1)
    assert Image.DecompressionBombError in UNREADABLE


def test_read(tmp_path):
    (tmp_path / "x.png").write_bytes(SHOTS["PNG"])
    assert difference(read(str(tmp_path / "x.png")), smooth()) == 0
    with pytest.raises(UNREADABLE):
        read(str(tmp_path / "missing.png"))
    with pytest.raises(UNREADABLE):
        read(str(tmp_path))


# ---- reasons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"no image", SHOTS["PNG"][:60], SHOTS["JPEG"][:300], SHOTS["TIFF"][:90], SHOTS["WebP"][:20]])
def test_reasons_are_the_same_each_time_and_name_no_addresses(data):
    def why() -> str:
        with pytest.raises(UNREADABLE) as caught:
            decode(data)
        return reason(caught.value)

    kept = [why() for _ in range(2)]
    assert kept[0] == kept[1] and "0x" not in kept[0] and "\n" not in kept[0]
    assert kept[0].split(":")[0].isidentifier()


def test_reason_by_hand():
    assert reason(OSError("image file is\n truncated")) == "OSError: image file is truncated"
    address = Image.UnidentifiedImageError("cannot identify image file <_io.BytesIO object at 0x7f00>")
    assert reason(address) == "UnidentifiedImageError: cannot identify image file"


def test_every_turn_is_one_that_pillow_knows():
    known = {2: (1, 0), 3: (1, 1), 4: (0, 1)}  # mirrored left to right, top to bottom
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for orientation, (across, down) in known.items():
        turned = np.asarray(Image.fromarray(pixels).transpose(module.TURNS[orientation]))
        assert np.array_equal(turned, pixels[:: -1 if down else 1, :: -1 if across else 1])


def test_broken_metadata_beside_the_orientation_spoils_nothing():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Software] = "a camera"
    block, text = exif.tobytes(), struct.pack(">HHI", ExifTags.Base.Software, 2, 9)
    assert text in block
    data = encoded(Image.fromarray(smooth()), "PNG", exif=block.replace(text, struct.pack(">HHI", ExifTags.Base.Software, 11, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow tells of the two floats where text should be
        with pytest.raises(AttributeError):  # it is this that was to be broken
            ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert difference(decode(data), np.rot90(smooth(), -1)) == 0
