"""Video object segmentation: the first frame's mask carried through a clip by likeness of patch features.

As Caron et al., ICCV 2021 (DINO), do it for DAVIS 2017 after Jabri et al., NeurIPS 2020: each patch takes the mean mask of the 5
patches most like it, of the first frame and the 7 frames before it, within 12 patches up, down, left and right of its place,
weighted by exp(cosine similarity / 0.1). J and F as Perazzi et al., CVPR 2016, define them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from massl_ray.errors import UserError
from massl_ray.evaluation.bootstrap import jackknife_figure
from massl_ray.evaluation.results import Figure, Result

TOLERANCE = 0.008  # of the frame's diagonal
TILE = 8  # patches a side, whose masks are found at once


@dataclass(frozen=True)
class Settings:
    """Those of DINO."""

    nearest: int = 5  # patches
    temperature: float = 0.1
    reach: int = 12  # patches up, down, left and right; 0 is no limit
    context: int = 7  # frames before, beside the first


@dataclass(frozen=True)
class Clip:
    features: Iterable[np.ndarray | Tensor]  # T times (h, w, D) of patches, taken one by one: so they need not all be in memory
    masks: np.ndarray  # (T, H, W) int: 0 is background, 1 to N are objects; the first is given, the others judge
    name: str = "clip"


def segmentation(clips: Iterable[Clip], settings: Settings = Settings()) -> Result:
    """J&F, J and F: means over all objects of all clips, each a mean over its frames but for the first and the last, as DAVIS
    counts. Intervals are over objects."""
    return summary([object_scores(clip, settings) for clip in clips], settings)


def object_scores(clip: Clip, settings: Settings = Settings()) -> np.ndarray:
    """J and F (objects, 2) of each object of the first mask, means over the frames that count."""
    if clip.masks.ndim != 3 or len(clip.masks) < 3:
        raise UserError(f"{clip.name}: needs 3 frames or more, features (T, h, w, D) and masks (T, H, W) of the same number")
    objects = [int(label) for label in np.unique(clip.masks[0]) if label > 0]
    if not objects:
        raise UserError(f"{clip.name}: the mask of its first frame has no object")
    found = propagate(clip.features, clip.masks[0], settings)
    if len(found) != len(clip.masks):
        raise UserError(f"{clip.name}: has {len(clip.masks)} masks and features of {len(found)} frames")

    def mean(score: Callable[[np.ndarray, np.ndarray], float], label: int) -> float:
        return float(np.mean([score(found[t] == label, clip.masks[t] == label) for t in range(1, len(found) - 1)]))

    return np.array([(mean(jaccard, label), mean(boundary_f, label)) for label in objects])


def summary(scores: Sequence[np.ndarray], settings: Settings) -> Result:
    """Of each clip's J and F (objects, 2)."""
    if not scores:
        raise UserError("segmentation: no clip was given")
    region, contour = np.concatenate(scores).T
    figures: dict[str, Figure] = {
        name: jackknife_figure(lambda places, values=values: float(values[places].mean()), len(values), most=1)
        for name, values in (("j_and_f", (region + contour) / 2), ("j", region), ("f", contour))
    }
    parameters = {
        "nearest": settings.nearest,
        "temperature": settings.temperature,
        "reach_patches": settings.reach,
        "context_frames": settings.context,
        "boundary_tolerance": f"{TOLERANCE} of the diagonal",
        "frames": "all but the first and the last",
        "clips": len(scores),
        "objects": len(region),
        "interval": "95 % of the jackknife over objects",
    }
    return Result("segmentation", figures, parameters)


def propagate(features: Iterable[np.ndarray | Tensor], mask: np.ndarray, settings: Settings = Settings()) -> np.ndarray:
    """T times (h, w, D) features and the first frame's mask (H, W), labels 0 to N -> masks (T, H, W), computed where the features
    are. The patches' mask is that of their middle pixels; soft masks of patches are carried on and enlarged linearly, each label's
    stretched to 0 to 1."""
    frames = (normalize(torch.as_tensor(frame).float(), dim=2) for frame in features)
    first, labels = next(frames), np.unique(mask)
    h, w, _ = first.shape
    small = cv2.resize(mask.astype(np.int32), (w, h), interpolation=cv2.INTER_NEAREST_EXACT)
    given = first, torch.from_numpy((small[..., None] == labels).astype(np.float32)).to(first.device)
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.context)  # features (h, w, D) and soft masks (h, w, labels)
    found = [mask]
    for frame in frames:
        soft = _carried(frame, [given, *before], settings)
        before.append((frame, soft))
        found.append(labels[_enlarged(soft.cpu().numpy(), mask.shape).argmax(axis=2)])
    return np.stack(found)


def _carried(target: Tensor, sources: Sequence[tuple[Tensor, Tensor]], settings: Settings) -> Tensor:
    """Patches (h, w, D) from those of other frames and their soft masks (h, w, labels) -> (h, w, labels). A tile after the other,
    each with what is within its reach: of all pairs of patches most are too far apart."""
    h, w, _ = target.shape
    reach, places = settings.reach or max(h, w), torch.arange(h * w, device=target.device).view(h, w)
    features, masks = (torch.stack(held) for held in zip(*sources, strict=True))
    carried = torch.empty(h, w, masks.shape[-1], device=target.device)
    for top in range(0, h, TILE):
        for left in range(0, w, TILE):
            tile = slice(top, top + TILE), slice(left, left + TILE)
            rows, columns = (slice(max(0, edge.start - reach), edge.stop + reach) for edge in tile)
            near = neighbourhood(places[tile].flatten(), places[rows, columns].flatten(), w, reach).repeat(1, len(sources))
            close = target[tile].flatten(0, 1) @ features[:, rows, columns].flatten(0, 2).T
            values, best = close.masked_fill(~near, -torch.inf).topk(min(settings.nearest, close.shape[1]), dim=1)
            weights = (values / settings.temperature).softmax(1)[:, :, None]
            soft = (weights * masks[:, rows, columns].flatten(0, 2)[best]).sum(1)
            carried[tile] = soft.view_as(carried[tile])
    return carried


def neighbourhood(targets: Tensor, sources: Tensor, w: int, reach: int) -> Tensor:
    """(n, m) bool: which places, numbered row by row of `w`, are at most `reach` apart in both directions."""
    down, across = targets[:, None] // w - sources // w, targets[:, None] % w - sources % w
    return (down.abs() <= reach) & (across.abs() <= reach)


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
