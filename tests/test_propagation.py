"""Label propagation: made clips with known masks, a plain loop, and J and F by hand."""

import math
import weakref

import numpy as np
import pytest
import torch

from massl_ray.errors import UserError
from massl_ray.evaluation.propagation import Clip, Settings, boundary, boundary_f, jaccard, neighbourhood, propagate, segmentation

PATCH = 4


def moving(frames: int = 6, side: int = 16, noise: float = 0.05) -> Clip:
    """Two squares of 4 x 4 patches that move by a patch a frame over a background; each patch has its place's own feature."""
    random = np.random.default_rng(0)
    ground, textures = random.normal(size=(side, side, 24)), random.normal(size=(2, 4, 4, 24)) * 1.5
    features, masks = [], []
    for frame in range(frames):
        patches, labels = ground.copy(), np.zeros((side, side), dtype=int)
        for label, (top, left) in enumerate(((1 + frame, 2), (10, 1 + frame)), 1):
            patches[top : top + 4, left : left + 4] = textures[label - 1]
            labels[top : top + 4, left : left + 4] = label
        features.append(patches + noise * random.normal(size=patches.shape))
        masks.append(labels.repeat(PATCH, 0).repeat(PATCH, 1))
    return Clip(np.stack(features).astype(np.float32), np.stack(masks))


def test_squares_are_followed():
    clip = moving()
    result = segmentation([clip], Settings(temperature=0.02))
    assert result.figures["j"].value > 0.9 and result.figures["f"].value > 0.85
    assert result.figures["j_and_f"].value == pytest.approx((result.figures["j"].value + result.figures["f"].value) / 2)
    assert result.parameters["objects"] == 2
    still = np.broadcast_to(clip.masks[0], clip.masks.shape)
    assert np.mean([jaccard(still[t] == 1, clip.masks[t] == 1) for t in range(1, 5)]) < 0.5  # it took some following


def test_the_first_and_the_last_frame_count_not():
    clip = moving()
    found = propagate(clip.features, clip.masks[0])
    judged = [jaccard(found[t] == label, clip.masks[t] == label) for label in (1, 2) for t in range(1, 5)]
    clip.masks[-1] = 0
    assert segmentation([clip]).figures["j"].value == pytest.approx(np.mean(judged)) != 1


def test_many_objects():
    """More than the channels that images have."""
    mask = np.arange(64).reshape(8, 8)
    features = np.broadcast_to(np.eye(64).reshape(8, 8, 64), (3, 8, 8, 64)).astype(np.float32)
    assert (propagate(features, mask) == mask).all()


def test_features_that_say_nothing_follow_nothing():
    clip = moving()
    noise = np.random.default_rng(1).normal(size=clip.features.shape).astype(np.float32)
    assert segmentation([Clip(noise, clip.masks)]).figures["j"].value < 0.5


@pytest.mark.parametrize(("h", "w", "reach"), [(4, 3, 1), (9, 10, 3), (10, 9, 0)])  # within a tile, and over several
def test_agrees_with_a_plain_loop(h, w, reach):
    random = np.random.default_rng(0)
    features, mask = random.normal(size=(5, h, w, 2)).astype(np.float32), random.integers(0, 3, (h, w))
    mask[0, :3] = [0, 1, 2]
    found = propagate(features, mask, Settings(nearest=4, temperature=0.3, reach=reach, context=2))
    unit = features / np.linalg.norm(features, axis=3, keepdims=True)
    soft, far = [np.eye(3)[mask]], reach or max(h, w)
    for frame in range(1, 5):
        carried = np.zeros((h, w, 3))
        for y in range(h):
            for x in range(w):
                candidates = [
                    (math.exp(float(unit[frame, y, x] @ unit[source, b, a]) / 0.3), soft[source][b, a])
                    for source in {0} | {s for s in (frame - 1, frame - 2) if s >= 1}
                    for b in range(max(0, y - far), min(h, y + far + 1))
                    for a in range(max(0, x - far), min(w, x + far + 1))
                ]
                best = sorted(candidates, key=lambda pair: -pair[0])[:4]
                carried[y, x] = sum(weight * label for weight, label in best) / sum(weight for weight, _ in best)
        soft.append(carried)
        low, high = carried.min(axis=(0, 1)), carried.max(axis=(0, 1))
        assert (found[frame] == ((carried - low) / np.maximum(high - low, 1e-12)).argmax(axis=2)).all()


def test_frames_are_taken_one_by_one():
    """So that those of a long clip need not all be in memory."""
    clip, settings = moving(12), Settings(context=2)
    alive: list[weakref.ref] = []
    most = 0

    def frames():
        nonlocal most
        for frame in clip.features:
            rows = torch.from_numpy(frame).clone()
            alive.append(weakref.ref(rows))
            most = max(most, sum(ref() is not None for ref in alive))
            yield rows

    assert (propagate(frames(), clip.masks[0], settings) == propagate(clip.features, clip.masks[0], settings)).all()
    assert len(alive) == 12 and most <= 4


def test_neighbourhood():
    near = neighbourhood(torch.tensor([6, 14]), torch.arange(20), 5, 1)
    assert near[0].view(4, 5).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert near[1].view(4, 5).int().tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]


def square(top: int, left: int, size: int = 40, frame: int = 200) -> np.ndarray:
    mask = np.zeros((frame, frame), dtype=bool)
    mask[top : top + size, left : left + size] = True
    return mask


def test_jaccard_by_hand():
    assert jaccard(square(10, 10), square(10, 10)) == 1
    assert jaccard(square(10, 10), square(10, 30)) == pytest.approx(800 / 2400)
    assert jaccard(square(10, 10), square(100, 100)) == 0
    assert jaccard(square(0, 0, 0), square(0, 0, 0)) == 1


def test_boundary_by_hand():
    mask = np.zeros((5, 6), dtype=bool)
    mask[2:4, 2:4] = True
    assert boundary(mask).astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 0, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_boundary_f_by_hand():
    assert boundary_f(square(50, 50), square(50, 50)) == 1
    # the tolerance is 0.008 * 283 px = 2.3, rounded up to 3
    assert boundary_f(square(50, 53), square(50, 50)) == 1
    assert boundary_f(square(50, 54), square(50, 50)) < 1
    shifted = boundary_f(square(50, 60), square(50, 50))
    plain = near_share(boundary(square(50, 60)), boundary(square(50, 50)), 3)
    assert shifted == pytest.approx(plain) and 0.4 < shifted < 0.5
    assert boundary_f(square(0, 0, 0), square(0, 0, 0)) == 1
    assert boundary_f(square(0, 0, 0), square(50, 50)) == 0 == boundary_f(square(5, 5), square(100, 100))


def near_share(ours: np.ndarray, theirs: np.ndarray, near: int) -> float:
    """F by distances of all pairs of boundary pixels."""
    a, b = np.argwhere(ours), np.argwhere(theirs)
    apart = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1))
    precision, recall = (apart.min(axis=1) <= near).mean(), (apart.min(axis=0) <= near).mean()
    return 2 * precision * recall / (precision + recall)


def test_refused():
    clip = moving(3)
    with pytest.raises(UserError, match="goat: the mask of its first frame has no object"):
        segmentation([Clip(clip.features, clip.masks * 0, "goat")])
    with pytest.raises(UserError, match="goat: needs 3 frames or more"):
        segmentation([Clip(clip.features[:2], clip.masks[:2], "goat")])
    with pytest.raises(UserError, match="goat: has 3 masks and features of 2 frames"):
        segmentation([Clip(clip.features[:2], clip.masks, "goat")])
    with pytest.raises(UserError, match="no clip was given"):
        segmentation([])
