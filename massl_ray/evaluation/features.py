"""Frozen features of a listing's images."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from massl_ray.config import Config, DataSection
from massl_ray.data.decode import UNREADABLE, Decoding, Encoded
from massl_ray.data.listing import Listing
from massl_ray.method.resampling import resized
from massl_ray.method.views import center_view

CHUNK = 256  # images decoded and embedded at once


@dataclass(frozen=True)
class Features:
    rows: Tensor  # (n, D) float32 on the CPU
    samples: Tensor  # (n,) places in the listing; unreadable images are left out
    labels: Tensor | None  # (n,)


def backbone_features(backbone: nn.Module, listing: Listing, config: Config, device: torch.device) -> Features:
    """Pooled features of centre views, with the backbone in evaluation mode and as it was afterwards."""
    mean, std = config.data.mean, config.data.std
    size, share = config.views.global_size, config.eval.crop
    was_training = backbone.training
    backbone.eval()
    rows, samples = [], []
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16"),
        ):
            for numbers, pixels in decoded(listing, lambda image: center_view(image, size, share), Decoding.of(config.data)):
                rows.append(backbone(normalized(pixels.to(device), mean, std)).float().cpu())
                samples.append(numbers)
    finally:
        backbone.train(was_training)
    return _features(listing, rows, samples)


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(n, H, W, C) uint8 -> (n, C, H, W) float32 on the same device, by each channel's mean and deviation in 0..1."""
    middle, spread = (torch.tensor(tuple(values), device=pixels.device) * 255 for values in (mean, std))
    return ((pixels.float() - middle) / spread).permute(0, 3, 1, 2)


def pixel_features(listing: Listing, data: DataSection, side: int = 32) -> Features:
    """The images themselves, shrunk to side x side pixels: what any backbone has to beat."""

    chunks = decoded(listing, lambda image: resized(image, side), Decoding.of(data))
    parts = [(pixels.flatten(1).float(), numbers) for numbers, pixels in chunks]
    return _features(listing, [rows for rows, _ in parts], [numbers for _, numbers in parts])


def _features(listing: Listing, rows: list[Tensor], samples: list[Tensor]) -> Features:
    if not rows:
        rows, samples = [torch.empty(0, 0)], [torch.empty(0, dtype=torch.long)]
    places = torch.cat(samples)
    labels = None if listing.labels is None else torch.from_numpy(listing.labels)[places]
    return Features(torch.cat(rows), places, labels)


def decoded(listing: Listing, view: Callable[[np.ndarray], np.ndarray], how: Decoding) -> Iterator[tuple[Tensor, Tensor]]:
    """Places (n,) and pixels (n, H, W, C) uint8 of the readable images, a chunk at a time, decoded by a few threads."""

    def load(sample: int) -> np.ndarray | None:
        try:
            return view(Encoded(listing.read(sample), how).pixels()[0])
        except UNREADABLE:
            return None

    with ThreadPoolExecutor(4) as pool:
        for first in range(0, len(listing), CHUNK):
            numbers = range(first, min(first + CHUNK, len(listing)))
            loaded = [
                (number, pixels) for number, pixels in zip(numbers, pool.map(load, numbers), strict=True) if pixels is not None
            ]
            if loaded:
                yield (
                    torch.tensor([number for number, _ in loaded]),
                    torch.from_numpy(np.stack([pixels for _, pixels in loaded])),
                )
