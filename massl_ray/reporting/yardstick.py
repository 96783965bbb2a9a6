"""What k-NN accuracies say of a run: its figures beside those of raw pixels and of the untrained backbone, and plain sentences
where training gave nothing over these. Pure functions of the records in eval/ and of summaries."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {"pixels": "raw pixels", "untrained": "untrained", "final": "trained"}
ERRORS = 2.0  # standard errors of a difference that count as more than chance


def knn_summary(records: Sequence[Mapping[str, Any]], step: int | None) -> dict[str, Any]:
    """The figures of raw pixels, of the untrained backbone and of that after `step`, as summary.json has them: at eval.knn_k
    (`knn_...`) and at k = 1 (`knn1_...`), shares; None where there is none. `knn_adapted` says whether the untrained one's running
    statistics were adapted, `knn_queries` how many images were classified."""
    by_name = {record["features"]: record for record in records}
    chosen = {"pixels": by_name.get("pixels"), "untrained": by_name.get("untrained"), "final": by_name.get(f"step_{step}")}
    figures = {f"knn_{name}": (record or {}).get("top1") for name, record in chosen.items()}
    figures |= {f"knn1_{name}": (record or {}).get("top1_k1") for name, record in chosen.items()}
    figures["knn_adapted"] = (chosen["untrained"] or {}).get("adapted")
    figures["knn_queries"] = (chosen["final"] or {}).get("query_images")
    return figures


def untrained_name(adapted: object) -> str:
    """What the untrained backbone is called: of a vision transformer there is nothing to adapt, and old runs did not."""
    return "untrained, statistics adapted" if adapted else "untrained"


def gain(summary: Mapping[str, Any]) -> float | None:
    """Percentage points over the untrained backbone, at eval.knn_k."""
    final, untrained = summary.get("knn_final"), summary.get("knn_untrained")
    return None if final is None or untrained is None else 100 * (final - untrained)


def sentences(summary: Mapping[str, Any], k: int) -> list[str]:
    """What a person must not overlook in a summary: that raw pixels are better, at `k` neighbours or at one; that training gave no
    more than chance may over the untrained backbone, at `k`. None where all is well or not known."""
    worse = []
    for prefix, neighbours in (("knn", k), ("knn1", 1)):
        final, pixels = summary.get(f"{prefix}_final"), summary.get(f"{prefix}_pixels")
        if final is not None and pixels is not None and pixels > final:
            worse.append(f"{pixels:.1%} for {final:.1%} at k = {neighbours}")
    said = [f"Raw pixels are better than the trained backbone: {' and '.join(dict.fromkeys(worse))}."] if worse else []
    points, queries = gain(summary), summary.get("knn_queries")
    if points is not None and queries:
        reach = 100 * ERRORS * _error(summary["knn_final"], summary["knn_untrained"], queries)
        if points <= reach:
            said.append(
                f"The trained backbone is not better than the {_described(summary)} one by more than chance: {points:+.1f} points, "
                f"and two standard errors of such a difference on {queries:,} images are {reach:.1f}."
            )
    return said


def _described(summary: Mapping[str, Any]) -> str:
    return "untrained (statistics adapted)" if summary.get("knn_adapted") else "untrained"


def _error(one: float, other: float, n: int) -> float:
    """Of the difference of two shares of n images each, as if they were different images: rather too large than too small."""
    return math.sqrt((one * (1 - one) + other * (1 - other)) / n)
