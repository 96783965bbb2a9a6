"""Pictures in a folder: PNG files and, in a run's own folder, an index with their titles and notes, for its report.html."""

import base64
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from massl_ray.training.run import write_atomically

FOLDER = Path("eval", "pictures")  # in a run directory
INDEX = "pictures.json"
LARGE = 300_000  # bytes of a picture that is not embedded as it is
WIDEST = 2176  # pixels of an embedded picture: twice what a page shows


@dataclass(frozen=True)
class Picture:
    title: str
    note: str  # says what is shown
    png: bytes = b""  # none where there is nothing to show, which the note says
    name: str = ""  # of the file
    files: Sequence[tuple[str, Sequence[str]]] = ()  # of each row: of its first image, and of the others


@dataclass(frozen=True)
class Album:
    images: Sequence[str]  # where each that is shown is from
    pictures: Sequence[Picture]


def write_pictures(folder: Path, album: Album) -> list[Path]:
    """The PNG files; returns where they are. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / picture.name for picture in album.pictures if picture.png]
    for path, png in zip(paths, (picture.png for picture in album.pictures if picture.png), strict=True):
        write_atomically(path, png)
    return paths


def write_album(folder: Path, album: Album) -> list[Path]:
    """Pictures and their index, instead of an album that was there before. Without an index there is none: what is interrupted
    mixes none of the two. Raises OSError."""
    before = read_album(folder)
    (folder / INDEX).unlink(missing_ok=True)
    paths = write_pictures(folder, album)
    entries = [
        {"title": picture.title, "note": picture.note, "file": picture.name if picture.png else "", "rows": picture.files}
        for picture in album.pictures
    ]
    for gone in {picture.name for picture in before.pictures} - {path.name for path in paths} if before else ():
        if gone:
            (folder / gone).unlink(missing_ok=True)
    write_atomically(folder / INDEX, json.dumps({"images": list(album.images), "pictures": entries}, indent=2) + "\n")
    return paths


def read_album(folder: Path) -> Album | None:
    """None where there is no index, or a damaged one. A file that is gone is an empty `png` with a name."""
    try:
        index = json.loads((folder / INDEX).read_text())
        pictures = [
            Picture(
                str(entry["title"]),
                str(entry["note"]),
                _data(folder, entry["file"]),
                entry["file"],
                [(str(first), [str(other) for other in others]) for first, others in entry["rows"]],
            )
            for entry in index["pictures"]
        ]
        return Album([str(name) for name in index["images"]], pictures)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _data(folder: Path, name: str) -> bytes:
    if name and Path(name).name != name:
        raise ValueError(f"{name} is not in this folder")
    path = folder / name
    return path.read_bytes() if name and path.is_file() else b""


def data_url(png: bytes) -> str:
    """Of the picture itself; a large one as JPEG, and no wider than WIDEST, or pages would have tens of megabytes. Empty where it
    is damaged, or so large that Pillow warns."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(png), formats=["PNG"])
        if len(png) <= LARGE and image.width <= WIDEST:
            return f"data:image/png;base64,{base64.b64encode(png).decode()}"
        plain = image.convert("RGB")  # of matplotlib's, which have an alpha channel
        plain.thumbnail((WIDEST, plain.height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        plain.save(buffer, "JPEG", quality=90, subsampling=0)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        return ""
