"""Image retrieval: the test images as queries, the train images as the gallery that is searched."""

from collections.abc import Sequence

import numpy as np

from massl_ray.errors import UserError
from massl_ray.evaluation.bootstrap import INTERVAL, mean_figure, statistic_figure
from massl_ray.evaluation.checks import labelled, names_of, same_width, unit
from massl_ray.evaluation.ranking import ranked
from massl_ray.evaluation.results import Result, Split


def retrieval(train: Split, test: Split, *, recall_at: Sequence[int] = (1, 5, 10), seed: int = 0) -> Result:
    """Instance mode: mean average precision over the whole ranked gallery, where images of the query's class are relevant, and
    recall@k, the share of queries with a relevant image among the first k. An image of the gallery with the query's own
    path is left out of its ranking; a query whose class has no other image counts in no figure.
    """
    both = labelled(train, test, "retrieval")
    if min(recall_at, default=0) < 1:
        raise UserError(f"retrieval: k must be 1 or more, got {', '.join(map(str, recall_at)) or 'none'}")
    own = _own_places(train, test)
    precisions = np.empty(len(test))
    firsts = np.empty(len(test))  # ranks of the first relevant images
    for part, order in ranked(unit(test.vectors), unit(train.vectors)):
        relevant = both.train[order] == both.test[part, None]
        kept = order != own[part, None]
        relevant &= kept
        ranks = kept.cumsum(axis=1)
        totals = relevant.sum(axis=1)
        sums = np.where(relevant, relevant.cumsum(axis=1) / np.maximum(ranks, 1), 0).sum(axis=1)
        precisions[part] = np.where(totals > 0, sums / np.maximum(totals, 1), np.nan)
        firsts[part] = np.where(totals > 0, np.take_along_axis(ranks, relevant.argmax(axis=1)[:, None], 1)[:, 0], np.nan)
    asked = ~np.isnan(precisions)
    if not asked.any():
        raise UserError("retrieval: no test image has another image of its class in the train set; give more images")
    figures = {"map": mean_figure(precisions[asked], seed=seed)}
    figures |= {f"recall_at_{k}": mean_figure(firsts[asked] <= k, seed=seed) for k in recall_at}
    parameters = {
        "mode": "instance",
        "relevant": "of the query's class",
        "average_precision": "mean of the precision at each relevant image, over the whole gallery",
        "recall": "share of queries with a relevant image among the first k",
        "similarity": "cosine",
        "recall_at": list(recall_at),
        "gallery_images": len(train),
        "queries": int(asked.sum()),
        "queries_without_relevant_images": int((~asked).sum()),
        "queries_in_gallery": int((own >= 0).sum()),
        "classes": both.num_classes,
        "seed": seed,
        "interval": INTERVAL,
    }
    return Result("retrieval", figures, parameters)


def copies(train: Split, test: Split, *, candidates: int = 10, seed: int = 0) -> Result:
    """Copy-detection mode: the gallery is originals and distractors, queries are altered copies. A class is one original and its
    copies: a query's original has its class, a query whose class the gallery lacks is a copy of nothing.

    `micro_ap` (Douze et al., the 2021 Image Similarity Challenge): average precision over all queries' `candidates` nearest
    images put into one ranking by similarity, so that one threshold must serve for all; an original that is not among them
    is missed. `map` (Copydays, Douze et al., CIVR 2009): mean over queries with an original of 1 / its rank.
    """
    same_width(train, test, "copies")
    truth = originals(train, test)
    asked = truth >= 0
    places = np.empty(len(test))  # ranks of the originals
    near, similarity = [], []
    queries, gallery = unit(test.vectors), unit(train.vectors)
    for part, order in ranked(queries, gallery):
        places[part] = (order == truth[part, None]).argmax(axis=1) + 1
        first = order[:, :candidates]
        near.append(first == truth[part, None])
        similarity.append(np.einsum("qd,qkd->qk", queries[part], gallery[first]))
    hits, scores = np.concatenate(near), np.concatenate(similarity)

    def micro(queries: np.ndarray) -> float:
        times = np.bincount(queries, minlength=len(test))
        weights = np.broadcast_to(times[:, None], hits.shape).ravel()
        return micro_average_precision(hits.ravel(), scores.ravel(), int(times[asked].sum()), weights)

    figures = {
        "micro_ap": statistic_figure(micro, len(test), seed=seed, resamples=200),
        "map": mean_figure(1 / places[asked], seed=seed),
        "recall_at_1": mean_figure(places[asked] == 1, seed=seed),
    }
    parameters = {
        "mode": "copy detection",
        "similarity": "cosine",
        "candidates": min(candidates, len(train)),
        "gallery_images": len(train),
        "queries": len(test),
        "queries_without_original": int((~asked).sum()),
        "seed": seed,
        "interval": f"{INTERVAL} (micro_ap: 200)",
    }
    return Result("copies", figures, parameters)


def originals(train: Split, test: Split) -> np.ndarray:
    """Of each test image the place of its original in train (n,), or -1. Only labels are looked at. Raises UserError."""
    gallery_names, query_names = names_of(train, "train", "copies"), names_of(test, "test", "copies")
    places = {name: place for place, name in enumerate(gallery_names)}
    if len(places) < len(gallery_names):
        raise UserError(
            "copies: a class has several images in the train set; each original and each distractor needs a class alone"
        )
    truth = np.array([places.get(name, -1) for name in query_names])
    if (truth < 0).all():
        raise UserError("copies: no test image has a class of the train set, so there is no copy to find")
    return truth


def micro_average_precision(hits: np.ndarray, scores: np.ndarray, total: int, weights: np.ndarray | None = None) -> float:
    """Of predictions (p,) with scores (p,), `total` of which could be right: sum over thresholds of precision times the recall
    gained. Predictions of one score come together, so their order in the data gives nothing. weights (p,): how often each counts.
    """
    weights = np.ones(len(hits), dtype=np.int64) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of each score
    right = (hits * weights)[order].cumsum()[last]
    given = weights[order].cumsum()[last]
    return float((np.diff(right, prepend=0) * right / np.maximum(given, 1)).sum() / max(total, 1))


def _own_places(train: Split, test: Split) -> np.ndarray:
    """Of each test image the place of the same file in train (n,), or -1."""
    if len(train.paths) != len(train) or len(test.paths) != len(test):
        return np.full(len(test), -1)
    place = {path: index for index, path in enumerate(train.paths)}
    return np.array([place.get(path, -1) for path in test.paths])
