"""python docs/crops.py DIR: 1,350 crops of 128 px, cut from 15 photographs that come with scikit-image and scikit-learn."""

import sys
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

FROM = {
    "skimage/data": "astronaut.png cell.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png motorcycle_left.png retina.jpg "
    "rocket.jpg brick.png grass.png gravel.png coins.png",
    "sklearn/datasets/images": "china.jpg flower.jpg",
}

for folder, names in FROM.items():
    package, _, inside = folder.partition("/")
    for name in names.split():
        picture = Image.open(Path(find_spec(package).origin).parent / inside / name).convert("RGB")
        target = Path(sys.argv[1]) / Path(name).stem
        target.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(crc32(Path(name).stem.encode()))
        for crop in range(90):
            side = int(min(picture.size) * random.uniform(0.35, 0.75))
            x, y = (int(random.integers(0, whole - side + 1)) for whole in picture.size)
            cut = picture.crop((x, y, x + side, y + side))
            cut.resize((128, 128), Image.Resampling.LANCZOS).save(target / f"{crop:03d}.png")
