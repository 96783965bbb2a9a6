"""The demo images: tiles of the photographs and micrographs that come with scikit-image and scikit-learn.

Each tile is gray and standardised, so that brightness and colour give no class away; a tile's class is the picture it was cut
from. Test tiles come from other parts of the picture than training tiles.
"""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from massl_ray.errors import UserError

TILE = 32  # pixels
BLOCK = 4  # tiles: a picture is a board of blocks of 4 x 4 tiles, and every third block is for test
FLAT = 4.0  # standard deviation, in gray levels, under which a tile shows nothing
VERSION = 1

PICTURES = {
    "skimage": "astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png "
    "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg text.png".split(),
    "sklearn": ["china.jpg", "flower.jpg"],
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def cache_folder() -> Path:
    """What this machine keeps between runs. MASSL_RAY_CACHE moves it from ~/.cache/massl-ray."""
    return Path(os.environ.get("MASSL_RAY_CACHE", "~/.cache/massl-ray")).expanduser()


def demo_folder(part: str) -> Path:
    """The folder of tiles, `train` or `test`, cut on first use."""
    folder = cache_folder() / f"demo-tiles-{VERSION}"
    if not folder.is_dir():
        _cut_all(folder)
    return folder / part


def cut_tiles(picture: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Cut a gray picture (H, W) float into standardised uint8 tiles, {'train': [...], 'test': [...]}, dropping near-flat ones."""
    tiles: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for row in range(picture.shape[0] // TILE):
        for column in range(picture.shape[1] // TILE):
            tile = picture[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            if tile.std() < FLAT:
                continue
            part = "test" if (row // BLOCK + column // BLOCK) % 3 == 2 else "train"
            standard = (tile - tile.mean()) / tile.std()
            tiles[part].append(np.clip(np.round(128 + 48 * standard), 0, 255).astype(np.uint8))
    return tiles


def _cut_all(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    sources = [_package_folder(package) / FOLDERS[package] / name for package, names in PICTURES.items() for name in names]
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.unfinished-"))
    for source in sources:
        picture = np.asarray(Image.open(source).convert("L"), dtype=np.float64)
        for part, tiles in cut_tiles(picture).items():
            target = unfinished / part / source.stem
            target.mkdir(parents=True)
            for number, tile in enumerate(tiles):
                Image.fromarray(tile).save(target / f"{number:04d}.png")
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            "The demo images come with scikit-image, which is not installed: pip install 'massl-ray[demo]', or "
            "give --data.source a folder."
        )
    return Path(spec.origin).parent
