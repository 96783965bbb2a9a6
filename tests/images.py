"""Images to test with, drawn on the spot."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ramps", "spots", "stripes")

TINY = (
    "--config /dev/null --model.backbone test_vit --model.drop_path 0.1 --views.global_size 32 --views.local_size 16 "
    "--views.num_local 2 --head.hidden_dim 32 --head.dim 16 --memory.size 64 --memory.num_blocks 2 --train.global_batch_size 8 "
    "--train.micro_batch_size 2 --train.precision fp32 --train.checkpoint_every 4 --train.log_every 2 --eval.knn_every 0 "
    "--monitor.min_spread 0 --monitor.min_kl 0"
).split()
"""Flags of a run that takes milliseconds a step."""


def write_images(folder: Path, number: int, side: int = 40) -> Path:
    """Write `number` PNG files of `side` pixels under one folder a class; returns `folder`."""
    random = np.random.default_rng(0)
    for index in range(number):
        kind = CLASSES[index % 3]
        y, x = np.mgrid[0:side, 0:side] / side
        phase, tint = random.random(), random.random(3)
        pattern = {
            "ramps": x * phase + y * (1 - phase),
            "spots": (np.sin(20 * x + phase * 6) * np.sin(20 * y) > 0.3).astype(float),
            "stripes": np.sin(30 * x + phase * 6) * 0.5 + 0.5,
        }[kind]
        pixels = np.clip((pattern[..., None] * (0.5 + tint / 2) + random.normal(0, 0.05, (side, side, 3))) * 255, 0, 255)
        path = folder / kind / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder
