"""Video object segmentation: the first frame's mask carried through a clip by likeness of patch features.

As Caron et al., ICCV 2021 (DINO), do it for DAVIS 2017 after Jabri et al., NeurIPS 2020: each patch takes the mean mask of the 5
patches most like it, of the first frame and the 7 frames before it, within 12 patches up, down, left and right of its place,
weighted by exp(cosine similarity / 0.1). J and F as Perazzi et al., CVPR 2016, define them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from massl_ray.errors import UserError
from massl_ray.evaluation.bootstrap import jackknife_figure
from massl_ray.evaluation.checks import unit
from massl_ray.evaluation.results import Figure, Result

TOLERANCE = 0.008  # of the frame's diagonal


@dataclass(frozen=True)
class Clip:
    features: np.ndarray  # (T, h, w, D) of patches
    masks: np.ndarray  # (T, H, W) int: 0 is background, 1 to N are objects; the first is given, the others judge


def segmentation(clips: Sequence[Clip], *, nearest: int = 5, temperature: float = 0.1, reach: int = 12, context: int = 7) -> Result:
    """J&F, J and F: means over all objects of all clips, each a mean over its frames but for the first and the last, as DAVIS
    counts. Intervals are over objects."""
    regions, contours = [], []
    for number, clip in enumerate(clips):
        if clip.features.ndim != 4 or clip.masks.ndim != 3 or len(clip.features) != len(clip.masks) or len(clip.masks) < 3:
            raise UserError(f"clip {number}: needs 3 frames or more, features (T, h, w, D) and masks (T, H, W) of the same number")
        objects = [int(label) for label in np.unique(clip.masks[0]) if label > 0]
        if not objects:
            raise UserError(f"clip {number}: the mask of its first frame has no object")
        found = propagate(clip.features, clip.masks[0], nearest=nearest, temperature=temperature, reach=reach, context=context)
        for label in objects:
            judged = [(found[t] == label, clip.masks[t] == label) for t in range(1, len(found) - 1)]
            regions.append(np.mean([jaccard(*pair) for pair in judged]))
            contours.append(np.mean([boundary_f(*pair) for pair in judged]))
    if not regions:
        raise UserError("segmentation: no clip was given")
    region, contour = np.array(regions), np.array(contours)
    figures: dict[str, Figure] = {
        name: jackknife_figure(lambda places, scores=scores: float(scores[places].mean()), len(scores), most=1)
        for name, scores in (("j_and_f", (region + contour) / 2), ("j", region), ("f", contour))
    }
    parameters = {
        "nearest": nearest,
        "temperature": temperature,
        "reach_patches": reach,
        "context_frames": context,
        "boundary_tolerance": f"{TOLERANCE} of the diagonal",
        "frames": "all but the first and the last",
        "clips": len(clips),
        "objects": len(regions),
        "interval": "95 % of the jackknife over objects",
    }
    return Result("segmentation", figures, parameters)


def propagate(
    features: np.ndarray, mask: np.ndarray, *, nearest: int = 5, temperature: float = 0.1, reach: int = 12, context: int = 7
) -> np.ndarray:
    """(T, h, w, D) features and the first frame's mask (H, W), labels 0 to N -> masks (T, H, W). The patches' mask is that of their
    middle pixels; soft masks of patches are carried on and enlarged linearly, each label's stretched to 0 to 1."""
    frames, h, w, dims = features.shape
    rows = torch.from_numpy(unit(features.reshape(-1, dims))).view(frames, h * w, dims)
    labels = np.unique(mask)
    first = cv2.resize(mask.astype(np.int32), (w, h), interpolation=cv2.INTER_NEAREST_EXACT)
    soft = [torch.from_numpy((first.reshape(-1, 1) == labels).astype(np.float32))]  # each (h w, labels)
    near, found = neighbourhood(h, w, reach), [mask]
    for frame in range(1, frames):
        sources = [0, *range(max(1, frame - context), frame)]
        soft.append(
            _carried(rows[frame], rows[sources], torch.stack([soft[source] for source in sources]), near, nearest, temperature)
        )
        found.append(labels[_enlarged(soft[-1].view(h, w, -1).numpy(), mask.shape).argmax(axis=2)])
    return np.stack(found)


def neighbourhood(h: int, w: int, reach: int) -> Tensor:
    """(h w, h w) bool: which patches are at most `reach` away in both directions; 0 is no limit."""
    rows, columns = torch.arange(h * w) // w, torch.arange(h * w) % w
    if reach <= 0:
        return torch.ones(h * w, h * w, dtype=torch.bool)
    return ((rows[:, None] - rows).abs() <= reach) & ((columns[:, None] - columns).abs() <= reach)


def _carried(target: Tensor, sources: Tensor, soft: Tensor, near: Tensor, nearest: int, temperature: float) -> Tensor:
    """Patches (p, D) from patches (s, p, D) with soft masks (s, p, labels) -> (p, labels)."""
    carried, flat = [], soft.flatten(0, 1)
    for part, allowed in zip(target.split(256), near.split(256), strict=True):
        close = torch.einsum("pd,sqd->psq", part, sources).masked_fill(~allowed[:, None], -torch.inf).flatten(1)
        values, places = close.topk(min(nearest, close.shape[1]), dim=1)
        carried.append(((values / temperature).softmax(1)[:, :, None] * flat[places]).sum(1))
    return torch.cat(carried)


def _enlarged(soft: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(h, w, labels) -> (H, W, labels)."""
    large = cv2.resize(soft, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR).reshape(*shape, -1)
    low, high = large.min(axis=(0, 1)), large.max(axis=(0, 1))
    return np.where(high > 0, (large - low) / np.maximum(high - low, 1e-12), large)


def jaccard(found: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) bool; 1 if both are empty."""
    union = (found | truth).sum()
    return float((found & truth).sum() / union) if union else 1.0


def boundary_f(found: np.ndarray, truth: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """Harmonic mean of the shares of boundary pixels within `tolerance` diagonals, rounded up to pixels, of the other boundary."""
    near = int(np.ceil(tolerance * np.hypot(*found.shape)))
    across = np.arange(-near, near + 1)
    disk = (np.hypot(across[:, None], across) <= near).astype(np.uint8)
    ours, theirs = boundary(found), boundary(truth)
    if not ours.any() or not theirs.any():
        return float(not ours.any() and not theirs.any())
    precision = (ours & (cv2.dilate(theirs.astype(np.uint8), disk) > 0)).sum() / ours.sum()
    recall = (theirs & (cv2.dilate(ours.astype(np.uint8), disk) > 0)).sum() / theirs.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that differ from the one to the right, below, or below on the right; lines one pixel wide."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])
