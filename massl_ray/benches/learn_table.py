"""What the cells of `bench learn` come to: means over seeds, ours beside the best peer, a text and a picture to look at."""

import io
import statistics
from collections.abc import Sequence
from typing import Any

from massl_ray.benches.peers import PEERS

FIGURES = ("knn", "knn1", "linear", "lowshot", "knn_per_class", "gain", "rank", "spread", "kl", "seconds_per_step")
SHARES = ("knn", "knn1", "linear", "lowshot", "gain")  # shown in percent
BASELINES = {"pixels": "raw pixels", "untrained": "untrained, statistics adapted"}  # they take no steps, and stand beside all
LOOKS = {
    "pixels": ("#9a9a9a", "_"),
    "untrained": ("#555555", "x"),
    "ours": ("#c0392b", "o"),
    "simclr": ("#1f77b4", "s"),
    "vicreg": ("#2e8b57", "^"),
    "dino": ("#8e6bbf", "D"),
}

Row = dict[str, Any]


def table(cells: Sequence[Row]) -> list[Row]:
    """A row for each set, number of steps and method: means over seeds, and standard errors where there are two seeds or more."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for cell in cells:
        groups.setdefault((cell["set"], cell["steps"], cell["method"]), []).append(cell)
    rows = []
    for (name, steps, method), group in groups.items():
        row: Row = {"set": name, "steps": steps, "method": method, "seeds": len(group)}
        for figure in FIGURES:
            row[figure], row[f"{figure}_se"] = mean_and_error([cell[figure] for cell in group])
        rows.append(row)
    return rows


def mean_and_error(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The mean and its standard error; neither where a value is missing, no error of one value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    return statistics.mean(known), statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None


def compared(cells: Sequence[Row]) -> list[Row]:
    """For each number of steps the means over sets of ours minus the best peer, and of ours over the best peer: of those sets that
    have ours and all peers there are, at the seeds that all of them have. The best peer is, set by set, the one of the best mean
    for the figure on the test images: a choice that favours peers."""
    lines = []
    for steps in sorted({cell["steps"] for cell in cells if cell["steps"]}):
        here = [cell for cell in cells if cell["steps"] == steps]
        peers = [name for name in PEERS if any(cell["method"] == name for cell in here)]
        line: Row = {"steps": steps, "peers": peers}
        for figure in ("knn", "linear"):
            pairs = [pair for name in dict.fromkeys(cell["set"] for cell in here) if (pair := _pair(here, name, peers, figure))]
            line |= {"sets": len(pairs)} if figure == "knn" else {}
            line[figure], line[f"{figure}_se"] = mean_and_error([mine - best for mine, best in pairs])
            line[f"{figure}_ratio"] = statistics.mean(mine / best for mine, best in pairs) if pairs else None
            line[f"{figure}_ahead"] = sum(mine > best for mine, best in pairs)
        if line["sets"]:
            lines.append(line)
    return lines


def _pair(cells: Sequence[Row], name: str, peers: Sequence[str], figure: str) -> tuple[float, float] | None:
    """Ours and the best peer on a set, over the seeds that all have."""
    by_method = {
        method: {cell["seed"]: cell[figure] for cell in cells if cell["set"] == name and cell["method"] == method}
        for method in ("ours", *peers)
    }
    seeds = set.intersection(*(set(values) for values in by_method.values()))
    if not seeds or not peers or any(by_method[method][seed] is None for method in by_method for seed in seeds):
        return None
    means = {method: statistics.mean(values[seed] for seed in seeds) for method, values in by_method.items()}
    return means["ours"], max(means[method] for method in peers)


def text(result: Row) -> str:
    """The result for people to read."""
    lines = [result["work"], ""]
    for method, rate in result["rates"].items():
        tried = ", ".join(f"{factor} {_percent(value)}" for factor, value in rate["knn_held_out"].items())
        lines.append(
            f"rate of {method:<8}{rate['lr_factor']:g} x the preset's = {rate['lr']:g}   (k-NN on held-out images: {tried})"
        )
    rows = result["table"]
    if rows:
        lines += [
            "",
            "Means over seeds, in percent, with standard errors; gain: k-NN over the untrained net with adapted statistics.",
        ]
    for steps in sorted({row["steps"] for row in rows if row["steps"]}) or [0] * bool(rows):
        lines += [
            "",
            f"{steps} steps",
            _line("set", "method", "seeds", "k-NN", "k=1", "linear", "lowshot", "gain", "rank", "s/step"),
        ]
        shown = [row for row in rows if row["steps"] in (0, steps)]
        for name in dict.fromkeys(row["set"] for row in shown):
            for row in sorted((row for row in shown if row["set"] == name), key=lambda row: list(LOOKS).index(row["method"])):
                shares = [_percent(row[figure], row[f"{figure}_se"]) for figure in SHARES]
                lines.append(
                    _line(name, row["method"], row["seeds"], *shares, _short(row["rank"]), _short(row["seconds_per_step"]))
                )
    lines += [""] * bool(result["compared"])
    for line in result["compared"]:
        found = (f"{figure} {_signed(line[key], line[key + '_se'])}" for figure, key in (("k-NN", "knn"), ("linear", "linear")))
        lines.append(
            f"{line['steps']} steps, ours minus the best peer, mean over {line['sets']} sets: {', '.join(found)}; "
            f"ahead in k-NN on {line['knn_ahead']}, in linear on {line['linear_ahead']}"
        )
    if result["missing"]:
        lines.append(f"{result['missing']} cells are still missing: the same command goes on with them.")
    return "\n".join([*lines, *result["skipped"]])


def _line(name: Any, method: Any, seeds: Any, *figures: str) -> str:
    return f"{name:<12}{method:<11}{seeds:>5}" + "".join(f"{figure:>13}" for figure in figures)


def _percent(value: float | None, error: float | None = None) -> str:
    return "-" if value is None else f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _signed(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def draw(rows: Sequence[Row]) -> bytes:
    """PNG: k-NN accuracy by set, a panel for each number of steps, methods as points with standard errors."""
    from matplotlib.figure import Figure  # late: it takes a second to import

    panels = sorted({row["steps"] for row in rows if row["steps"]}) or [0]
    names = list(dict.fromkeys(row["set"] for row in rows))
    figure = Figure(figsize=(max(5.0, 1.1 * len(names) + 1.5) * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, steps in zip(axes, panels, strict=True):
        for place in range(1, len(names), 2):
            axis.axvspan(place - 0.5, place + 0.5, color="#f3f3f3", zorder=0)
        for number, (method, (colour, marker)) in enumerate(LOOKS.items()):
            wanted = [row for row in rows if row["method"] == method and row["steps"] in (0, steps) and row["knn"] is not None]
            offset = 0.0 if method in BASELINES else 0.17 * (number - 3.5)
            axis.errorbar(
                [names.index(row["set"]) + offset for row in wanted],
                [100 * row["knn"] for row in wanted],
                [100 * (row["knn_se"] or 0) for row in wanted],
                color=colour,
                marker=marker,
                markersize=22 if method == "pixels" else 6,
                markeredgewidth=1.8 if method in BASELINES else 1.0,
                linestyle="none",
                capsize=2,
                label=BASELINES.get(method, method),
            )
        axis.set(title=f"{steps} steps", xticks=range(len(names)), xticklabels=names, xlim=(-0.5, max(0.5, len(names) - 0.5)))
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("k-NN accuracy on test images, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LOOKS), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
