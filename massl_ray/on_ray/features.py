"""Features over the whole cluster: Ray Data maps parts of a listing through a pool of actors that hold the backbone."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch

from massl_ray.data.decode import Decoding
from massl_ray.data.listing import Listing
from massl_ray.evaluation.features import decoded
from massl_ray.evaluation.split_features import Rows
from massl_ray.evaluation.subjects import Subject

PART = 512  # images that are embedded at once, and come back together


class Embedder:
    """An actor: holds the backbone on its device and maps numbers of parts to features."""

    def __init__(self, subject: Any, listing: Any, how: Decoding, size: int):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        held: Any = ray.get([subject, listing])
        self.subject: Subject = held[0].to(self.device)
        self.listing: Listing = held[1]
        self.how, self.size = how, size

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (part,) = batch["id"].tolist()
        wanted = range(part * self.size, min((part + 1) * self.size, len(self.listing)))
        places, rows = [], []
        for numbers, views in decoded(self.listing, self.subject.view, self.how, wanted):
            places.append(numbers.numpy())
            rows.append(self.subject.embedded(views.to(self.device)).cpu().numpy())
        found = (np.concatenate(places), np.concatenate(rows)) if rows else (np.empty(0, np.int64), np.empty((0, 0), np.float32))
        return {"images": np.array([len(wanted)])} | {
            name: np.array([values.tobytes()], dtype=object) for name, values in zip(("places", "rows"), found, strict=True)
        }


def over_cluster(subject: Subject, listing: Listing, how: Decoding, size: int = PART) -> Iterator[tuple[int, Rows]]:
    """Parts of `size` images of the listing in order, each with its number of images. Needs a cluster."""
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    parts = -(-len(listing) // size)
    workers = max(1, min(parts, gpus or cpus - 1))  # a CPU is left for the rest
    held = ray.put(subject.to(torch.device("cpu"))), ray.put(listing)
    made = ray.data.range(parts, override_num_blocks=parts).map_batches(
        Embedder,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=(*held, how, size),
        batch_size=1,
        num_gpus=1 if gpus else 0,
        num_cpus=0 if gpus or cpus < 2 else 1,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    for row in made.iter_rows():
        places = np.frombuffer(row["places"], np.int64)
        yield int(row["images"]), (places, np.frombuffer(row["rows"], np.float32).reshape(len(places), -1 if len(places) else 0))
