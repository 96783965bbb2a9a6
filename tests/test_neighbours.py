"""Nearest neighbours: which images are asked about and which are found, against a plain loop."""

import numpy as np
import pytest
import torch

from massl_ray.data.listing import Listing
from massl_ray.evaluation.features import Features
from massl_ray.evaluation.neighbours import nearest_neighbours
from tests.helpers import listed


def images(size: int, labelled: bool = True) -> Listing:
    labels = np.arange(size) % 3 if labelled else None
    return listed("/images", (f"{index}.png" for index in range(size)), labels, ("a", "b", "c") if labelled else ())


def random_features(listing: Listing, samples: list[int], dims: int = 6) -> Features:
    rows = torch.randn(len(samples), dims, generator=torch.Generator().manual_seed(len(samples))) * 5
    places = torch.tensor(samples, dtype=torch.long)
    return Features(rows, places, None if listing.labels is None else torch.from_numpy(listing.labels)[places])


def test_agrees_with_a_plain_loop():
    listing = images(40)
    samples = [index for index in range(40) if index % 7]  # some could not be read
    features = random_features(listing, samples)
    found = nearest_neighbours(features, listing, queries=5, neighbours=4)
    rows = features.rows.double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    size = len(samples)
    places = [round(index * (size - 1) / 4) for index in range(5)]
    assert [query["path"] for query in found] == [f"/images/{samples[place]}.png" for place in places]
    for query, place in zip(found, places, strict=True):
        assert query["class"] == "abc"[samples[place] % 3]
        others = sorted((other for other in range(size) if other != place), key=lambda other: -rows[other] @ rows[place])[:4]
        assert [near["path"] for near in query["neighbours"]] == [f"/images/{samples[other]}.png" for other in others]
        assert [near["class"] for near in query["neighbours"]] == ["abc"[samples[other] % 3] for other in others]
        for near, other in zip(query["neighbours"], others, strict=True):
            assert near["similarity"] == pytest.approx(rows[other] @ rows[place], abs=1e-5)


def test_by_hand():
    rows = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0], [0.0, 5.0]])
    found = nearest_neighbours(Features(rows, torch.arange(4), None), images(4, labelled=False), queries=1, neighbours=3)
    assert len(found) == 1 and found[0]["path"] == "/images/0.png" and found[0]["class"] is None
    assert [near["path"] for near in found[0]["neighbours"]] == ["/images/1.png", "/images/3.png", "/images/2.png"]
    assert [near["similarity"] for near in found[0]["neighbours"]] == pytest.approx([0.6, 0.0, -1.0])


def test_no_image_is_its_own_neighbour_but_its_copy_is():
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, -1.0]])
    for query in nearest_neighbours(Features(rows, torch.arange(3), None), images(3, labelled=False), queries=3, neighbours=9):
        assert query["path"] not in [near["path"] for near in query["neighbours"]] and len(query["neighbours"]) == 2
        if query["path"] != "/images/2.png":
            assert query["neighbours"][0]["similarity"] == pytest.approx(1.0)


@pytest.mark.parametrize(("size", "asked"), [(0, 0), (1, 1), (2, 2), (7, 7), (8, 8), (9, 8), (500, 8)])
def test_few_images_give_few_questions(size, asked):
    listing = images(size)
    found = nearest_neighbours(random_features(listing, list(range(size))), listing)
    assert len(found) == len({query["path"] for query in found}) == asked
    assert all(len(query["neighbours"]) == min(6, size - 1) for query in found)


def test_nothing_could_be_read():
    empty = Features(torch.empty(0, 0), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
    assert nearest_neighbours(empty, images(5)) == []
