"""The map of embeddings as a picture: points coloured by class, or the images themselves."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from massl_ray.shown import in_a_line

NAMED = 20  # classes of a colour of their own
BLUE, GRAY = "#2457a6", "#8a8f98"
CELLS = 24  # a side of the lattice that thumbnails are thinned out on


def draw_map(
    points: np.ndarray,
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    thumbnails: Sequence[np.ndarray] | None = None,
) -> bytes:
    """PNG of points (n, 2), with at most NAMED classes in the legend, the largest; with `thumbnails`, (h, w, 3) uint8 each, one of
    them for every cell of a lattice that has points."""
    buffer = io.BytesIO()
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(9, 6.4), layout="constrained", dpi=100)
        axes = figure.add_subplot()
        axes.set_aspect("equal", "box")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#e4e6ea")
        colours = _scatter(axes, points, labels, classes)
        if thumbnails is not None:
            _pictures(axes, points, thumbnails, colours)
        low, span = points.min(0), float(np.ptp(points, axis=0).max()) or 1.0
        for limit, start, width in zip((axes.set_xlim, axes.set_ylim), low, np.ptp(points, axis=0), strict=True):
            limit(start - 0.04 * span, start + width + 0.04 * span)
        figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def _scatter(axes: Axes, points: np.ndarray, labels: np.ndarray | None, classes: Sequence[str]) -> list[Any]:
    """Draws the points, and returns the colour of each."""
    size = float(np.clip(20_000 / max(1, len(points)), 8, 60))
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], size, BLUE, linewidths=0)
        return [BLUE] * len(points)
    sizes = np.bincount(labels, minlength=len(classes))
    ranked = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    named = ranked if len(ranked) <= NAMED else ranked[: NAMED - 1]
    if len(named) < len(ranked):
        rest = ~np.isin(labels, named)
        other = f"{len(ranked) - len(named):,} other classes"
        axes.scatter(points[rest, 0], points[rest, 1], size / 3, GRAY, linewidths=0, label=other)
    palette = colormaps["tab20"]  # strong and pale shades by turns; the largest classes get the strong ones
    colours = {int(label): palette(rank % 10 * 2 + rank // 10) for rank, label in enumerate(named)}
    for label in sorted(colours):
        mine, name = labels == label, drawable(classes[label])
        axes.scatter(points[mine, 0], points[mine, 1], size, [colours[label]], linewidths=0, label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, markerscale=max(1.0, (25 / size) ** 0.5))
    return [colours.get(label, GRAY) for label in labels]


def _pictures(axes: Axes, points: np.ndarray, thumbnails: Sequence[np.ndarray], colours: Sequence[Any]) -> None:
    """One image for each cell of a lattice, in the middle of the cell, framed in its point's colour."""
    low, span = points.min(0), float(np.ptp(points, axis=0).max()) or 1.0
    cell = span / CELLS
    for (column, row), index in representatives((points - low) / cell).items():
        x, y = low + (np.array([column, row]) + 0.5) * cell
        half = 0.44 * cell
        axes.imshow(thumbnails[index], extent=(x - half, x + half, y - half, y + half), zorder=3)
        frame = Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, edgecolor=colours[index], linewidth=2, zorder=4)
        axes.add_patch(frame)


def representatives(places: np.ndarray) -> dict[tuple[int, int], int]:
    """Of points (n, 2) in 0 to CELLS, for each unit square that has any, the one nearest to its middle. The first one in the
    source would be of the first class wherever classes meet."""
    cells = np.minimum(np.floor(places), CELLS - 1)
    off = np.abs(places - cells - 0.5).max(1)
    nearest_last = np.argsort(-off, kind="stable")
    return {(int(column), int(row)): int(index) for index, (column, row) in zip(nearest_last, cells[nearest_last], strict=True)}


def drawable(name: str, longest: int = 28) -> str:
    """A class name in a picture: letters that the font lacks are spelled out, and a leading underscore, which would hide it from
    the legend, is kept off the beginning."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    line = "".join(c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in in_a_line(name))
    line = line if len(line) <= longest else line[: longest - 3] + "..."
    return f"\u200a{line}" if line.startswith("_") else line
