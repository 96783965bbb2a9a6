"""Nearest neighbours of a few images: the quickest look at what a backbone takes for alike."""

from typing import Any

import torch
from torch.nn.functional import normalize

from massl_ray.data.listing import Listing
from massl_ray.evaluation.features import Features


def nearest_neighbours(features: Features, listing: Listing, *, queries: int = 8, neighbours: int = 6) -> list[dict[str, Any]]:
    """For evenly spaced query images the most similar other ones: their places in the listing, paths, classes and cosine
    similarities."""
    rows = normalize(features.rows, dim=1)
    places = torch.linspace(0, len(rows) - 1, min(queries, len(rows))).round().long().unique()
    similarity = rows[places] @ rows.T
    similarity[torch.arange(len(places)), places] = -2.0  # not itself
    values, nearest = similarity.topk(max(0, min(neighbours, len(rows) - 1)), dim=1)

    def entry(place: int) -> dict[str, Any]:
        sample = int(features.samples[place])
        label = None if listing.labels is None else listing.classes[int(listing.labels[sample])]
        return {"sample": sample, "path": listing.path(sample), "class": label}

    return [
        {
            **entry(int(place)),
            "neighbours": [{**entry(int(other)), "similarity": float(value)} for other, value in zip(near, row, strict=True)],
        }
        for place, near, row in zip(places, nearest, values, strict=True)
    ]
