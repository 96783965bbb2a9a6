"""The page and the console table of `massl-ray compare`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from massl_ray.reporting.comparison import (
    RunFiles,
    cautions,
    curve,
    evaluation_table,
    figure_table,
    knn_curve,
    settings_table,
)
from massl_ray.reporting.html import GRAY, chart, page, text
from massl_ray.reporting.plane import drawable
from massl_ray.shown import in_a_line
from massl_ray.training.run import write_atomically

COLOURS = ["#2457a6", "#c8641b", "#1c7c3c", "#8c2f8f", "#b5232b", "#0f8a94", "#8a6d00", "#5a606b"]
STYLES = ["-", "--", ":", "-."]  # for more runs than colours
WIDE = 40  # characters of a cell on the console
Draw = Callable[[Axes], None]


def write_comparison(runs: Sequence[RunFiles], path: Path) -> Path:
    said = "".join(f"<p class='note'>{text(sentence)}</p>" for sentence in cautions(runs))
    differing = settings_table(runs)
    sections = [
        f"<h1>{len(runs)} runs side by side</h1>{said}",
        _table("Figures", figure_table(runs)),
        _table(
            "Evaluations", evaluation_table(runs), "From massl-ray evaluate, of each run's latest checkpoint, with 95 % intervals."
        ),
        _table("Settings that differ", differing) if len(differing) > 1 else "<h2>Settings</h2><p>All are the same.</p>",
        _charts(runs),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page("compare", sections))
    return path


def console_text(runs: Sequence[RunFiles]) -> str:
    """Tables in aligned lines."""
    parts = [("", figure_table(runs)), ("Evaluations", evaluation_table(runs)), ("Settings that differ", settings_table(runs))]
    blocks = [(f"{title}\n" if title else "") + _aligned(lines) for title, lines in parts if len(lines) > 1]
    return "\n\n".join([*blocks, *cautions(runs)])


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    cells = [[_short(in_a_line(cell)) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _short(cell: str) -> str:
    """Its end: of long names and paths that is what differs."""
    return cell if len(cell) <= WIDE else f"...{cell[3 - WIDE :]}"


def _table(title: str, lines: Sequence[Sequence[str]], note: str = "") -> str:
    if len(lines) < 2:
        return ""
    head = "".join(f"<th>{text(cell)}</th>" for cell in lines[0])
    rows = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in line) + "</tr>" for line in lines[1:])
    said = f"<p class='note'>{text(note)}</p>" if note else ""
    return f"<h2>{text(title)}</h2>{said}<table><tr>{head}</tr>{rows}</table>"


def _charts(runs: Sequence[RunFiles]) -> str:
    def lines(key: str, scale: float = 1.0) -> Draw:
        def draw(axes: Axes) -> None:
            for number, run in enumerate(runs):
                images, values = curve(run, key)
                _line(axes, number, run, images, [scale * value for value in values])
            _legend(axes)

        return draw

    def accuracy(axes: Axes) -> None:
        for number, run in enumerate(runs):
            _line(axes, number, run, *knn_curve(run), marker="o")
        pixels = {round(100 * record["top1"], 3) for run in runs for record in run.knn if record.get("features") == "pixels"}
        for value in sorted(pixels):
            axes.axhline(value, color=GRAY, linestyle="--", linewidth=1)
        _legend(axes)

    charts = [("Loss", "nats", lines("loss"))]
    charts += [("k-NN accuracy (dashed: raw pixels)", "%", accuracy)] if any(run.knn for run in runs) else []
    charts += [
        ("Embedding spread", "1 = evenly over the sphere", lines("embedding_std")),
        ("Effective rank of the embeddings", "dimensions", lines("effective_rank")),
    ]
    if any("alignment" in run.lines[-1] for run in runs if run.lines):  # runs of old versions lack these
        charts += [
            ("Alignment: views of an image", "square of a distance", lines("alignment")),
            ("Uniformity: different images", "nats", lines("uniformity")),
            ("Use of the memory", "1 = all rows alike", lines("memory_usage")),
        ]
    charts += [("Throughput", "images/s", lines("images_per_s"))]
    if not any(run.lines for run in runs):
        return "<h2>Curves</h2><p>No step is recorded yet.</p>"
    images = "".join(f"<img alt='{text(title)}' src='{chart(title, unit, draw, 'images seen')}'>" for title, unit, draw in charts)
    note = "By images seen, so that runs of different batches can be compared. Long runs are shown as means of 300 equal parts."
    return f"<h2>Curves</h2><p class='note'>{note}</p><div class='charts'>{images}</div>"


def _line(axes: Axes, number: int, run: RunFiles, images: Sequence[float], values: Sequence[float], **how: Any) -> None:
    if not images:
        return
    colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
    if len(images) == 1:
        how = {"marker": "o"}  # a line of one point cannot be seen
    label = drawable(run.name)
    axes.plot(images, values, color=colour, linestyle=style, linewidth=1.2, markersize=4, label=label, **how)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
