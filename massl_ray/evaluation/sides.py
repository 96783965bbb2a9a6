"""Train and test images of an evaluation."""

import numpy as np

from massl_ray.data.listing import Listing
from massl_ray.data.sources import hold_out, open_source
from massl_ray.errors import UserError


def open_sides(source: str, test_source: str | None, cache_gb: float, limit: int | None) -> tuple[Listing, Listing]:
    """Train images, and test images: those of `test_source`, the demo's own, or a tenth that is held out, the same one always.

    Args:
        limit: at most this many images each side, evenly spaced.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    train = open_source(source, cache_gb=cache_gb)
    if test_source:
        try:
            test = open_source(test_source, "test", cache_gb)
        except UserError as error:
            raise UserError(str(error).replace("data.source", "data.test_source", 1)) from None
    elif source == "demo":
        test = open_source("demo", "test")
    else:
        train, test = hold_out(train)
        if not len(train) or not len(test):
            raise UserError(
                f"{source} has {len(train) + len(test)} images, too few to hold out a tenth for test: give more, or --test SOURCE."
            )
    return _at_most(train, limit), _at_most(test, limit)


def _at_most(images: Listing, limit: int | None) -> Listing:
    if limit is None or len(images) <= limit:
        return images
    return images.take(np.linspace(0, len(images) - 1, limit).astype(np.int64))
