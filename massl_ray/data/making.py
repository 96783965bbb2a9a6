"""From a place in the run to the views that are due there. Without torch, so that a task starts in a second."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import cv2
import numpy as np

from massl_ray.config import Config, ViewsSection
from massl_ray.data.decode import UNREADABLE, Decoding, Encoded, reason
from massl_ray.data.listing import Listing
from massl_ray.data.order import samples_at
from massl_ray.method.resampling import Pyramid
from massl_ray.method.views import apply_views, draw_views, smallest_shrinkage

T = TypeVar("T")
Pair = tuple[np.ndarray, np.ndarray]


class ViewMaker:
    """From row numbers to the views of one worker's share of each step, or where `views.device` makes them there, to what they
    are made of.

    Args:
        batch_size: images a step, over all workers.
        start_step: of row 0.
        first, share: the worker's images are [first, first + share) of every batch.
    """

    def __init__(self, images: Listing, config: Config, batch_size: int, start_step: int, first: int, share: int):
        self.images, self.config = images, config
        self.batch_size, self.start_step, self.first, self.share = batch_size, start_step, first, share

    def later(self, steps: int) -> "ViewMaker":
        """Whose row 0 is so many steps further on."""
        return ViewMaker(self.images, self.config, self.batch_size, self.start_step + steps, self.first, self.share)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`rows["id"]` (n,) to columns of n rows, and `skipped`: what was passed over for each, as "path: reason" separated by
        NUL, which no path has. The columns are global_views (n, 2, H, W, C) and local_views (n, V-2, h, w, C), uint8, or with
        views.device cuda those of `_decoded`."""
        cv2.setNumThreads(1)  # tasks share out the CPUs, not their loops
        step, place = np.divmod(rows["id"], self.share)
        positions = (step + self.start_step) * self.batch_size + self.first + place
        epochs, samples = samples_at(positions, len(self.images), self.config.run.seed, self.images.windows)
        make = self._views if self.config.views.device == "cpu" else self._decoded
        made, skipped = [], []
        for epoch, sample in zip(epochs.tolist(), samples.tolist(), strict=True):
            columns, passed_over = first_readable(self.images, sample, partial(make, epoch, sample))
            made.append(columns)
            skipped.append("\0".join(passed_over))
        return {name: column([columns[name] for columns in made]) for name in made[0]} | {"skipped": np.array(skipped)}

    def _views(self, epoch: int, sample: int, data: bytes) -> dict[str, Any]:
        key = {"seed": self.config.run.seed, "epoch": epoch, "sample": sample}
        encoded = Encoded(data, Decoding.of(self.config.data))
        global_views, local_views = views_of(encoded, self.config.views, **key)
        return {"global_views": global_views, "local_views": local_views}

    def _decoded(self, epoch: int, sample: int, data: bytes) -> dict[str, Any]:
        """An image as small as its views allow, and what its views are drawn from."""
        encoded = Encoded(data, Decoding.of(self.config.data))
        drawn = draw_views(self.config.views, *encoded.size, seed=self.config.run.seed, epoch=epoch, sample=sample)
        pixels, shrunk = encoded.pixels(smallest_shrinkage(drawn))
        facts = {"shape": pixels.shape, "shrunk": shrunk, "size": encoded.size, "epoch": epoch, "sample": sample}
        return {"pixels": pixels.tobytes()} | facts


def column(values: list[Any]) -> np.ndarray:
    """Rows of bytes stay apart, everything else is stacked."""
    return np.array(values, dtype=object if isinstance(values[0], bytes) else None)


def views_of(encoded: Encoded, config: ViewsSection, *, seed: int, epoch: int, sample: int) -> Pair:
    """Views as `make_views` makes them, of an image that is decoded no larger than they need. They are drawn for its full
    size, so that the draws do not depend on how it is decoded."""
    drawn = draw_views(config, *encoded.size, seed=seed, epoch=epoch, sample=sample)
    return apply_views(Pyramid(*encoded.pixels(smallest_shrinkage(drawn))), drawn, config)


def first_readable(images: Listing, sample: int, use: Callable[[bytes], T]) -> tuple[T, list[str]]:
    """What `use` makes of the image at `sample`, or where that raises one of UNREADABLE of the next one of the listing: a rule
    that depends on the images only. Also returns what was passed over, as "path: reason"."""
    skipped: list[str] = []
    for offset in range(len(images)):
        place = (sample + offset) % len(images)
        try:
            return use(images.read(place)), skipped
        except UNREADABLE as error:
            skipped.append(f"{images.path(place)}: {reason(error)}")
    raise ValueError(f"none of the {len(images)} images in {images.root} can be read any more")
