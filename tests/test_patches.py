"""Colours of patch tokens: principal components against scikit-learn's, signs, robust scaling, foreground."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from massl_ray.evaluation.patches import colours, components, foreground, otsu


def tokens(seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.normal(size=(2, 6, 6, 10)) * np.linspace(4, 1, 10)).astype(np.float32)


def test_agrees_with_scikit_learn_up_to_signs():
    made = components(tokens())
    reference = PCA(3, svd_solver="full").fit(tokens().reshape(-1, 10))
    expected = reference.transform(tokens().reshape(-1, 10))
    signs = np.sign((made.scores.reshape(-1, 3) * expected).sum(0))
    np.testing.assert_allclose(made.scores.reshape(-1, 3), expected * signs, atol=1e-4)
    np.testing.assert_allclose(made.shares, reference.explained_variance_ratio_, rtol=1e-5)


def test_signs_are_fixed_whatever_the_order_of_tokens():
    first = components(tokens()).scores
    again = components(tokens()[::-1, ::-1]).scores
    np.testing.assert_allclose(again[::-1, ::-1], first, atol=1e-8)
    axis = np.linalg.lstsq((tokens() - tokens().mean((0, 1, 2))).reshape(-1, 10), first.reshape(-1, 3), rcond=None)[0]
    assert all(axis[np.abs(axis[:, k]).argmax(), k] > 0 for k in range(3))
    assert (colours(components(tokens()).scores) == colours(first)).all()


def test_components_that_are_not_there_are_gray():
    flat = components(np.ones((1, 4, 4, 8), np.float32))
    assert not flat.scores.any() and not flat.shares.any() and (colours(flat.scores) == 128).all()
    line = np.zeros((1, 2, 4, 5), np.float32)
    line[..., 2] = np.arange(8).reshape(1, 2, 4)
    made = components(line)
    assert made.shares.tolist() == pytest.approx([1, 0, 0]) and (np.diff(made.scores[0, :, :, 0].ravel()) > 0).all()
    assert (colours(made.scores)[..., 1:] == 128).all()
    assert components(np.ones((1, 1, 1, 2), np.float32)).scores.shape == (1, 1, 1, 3)
    assert components(tokens()[..., :2]).scores[..., 2].any() == np.False_


def test_one_outlier_does_not_take_all_the_colours():
    scores = np.zeros((1, 20, 20, 3))
    scores[..., 0] = np.linspace(0, 1, 400).reshape(1, 20, 20)
    scores[0, 0, 0, 0] = 1000
    shown = colours(scores)[..., 0]
    assert shown[0, 0, 0] == 255 and 110 < shown[0, 10, 0] < 145 and np.percentile(shown, 90) > 200


def test_foreground_is_what_the_border_lacks_and_is_scaled_alone():
    disc = np.hypot(*(np.mgrid[0:12, 0:12] - 5.5)) < 3.5
    made = np.where(disc[None, :, :, None], 3.0, -1.0) * np.array([1.0, 0.2, 0])
    for sign in (1, -1):
        made_scores = components(sign * made.astype(np.float32)).scores
        assert (foreground(made_scores)[0] == disc).all()
    noise = np.random.default_rng(0).normal(size=(1, 12, 12, 3)) * 0.1
    mask = foreground(components(made + noise).scores)
    shown = colours(components(made + noise, mask=mask).scores, mask)
    assert (mask[0] == disc).all() and not shown[~mask].any() and np.ptp(shown[mask].astype(int), axis=0).min() > 200
    assert not colours(np.ones((1, 2, 2, 3)), np.zeros((1, 2, 2), bool)).any()


def test_otsu():
    assert 1 < otsu(np.array([0.0, 1, 0, 9, 10, 9])) < 9
    assert otsu(np.array([2.0, 2, 2])) == 2 and otsu(np.array([5.0])) == 5
