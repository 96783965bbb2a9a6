"""Pictures of a whole source's embeddings: nearest neighbours, and the map."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize

from massl_ray.data.decode import Decoding, Encoded
from massl_ray.data.listing import Listing
from massl_ray.evaluation.features import Features, decoded
from massl_ray.evaluation.landscape import NEAR, landscape
from massl_ray.evaluation.neighbours import nearest_neighbours
from massl_ray.evaluation.subjects import Subject
from massl_ray.reporting.gallery import Gallery
from massl_ray.reporting.panels import GREEN, Tile, photo, sheet
from massl_ray.reporting.pictures import png_bytes
from massl_ray.reporting.plane import NAMED, draw_map

THUMB = 48  # pixels


@dataclass(frozen=True)
class Surroundings:
    features: Features
    pixels: Sequence[np.ndarray]  # (THUMB, THUMB, 3) uint8 of the same images
    listing: Listing


def look_around(subject: Subject, listing: Listing, how: Decoding) -> Surroundings:
    """Features of a listing's readable images, in the view that evaluation takes, with thumbnails."""
    device = next(iter(subject.backbone.parameters()), torch.empty(0)).device
    rows, samples, thumbs = [torch.empty(0, 0)], [torch.empty(0, dtype=torch.long)], []
    for numbers, views in decoded(listing, subject.view, how):
        rows.append(subject.embedded(views.to(device)).cpu())
        samples.append(numbers)
        thumbs += [photo(view, THUMB) for view in views.numpy()]
    places = torch.cat(samples)
    labels = None if listing.labels is None else torch.from_numpy(listing.labels)[places]
    return Surroundings(Features(torch.cat(rows[1:] or rows), places, labels), thumbs, listing)


def draw_neighbours(
    gallery: Gallery, subject: Subject, slug: str, around: Surroundings, how: Decoding, *, queries: int = 6
) -> None:
    listing, found = around.listing, nearest_neighbours(around.features, around.listing, queries=queries)

    def tile(entry: dict, query: dict | None = None) -> Tile:
        pixels = subject.view(Encoded(listing.read(entry["sample"]), how).pixels()[0])
        same = query is not None and entry["class"] is not None and entry["class"] == query["class"]
        caption = f"{_distance(entry['similarity'])}  {entry['class'] or ''}" if query else entry["class"] or "query"
        return Tile(photo(pixels), caption, GREEN if same else None)

    title = f"Nearest neighbours: {subject.name}"
    if not found or not found[0]["neighbours"]:
        gallery.add(title, "There are fewer than two readable images.")
        return
    rows = [[tile(query), *(tile(near, query) for near in query["neighbours"])] for query in found]
    titles = ["query", *(f"nearest {number}" for number in range(1, len(rows[0])))]
    classes = "" if around.features.labels is None else _classes(found, around.features.labels, listing.classes)
    note = (
        f"Images, evenly spaced through {len(around.features.rows):,} of the source, and those nearest to them, with their "
        f"distances: 1 minus the cosine similarity of pooled features. Any two images are {1 - _any_two(around.features):.2g} "
        f"apart on average; only what is well below that says something.{classes}"
    )
    files = [(query["path"], [near["path"] for near in query["neighbours"]]) for query in found]
    gallery.add(title, note, png_bytes(sheet(rows, (), titles)), f"neighbours_{slug}.png", files)


def draw_landscape(gallery: Gallery, subject: Subject, slug: str, around: Surroundings, *, thumbnails: bool) -> None:
    title, rows = f"Map of the embeddings: {subject.name}", around.features.rows
    try:
        made = landscape(rows.numpy())
    except ValueError as error:
        gallery.add(title, f"{str(error).capitalize()}.")
        return
    labels = None if around.features.labels is None else around.features.labels.numpy()
    kept = f" {made.kept:.0%} of each image's {NEAR} nearest images are among its {NEAR} nearest points." if made.kept else ""
    few = "" if len(around.listing.classes) <= NAMED else f" The {NAMED - 1} largest classes have colours of their own."
    note = (
        f"{len(rows):,} images by t-SNE (perplexity {made.perplexity:.0f}) of the pooled features' first principal components. "
        "What is close together on the map is mostly similar; the distances between groups, their sizes and the axes mean nothing, "
        f"and groups appear in any data.{kept}{few}"
    )
    if thumbnails:
        note += " Images lie on a lattice, in each cell with points that of the point nearest to its middle."
    png = draw_map(made.points, labels, around.listing.classes, around.pixels if thumbnails else None)
    gallery.add(title, note, png, f"map_{slug}.png")


def _distance(similarity: float) -> str:
    distance = max(0.0, 1 - similarity)
    return f"{distance:.4f}" if distance < 0.01 else f"{distance:.3f}"


def _any_two(features: Features) -> float:
    rows = normalize(features.rows.double(), dim=1)
    n = len(rows)
    return float((rows.sum(0).square().sum() - n) / (n * (n - 1)))


def _classes(found: Sequence[dict], labels: torch.Tensor, classes: Sequence[str]) -> str:
    """How many neighbours have their query's class, and how many images chosen at random would."""
    near = [other["class"] == query["class"] for query in found for other in query["neighbours"]]
    counts = dict(zip(classes, torch.bincount(labels, minlength=len(classes)).tolist(), strict=True))
    chance = np.mean([(counts[query["class"]] - 1) / (len(labels) - 1) for query in found])
    return (
        f" Classes were not used; green frames mark the query's: {sum(near)} of {len(near)}, where images chosen at random would "
        f"be {chance * len(near):.0f}."
    )
