"""From a place in the run to the views that are due there. Without torch, so that a task starts in a second."""

import numpy as np
from PIL import Image

from massl_ray.config import ViewsSection
from massl_ray.data.decode import UNREADABLE, decode, reason
from massl_ray.data.listing import Listing
from massl_ray.data.order import samples_at
from massl_ray.method.views import make_views


class ViewMaker:
    """From row numbers to the views of one worker's share of each step.

    Args:
        batch_size: images a step, over all workers.
        start_step: of row 0.
        first, share: the worker's images are [first, first + share) of every batch.
    """

    def __init__(self, images: Listing, config: ViewsSection, seed: int, batch_size: int, start_step: int, first: int, share: int):
        self.images, self.config, self.seed = images, config, seed
        self.batch_size, self.start_step, self.first, self.share = batch_size, start_step, first, share

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`rows["id"]` (n,) to global_views (n, 2, H, W, 3), local_views (n, V-2, h, w, 3), uint8, and skipped (n,): what was
        passed over for each, as "path: reason" separated by NUL, which no path has."""
        step, place = np.divmod(rows["id"], self.share)
        positions = (step + self.start_step) * self.batch_size + self.first + place
        epochs, samples = samples_at(positions, len(self.images), self.seed, self.images.windows)
        made = [self._views(int(epoch), int(sample)) for epoch, sample in zip(epochs, samples, strict=True)]
        return {
            "global_views": np.stack([global_views for global_views, _, _ in made]),
            "local_views": np.stack([local_views for _, local_views, _ in made]),
            "skipped": np.array(["\0".join(skipped) for _, _, skipped in made]),
        }

    def _views(self, epoch: int, sample: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        image, skipped = read_or_next(self.images, sample)
        global_views, local_views = make_views(image, self.config, seed=self.seed, epoch=epoch, sample=sample)
        return global_views, local_views, skipped


def read_or_next(images: Listing, sample: int) -> tuple[Image.Image, list[str]]:
    """The image at `sample`, or where it cannot be read the next readable one of the listing: a rule that depends on the
    images only. Also returns what was passed over, as "path: reason"."""
    skipped: list[str] = []
    for offset in range(len(images)):
        place = (sample + offset) % len(images)
        try:
            return decode(images.read(place)), skipped
        except UNREADABLE as error:
            skipped.append(f"{images.path(place)}: {reason(error)}")
    raise ValueError(f"none of the {len(images)} images in {images.root} can be read any more")
