"""Photographs to measure with, as people have them: JPEGs of 500 x 375 pixels, cut from larger pictures."""

import io
from collections.abc import Iterator, Sequence
from importlib.resources import files
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path

from PIL import Image

from massl_ray.errors import UserError

WIDTH, HEIGHT, QUALITY = 500, 375, 97
LEAST_BYTES = 25_000  # flat pictures flatter the decoder
INSTALLED = ("/usr/share/backgrounds", "/usr/share/wallpapers")
"""Where Debian's mate-backgrounds, lomiri-wallpapers-* and plasma-workspace-wallpapers put theirs."""
PACKAGED = {
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
    "skimage.data": ("astronaut.png", "coffee.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
}
"""Photographs that Python packages bring along."""


def photographs(number: int, folder: str | None = None) -> list[bytes]:
    """`number` JPEGs, a cut from each picture in turn. The pictures are those under `folder`, or else those that are installed
    on the system, or else those of Python packages, whose cuts are then taken more than once."""
    installed = [path for root in ([folder] if folder else INSTALLED) for path in Path(root).rglob("*.jp*g")]
    cuts = _one_of_each(sorted(installed), number)
    if not cuts and folder:
        raise UserError(f"--photos: {folder} holds no JPEG photographs of at least {WIDTH} x {HEIGHT} pixels.")
    return list(islice(cycle(cuts or _one_of_each(_packaged(), number)), number))


def write_photographs(folder: Path, number: int, photos: str | None) -> Path:
    folder.mkdir()
    for place, data in enumerate(photographs(number, photos)):
        (folder / f"{place:04d}.jpg").write_bytes(data)
    return folder


def _packaged() -> list[Path]:
    there = [package for package in PACKAGED if find_spec(package.split(".")[0])]
    return [Path(str(files(package) / name)) for package in there for name in PACKAGED[package]]


def _one_of_each(pictures: Sequence[Path], number: int) -> list[bytes]:
    """The first cut of every picture, then the second of each, until there are enough or no more."""
    streams = [_cuts(path) for path in pictures if not path.is_symlink()]
    cuts: list[bytes] = []
    while streams and len(cuts) < number:
        found = [(stream, next(stream, None)) for stream in streams]
        streams = [stream for stream, cut in found if cut]
        cuts += [cut for _, cut in found if cut]
    return cuts[:number]


def _cuts(path: Path) -> Iterator[bytes]:
    """JPEGs of a picture's parts, row by row from its middle, without the flat ones."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    columns, rows = picture.width // WIDTH, picture.height // HEIGHT
    for number in range(rows * columns):
        row, column = divmod((number + rows * columns // 2) % (rows * columns), columns)
        buffer = io.BytesIO()
        box = (column * WIDTH, row * HEIGHT, (column + 1) * WIDTH, (row + 1) * HEIGHT)
        picture.crop(box).save(buffer, "JPEG", quality=QUALITY)
        if len(buffer.getvalue()) >= LEAST_BYTES:
            yield buffer.getvalue()
