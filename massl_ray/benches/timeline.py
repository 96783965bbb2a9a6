"""Draw what `bench resize --json` measured: steps over time, ours above stock. `python -m massl_ray.benches.timeline JSON PNG`."""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {1: "#dbe7f3", 2: "#9dc1e0"}
WORDS = {"add": "a machine joins", "kill": "a machine vanishes", "notice": "a machine is given notice"}


def draw(timelines: dict[str, Any]) -> Figure:
    """Two panels with one time axis."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    end = max(side["steps"][-1][0] for side in timelines.values())
    titles = {"ours": "massl-ray", "stock": "the same training with Ray Train's own settings"}
    for number, (name, title) in enumerate(titles.items(), 1):
        axes = figure.add_subplot(2, 1, number)
        _panel(axes, timelines[name])
        axes.set(title=title, xlim=(0, end), ylabel="step")
    figure.axes[-1].set_xlabel("seconds since the first step; shaded: one worker, two workers")
    return figure


def _panel(axes: Axes, side: dict[str, Any]) -> None:
    last = side["steps"][-1][0]
    edges = [*side["sizes"], (last, 0)]
    for (since, size), (until, _) in zip(edges, edges[1:], strict=False):
        axes.axvspan(since, until, color=COLOURS[size], linewidth=0)
    axes.plot(*zip(*side["steps"], strict=True), color="#1f4e79", marker=".", markersize=3, linewidth=0.8)
    for number, (when, what) in enumerate(side["happenings"]):
        axes.axvline(when, color="#b03a2e", linewidth=1)
        height = 0.97 - 0.11 * (number % 2)  # neighbours' words would overlap
        axes.text(when, height, f" {WORDS[what]}", transform=axes.get_xaxis_transform(), color="#b03a2e", va="top", fontsize=8)


def main(source: str, target: str) -> None:
    draw(json.loads(Path(source).read_text())["timelines"]).savefig(target, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
