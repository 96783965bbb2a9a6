"""Correspondences: an image with itself, mirrored, and cut twice."""

import numpy as np
import pytest

from massl_ray.evaluation.correspondence import (
    any_two_px,
    centres,
    correspondences,
    errors_px,
    in_image,
    patch_px,
    two_views,
)
from massl_ray.method.resampling import resized
from tests.helpers import photograph, smooth


def tokens(height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(height, width, 16))


def test_an_image_with_itself_is_the_identity():
    found = correspondences(tokens(), tokens(), best=1000)
    assert len(found) == 48
    assert (found.left == found.right).all() and found.similarity == pytest.approx(np.ones(48))
    assert len(np.unique(found.left, axis=0)) == 48


def test_mirrored_tokens_are_found_in_mirrored_places():
    found = correspondences(tokens(), 3 * tokens()[:, ::-1], best=1000)
    assert len(found) == 48
    np.testing.assert_allclose(found.right[:, 0], 1 - found.left[:, 0])
    np.testing.assert_allclose(found.right[:, 1], found.left[:, 1])


def test_only_mutual_ones_and_the_best_of_them_first():
    left = np.array([[[1.0, 0], [1, 0.1], [0, 1]]])
    right = np.array([[[1.0, 0.02], [0.1, 1], [-1, 0]]])
    found = correspondences(left, right)
    assert found.left[:, 0].tolist() == pytest.approx([1 / 6, 5 / 6])
    assert found.right[:, 0].tolist() == pytest.approx([1 / 6, 1 / 2])
    assert found.similarity[0] > found.similarity[1]
    assert len(correspondences(left, right, best=1)) == 1
    assert len(correspondences(np.zeros((2, 2, 3)), np.zeros((2, 2, 3)))) <= 1  # nothing to tell apart


def test_where_a_view_was_cut_from():
    """The pixels at a point of a view are those of the image where `in_image` says: colour ramps name their place."""
    image = smooth(200, 160)
    for sample in range(8):
        pair = two_views(image, 64, sample=sample)
        for view in pair.views:
            x, y = in_image(centres((8, 8)), view).T
            cut = resized(image, 64, view.box)[:, ::-1] if view.flip else resized(image, 64, view.box)
            at = cut.reshape(8, 8, 8, 8, 3).mean((1, 3)).reshape(64, 3)
            np.testing.assert_allclose(at[:, 0], 255 * (x - 0.5) / 199, atol=3)
            np.testing.assert_allclose(at[:, 1], 255 * (y - 0.5) / 159, atol=3)
    assert {view.flip for sample in range(8) for view in two_views(image, 32, sample=sample).views} == {True, False}


def test_errors_are_small_for_tokens_that_know_their_place_and_large_for_others():
    image = np.asarray(photograph(200, 160))
    pair = two_views(image, 64, sample=2)
    known = []
    for view in pair.views:  # tokens that say where they are from, on a circle for each axis
        angles = in_image(centres((8, 8)), view) / 200 * np.pi
        known.append(np.concatenate([np.cos(angles), np.sin(angles)], 1).reshape(8, 8, 4))
    good = errors_px(correspondences(*known), pair)
    random = any_two_px((8, 8), pair)
    patch, chance = patch_px((8, 8), pair), random.mean()
    assert random.shape == (64, 64)
    starts, ends = (in_image(centres((8, 8)), view) for view in pair.views)
    assert random[3, 50] == pytest.approx(np.hypot(*(starts[3] - ends[50])))
    assert 10 < patch < 26 and 40 < chance < 140
    assert np.median(good) < 0.75 * patch
    draws = np.random.default_rng(0)
    bad = errors_px(correspondences(draws.normal(size=(8, 8, 4)), draws.normal(size=(8, 8, 4))), pair)
    assert np.median(bad) > 2 * patch


def test_views_are_the_same_each_time_and_differ_by_image():
    image = np.asarray(photograph())
    assert two_views(image, 32, sample=1).views == two_views(image, 32, sample=1).views != two_views(image, 32, sample=2).views
    assert (two_views(image, 32).pixels[0] == two_views(image, 32).pixels[0]).all()
    assert two_views(image[..., :1], 32).pixels[0].shape == (32, 32, 1)
