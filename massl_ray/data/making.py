"""From a place in the run to the views that are due there. Without torch, so that a task starts in a second."""

from collections.abc import Callable
from typing import TypeVar

import cv2
import numpy as np

from massl_ray.config import Config, ViewsSection
from massl_ray.data.decode import UNREADABLE, Encoded, reason
from massl_ray.data.order import samples_at
from massl_ray.data.sources import Listing
from massl_ray.method.resampling import Pyramid
from massl_ray.method.views import apply_views, draw_views, smallest_shrinkage

T = TypeVar("T")
Pair = tuple[np.ndarray, np.ndarray]


class ViewMaker:
    """From row numbers to the views of one worker's share of each step.

    Args:
        batch_size: images a step, over all workers.
        start_step: of row 0.
        first, share: the worker's images are [first, first + share) of every batch.
    """

    def __init__(self, images: Listing, config: Config, batch_size: int, start_step: int, first: int, share: int):
        self.images, self.config = images, config
        self.batch_size, self.start_step, self.first, self.share = batch_size, start_step, first, share

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`rows["id"]` (n,) to global_views (n, 2, H, W, 3), local_views (n, V-2, h, w, 3), uint8, and skipped (n,): what was
        passed over for each, as "path: reason" separated by NUL, which no path has."""
        cv2.setNumThreads(1)  # tasks share out the CPUs, not their loops
        step, place = np.divmod(rows["id"], self.share)
        positions = (step + self.start_step) * self.batch_size + self.first + place
        epochs, samples = samples_at(positions, len(self.images), self.config.run.seed)
        made = [self._views(int(epoch), int(sample)) for epoch, sample in zip(epochs, samples, strict=True)]
        return {
            "global_views": np.stack([global_views for global_views, _, _ in made]),
            "local_views": np.stack([local_views for _, local_views, _ in made]),
            "skipped": np.array(["\0".join(skipped) for _, _, skipped in made]),
        }

    def _views(self, epoch: int, sample: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        def make(data: bytes) -> Pair:
            encoded = Encoded(data, self.config.data.max_pixels)
            return views_of(encoded, self.config.views, seed=self.config.run.seed, epoch=epoch, sample=sample)

        (global_views, local_views), skipped = first_readable(self.images, sample, make)
        return global_views, local_views, skipped


def views_of(encoded: Encoded, config: ViewsSection, *, seed: int, epoch: int, sample: int) -> Pair:
    """Views as `make_views` makes them, of an image that is decoded no larger than they need. They are drawn for its full
    size, so that the draws do not depend on how it is decoded."""
    drawn = draw_views(config, *encoded.size, seed=seed, epoch=epoch, sample=sample)
    return apply_views(Pyramid(*encoded.pixels(smallest_shrinkage(drawn))), drawn, config)


def first_readable(images: Listing, sample: int, use: Callable[[bytes], T]) -> tuple[T, list[str]]:
    """What `use` makes of the image at `sample`, or where that raises one of UNREADABLE of the next one of the listing: a rule
    that depends on the files only. Also returns what was passed over, as "path: reason"."""
    skipped: list[str] = []
    for offset in range(len(images)):
        path = images.path((sample + offset) % len(images))
        try:
            with open(path, "rb") as file:
                return use(file.read()), skipped
        except UNREADABLE as error:
            skipped.append(f"{path}: {reason(error)}")
    raise ValueError(f"none of the {len(images)} images in {images.root} can be read any more")
