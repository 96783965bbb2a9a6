"""report.html of a sweep: which settings to use, and how sure that is."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from massl_ray.config.space import Sweep, words
from massl_ray.reporting.html import BLUE, GRAY, ORANGE, chart, page, text
from massl_ray.reporting.summary import read_knn, read_metrics
from massl_ray.shown import in_a_line
from massl_ray.sweeping.trials import HIGHER, Row, Score, folder_of, shown
from massl_ray.training.run import write_atomically

NAMES = {"knn": "k-NN accuracy", "effective_rank": "effective rank", "loss": "loss"}
UNITS = {"knn": "%", "effective_rank": "dimensions", "loss": "nats"}
SHOWN = 20  # points in the table
COLOURS = colormaps["viridis"]


def write_page(root: Path, sweep: Sweep, rows: Sequence[Row], found: Sequence[Score]) -> Path:
    metric = sweep.sweep.metric
    last = max(row.trial.generation for row in rows)
    known = [row for row in rows if row.status == "finished" and not math.isnan(row.metric(metric))]
    done = [row for row in known if row.trial.generation == last]
    sections = [_head(root, sweep, rows, found), _points(metric, found)]
    if done:
        charts = [*_maps(metric, done), *_responses(metric, done), _importance(metric, done), _parallel(metric, found)]
        charts += [_curves(root, metric, rows), _lineage(metric, known) if last else ""]
        sections.append(f"<h2>What the settings do</h2><div class='charts'>{''.join(filter(None, charts))}</div>")
    sections.append(_trials(sweep, rows))
    path = root / "report.html"
    write_atomically(path, page(root.name, sections))
    return path


def importance(points: Sequence[dict[str, Any]], values: Sequence[float]) -> dict[str, float]:
    """Share of the variance of `values` that lies between the values of each setting (eta squared, of main effects). Settings with
    more than eight values are taken by eighths."""
    total = pstdev(values) ** 2
    shares = {}
    for key in points[0]:
        groups: dict[Any, list[float]] = {}
        for level, value in zip(_levels([point[key] for point in points]), values, strict=True):
            groups.setdefault(level, []).append(value)
        between = sum(len(group) * (mean(group) - mean(values)) ** 2 for group in groups.values()) / len(values)
        shares[key] = between / total if total else 0.0
    return shares


def _levels(values: Sequence[Any]) -> list[Any]:
    if len({str(value) for value in values}) <= 8 or not all(isinstance(value, int | float) for value in values):
        return [str(value) for value in values]
    edges = np.quantile(values, np.linspace(0, 1, 9)[1:-1])
    return np.searchsorted(edges, values).tolist()


def _scaled(metric: str, value: float) -> float:
    return 100 * value if metric == "knn" else value


def _head(root: Path, sweep: Sweep, rows: Sequence[Row], found: Sequence[Score]) -> str:
    metric = sweep.sweep.metric
    finished = sum(row.status == "finished" for row in rows)
    seconds = sum(row.seconds for row in rows if not math.isnan(row.seconds))
    cells = [(f"{finished:,}", f"of {len(rows):,} trials finished"), (f"{seconds / 3600:.2f} h", "of trials' time")]
    if sweep.sweep.price:
        cells.append((_cost(sweep, seconds), f"at {sweep.sweep.price:g} an hour of a worker"))
    if found:
        cells.append((shown(metric, found[0].mean), f"{NAMES[metric]}, best point"))
    figures = "".join(f"<div><b>{value}</b>{name}</div>" for value, name in cells)
    note = _verdict(metric, found) if found else "No trial has finished yet."
    return f"<h1>{text(root.name)}</h1><p class='note'>{note}</p><div class='figures'>{figures}</div>"


def _verdict(metric: str, found: Sequence[Score]) -> str:
    """Which point, and whether the next one is worse by more than seeds differ."""
    best = found[0]
    said = f"Best: {text(words(best.point))}, in <code>best.toml</code>."
    if len(found) < 2:
        return said
    ahead = abs(best.mean - found[1].mean)
    spreads = [score.spread for score in found if not math.isnan(score.spread)]
    if not spreads:
        return f"{said} Each point ran with one seed, so nothing here says how sure that is: give the sweep several seeds."
    # of two means of n seeds each, the standard error of their difference
    error = mean(spreads) * math.sqrt(2 / best.seeds)
    sure = "more than" if ahead > 2 * error else "less than"
    near = sum(abs(score.mean - best.mean) <= 2 * error for score in found) - 1
    said += f" It leads by {shown(metric, ahead)}, {sure} twice the standard error of such a difference ({shown(metric, error)})."
    return said + (f" {near:,} other points cannot be told from it by these seeds." if near else "")


def _points(metric: str, found: Sequence[Score]) -> str:
    if not found:
        return ""
    keys = list(found[0].point)
    head = "".join(f"<th>{text(name)}</th>" for name in [*keys, NAMES[metric], "spread over seeds", "seeds"])
    lines = ""
    for score in found[:SHOWN]:
        cells = [*(_value(score.point[key]) for key in keys), shown(metric, score.mean), shown(metric, score.spread), score.seeds]
        lines += "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in cells) + "</tr>"
    more = f"<p class='note'>and {len(found) - SHOWN:,} more in results.csv</p>" if len(found) > SHOWN else ""
    return f"<h2>Points</h2><table><tr>{head}</tr>{lines}</table>{more}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else in_a_line(str(value))


def _img(title: str, url: str) -> str:
    return f"<img alt='{text(title)}' src='{url}'>"


def _maps(metric: str, done: Sequence[Row]) -> list[str]:
    """Memory size by blocks, where both vary and are few."""
    keys = ("memory.size", "memory.num_blocks")
    if not all(key in done[0].trial.point for key in keys):
        return []
    levels = [sorted({row.trial.point[key] for row in done}) for key in keys]
    if any(len(values) < 2 or len(values) > 12 for values in levels):
        return []
    cells = np.full((len(levels[0]), len(levels[1])), np.nan)
    for i, size in enumerate(levels[0]):
        for j, blocks in enumerate(levels[1]):
            values = [row.metric(metric) for row in done if [row.trial.point[key] for key in keys] == [size, blocks]]
            cells[i, j] = _scaled(metric, mean(values)) if values else np.nan

    def draw(axes: Axes) -> None:
        axes.grid(False)
        axes.imshow(cells, cmap="viridis" if HIGHER[metric] else "viridis_r", aspect="auto")
        middle = np.nanmean(cells)
        for (i, j), value in np.ndenumerate(cells):
            if not math.isnan(value):
                light = (value < middle) == HIGHER[metric]
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", color="white" if light else "black")
        axes.set_xticks(range(len(levels[1])), [str(value) for value in levels[1]])
        axes.set_yticks(range(len(levels[0])), [f"{value:,}" for value in levels[0]])

    title = f"{NAMES[metric]} ({UNITS[metric]}) by memory"
    return [_img(title, chart(title, "memory.size", draw, "memory.num_blocks"))]


def _responses(metric: str, done: Sequence[Row]) -> list[str]:
    """For each setting: every trial, and the mean at each value with the deviation of all trials there."""
    pictures = []
    for key in done[0].trial.point:
        values = [row.trial.point[key] for row in done]
        if len({str(value) for value in values}) < 2:
            continue
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        places = values if numbers else [sorted({str(v) for v in values}).index(str(value)) for value in values]
        figures = [_scaled(metric, row.metric(metric)) for row in done]

        def draw(axes: Axes, places=places, figures=figures, numbers=numbers, values=values) -> None:
            axes.plot(places, figures, "o", color=GRAY, alpha=0.6, markersize=4)
            levels = sorted(set(places))
            if len(levels) <= 12:
                groups = [[y for x, y in zip(places, figures, strict=True) if x == level] for level in levels]
                axes.errorbar(levels, [mean(g) for g in groups], [pstdev(g) for g in groups], color=BLUE, marker="o", capsize=3)
            wide = numbers and min(levels) > 0 and max(levels) / min(levels) >= 8
            if wide:
                axes.set_xscale("log", base=2)
            if (wide and len(levels) <= 12) or (len(levels) <= 6 and all(isinstance(level, int) for level in levels)):
                axes.set_xticks(levels, [_value(level) for level in levels])
                axes.minorticks_off()
            if not numbers:
                axes.set_xticks(range(len(levels)), [in_a_line(value) for value in sorted({str(value) for value in values})])

        title = f"{NAMES[metric]} by {key}"
        pictures.append(_img(title, chart(title, UNITS[metric], draw, key)))
    return pictures


def _importance(metric: str, done: Sequence[Row]) -> str:
    if len(done) < 3:
        return ""
    shares = importance([row.trial.point | {"run.seed": row.trial.seed} for row in done], [row.metric(metric) for row in done])
    if len({row.trial.seed for row in done}) == 1:
        del shares["run.seed"]

    def draw(axes: Axes) -> None:
        keys = sorted(shares, key=lambda key: shares[key])
        axes.grid(False)
        axes.barh(keys, [100 * shares[key] for key in keys], color=BLUE)

    title = "Variance that each setting explains alone"
    return _img(title, chart(title, "", draw, "%"))


def _parallel(metric: str, found: Sequence[Score]) -> str:
    keys = [key for key in found[0].point if len({str(score.point[key]) for score in found}) > 1]
    if len(keys) < 2:
        return ""

    def place(key: str, score: Score) -> float:
        levels = sorted({other.point[key] for other in found}, key=lambda value: (str(type(value)), value))
        return levels.index(score.point[key]) / (len(levels) - 1)

    figures = [score.mean for score in found]
    low, high = min(figures), max(figures)

    def draw(axes: Axes) -> None:
        for score in reversed(found):
            share = (score.mean - low) / (high - low) if high > low else 1.0
            heights = [*(place(key, score) for key in keys), share]
            best = score is found[0]
            axes.plot(heights, color=ORANGE if best else COLOURS(share), linewidth=2.5 if best else 1, alpha=1 if best else 0.7)
        for number, key in enumerate(keys):
            levels = sorted({score.point[key] for score in found}, key=lambda value: (str(type(value)), value))
            axes.annotate(_value(levels[0]), (number, -0.03), ha="center", va="top", fontsize=8)
            axes.annotate(_value(levels[-1]), (number, 1.03), ha="center", va="bottom", fontsize=8)
        axes.annotate(shown(metric, low), (len(keys), -0.03), ha="center", va="top", fontsize=8)
        axes.annotate(shown(metric, high), (len(keys), 1.03), ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(keys) + 1), [*keys, NAMES[metric]], fontsize=8)
        axes.set_yticks([])
        axes.set_ylim(-0.15, 1.15)

    title = "Points side by side (orange: the best)"
    return _img(title, chart(title, "", draw, ""))


def _lineage(metric: str, known: Sequence[Row]) -> str:
    by_name = {row.trial.name: row for row in known}

    def draw(axes: Axes) -> None:
        for row in known:
            axes.plot(row.images_seen, _scaled(metric, row.metric(metric)), "o", color=BLUE, markersize=4)
            parent = by_name.get(row.trial.parent)
            if parent:
                taken = row.trial.name.split("-gen-")[0] != parent.trial.name.split("-gen-")[0]
                ends = [_scaled(metric, each.metric(metric)) for each in (parent, row)]
                axes.plot([parent.images_seen, row.images_seen], ends, color=ORANGE if taken else BLUE, linewidth=1)

    title = "Generations (orange: took over another one's weights)"
    return _img(title, chart(title, f"{NAMES[metric]} ({UNITS[metric]})", draw, "images seen"))


def _curves(root: Path, metric: str, rows: Sequence[Row]) -> str:
    def series(row: Row) -> tuple[list[int], list[float]]:
        folder = folder_of(root, row.trial)
        lines = read_metrics(folder)
        if metric != "knn":
            return [line["images_seen"] for line in lines], [line[metric] for line in lines]
        an_image = row.images_seen / max(1, row.steps)
        records = [record for record in read_knn(folder) if record["features"] != "pixels"]
        return [int(record["step"] * an_image) for record in records], [100 * record["top1"] for record in records]

    def draw(axes: Axes) -> None:
        for row in rows:
            images, values = series(row)
            if not images:
                continue
            stopped = row.status == "stopped early"
            dots = "o" if len(images) == 1 else ""  # a line of one point cannot be seen
            axes.plot(images, values, dots + "-", color=GRAY if stopped else BLUE, alpha=0.6, linewidth=1, markersize=4)
            if stopped:
                axes.plot(images[-1], values[-1], "x", color=ORANGE)

    early = any(row.status == "stopped early" for row in rows)
    title = f"{NAMES[metric]} on the way" + (" (x: ended early)" if early else "")
    return _img(title, chart(title, UNITS[metric], draw, "images seen"))


def _cost(sweep: Sweep, seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{(sweep.sweep.price or 0.0) * sweep.sweep.workers * seconds / 3600:.2f}"


def _trials(sweep: Sweep, rows: Sequence[Row]) -> str:
    metric, price = sweep.sweep.metric, sweep.sweep.price
    lines = ""
    for row in rows:
        link = f"trials/{row.trial.name}/report.html"
        took = "-" if math.isnan(row.seconds) else f"{row.seconds:.0f} s"
        state = row.status + (f": {row.cause}" if row.cause else "")
        state += f", from {row.trial.parent}" if row.trial.parent else ""
        state += f", micro-batch {row.micro_batch_size}" if row.micro_batch_size else ""
        cells = [
            text(words(row.trial.point)),
            row.trial.seed,
            text(state),
            took,
            *([_cost(sweep, row.seconds)] if price else []),
            f"{row.images_seen:,}",
            shown(metric, row.metric(metric)),
            shown("gain", row.gain),
            text(row.verdict or "-"),
        ]
        name = f"<a href='{text(link)}'>{text(row.trial.name)}</a>" if row.status == "finished" else text(row.trial.name)
        lines += "<tr>" + "".join(f"<td>{cell}</td>" for cell in [name, *cells]) + "</tr>"
    names = ["trial", "settings", "seed", "state", "time", *(["cost"] if price else [])]
    names += ["images", NAMES[metric], "k-NN over untrained", "verdict"]
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<h2>Trials</h2><table><tr>{head}</tr>{lines}</table>"
