"""Runs side by side, read off their directories: figures, evaluations, differing settings, curves."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from massl_ray.config import keys, recorded_toml
from massl_ray.errors import UserError
from massl_ray.reporting.summary import FINISHED, read_knn, read_metrics, read_verdict
from massl_ray.reporting.yardstick import gain, knn_summary
from massl_ray.shown import in_a_line, redacted

NOTHING = "-"
IDLE = ("run.dir", "run.seed")  # settings that are no difference in what was tried; the seed is a line of its own


@dataclass(frozen=True)
class RunFiles:
    """A run directory as it lies there; what is missing is empty."""

    name: str  # its own among those that are compared
    folder: Path
    settings: Mapping[str, Any]  # 'section.key': value
    lines: Sequence[Mapping[str, Any]]  # metrics.jsonl
    knn: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    verdict: str  # a word; empty before the first step
    evaluations: Mapping[tuple[str, str, str], Mapping[str, Any]]  # (data, protocol, figure): value, low, high

    @property
    def batch(self) -> int:
        return int(self.settings["train.global_batch_size"])

    @property
    def finished(self) -> bool:
        ended = self.summary.get("status", FINISHED) == FINISHED  # summaries of 0.1.0's first days have none
        return ended and bool(self.lines) and self.summary.get("steps") == self.lines[-1]["step"]


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """Raises UserError for what is no run."""
    return [_read(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many before it as tell them apart; the same folder again gets a number."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    names = []
    for number, path in enumerate(paths):
        others = [other for other in paths if other != path]
        depths = range(1, len(path.parts) + 1)
        tail = next((path.parts[-n:] for n in depths if all(path.parts[-n:] != other.parts[-n:] for other in others)), path.parts)
        again = paths[:number].count(path)
        names.append(str(Path(*tail)) + (f" ({again + 1})" if again else ""))
    return names


def figures(run: RunFiles) -> dict[str, str]:
    """The run in a dozen figures, as words."""
    trained = [record for record in run.knn if record.get("features") not in ("pixels", "untrained")]
    known = knn_summary(run.knn, trained[-1]["step"] if trained else None)
    points = gain(known)
    last = run.lines[-1] if run.lines else {}
    best = max(trained, key=lambda record: record["top1"], default=None)
    steps = f"{last['step']:,}" if last else "0"
    return {
        "steps": steps + ("" if run.finished else " (unfinished)"),
        "images seen": f"{last['images_seen']:,}" if last else "0",
        "verdict": run.verdict or NOTHING,
        "seed": str(run.settings["run.seed"]),
        "loss, last": _number(last.get("loss")),
        "k-NN, raw pixels": _percent(known["knn_pixels"]),
        "k-NN, untrained": _percent(known["knn_untrained"]) + (", statistics adapted" if known["knn_adapted"] else ""),
        "k-NN, last": _percent(known["knn_final"]),
        "k-NN, last over untrained": NOTHING if points is None else f"{points:+.1f} points",
        "k-NN at k = 1, last": _percent(known["knn1_final"]),
        "k-NN, best": f"{_percent(best['top1'])} at step {best['step']:,}" if best else NOTHING,
        "embedding spread, last": _number(last.get("embedding_std")),
        "effective rank, last": _number(last.get("effective_rank")),
        "alignment, last": _number(last.get("alignment")),
        "uniformity, last": _number(last.get("uniformity")),
        "use of the memory, last": _number(last.get("memory_usage")),
        "images/s, median": _number(_median(run, "images_per_s")),
        "waiting for data, median": _percent(_median(run, "data_wait")),
        "wall time": _duration(run.summary.get("wall_s")),
    }


def figure_table(runs: Sequence[RunFiles]) -> list[list[str]]:
    """Lines of the table, the head first; figures that no run has are left out."""
    found = [figures(run) for run in runs]
    lines = [[name, *(each[name] for each in found)] for name in found[0]]
    return [["", *(run.name for run in runs)], *(line for line in lines if set(line[1:]) != {NOTHING})]


def evaluation_table(runs: Sequence[RunFiles]) -> list[list[str]]:
    """A line a figure of `massl-ray evaluate`, the head first; empty where there is none."""
    wanted = dict.fromkeys(key for run in runs for key in run.evaluations)
    if not wanted:
        return []
    lines = [[" ".join(key), *(_figure(run.evaluations.get(key)) for run in runs)] for key in wanted]
    return [["", *(run.name for run in runs)], *lines]


def settings_table(runs: Sequence[RunFiles]) -> list[list[str]]:
    """Settings that differ, the head first."""
    names = dict.fromkeys(key for run in runs for key in run.settings if key not in IDLE)
    values = {key: [_value(run.settings.get(key)) for run in runs] for key in names}
    return [["", *(run.name for run in runs)], *([key, *each] for key, each in values.items() if len(set(each)) > 1)]


def cautions(runs: Sequence[RunFiles]) -> list[str]:
    """What cannot be compared, though it stands side by side: sentences."""
    differing = {line[0] for line in settings_table(runs)[1:]}
    said = []
    if loss := sorted(key for key in differing if key.startswith(("memory.", "loss.")) or key == "head.dim"):
        said.append(f"Losses are on different scales, because of {', '.join(loss)}.")
    sides = {
        tuple(record.get(key) for key in ("k", "temperature", "bank_images", "query_images")) for run in runs for record in run.knn
    }
    data = sorted(key for key in differing if key in ("data.source", "data.test_source", "eval.crop", "eval.max_images"))
    adapted = {record.get("adapted") for run in runs for record in run.knn if record.get("features") == "untrained"}
    if any(adapted) and None in adapted:
        said.append("Some of the runs are old: their untrained backbone's statistics were not adapted, so they seem to gain more.")
    if any(run.knn for run in runs) and (len(sides) > 1 or data):
        said.append("k-NN accuracies were not measured alike: " + (f"{', '.join(data)} differ." if data else "images or k differ."))
    if len({run.lines[-1]["images_seen"] for run in runs if run.lines}) > 1:
        said.append("The runs saw different numbers of images so far: last values are not of the same moment.")
    if len({run.settings["run.seed"] for run in runs}) == 1 and len(differing) > 0:
        said.append("Each run has one seed: how much of a difference is chance, only more seeds tell (massl-ray sweep).")
    return said


def curve(run: RunFiles, key: str, most: int = 300) -> tuple[list[float], list[float]]:
    """Images seen and a metric, of at most `most` points: means of as many equal parts where there are more lines."""
    points = [(line["images_seen"], line[key]) for line in run.lines if isinstance(line.get(key), int | float)]
    parts = min(most, len(points))
    cuts = [len(points) * part // parts for part in range(parts + 1)] if parts else []
    groups = [points[first:last] for first, last in zip(cuts, cuts[1:], strict=False)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [float(x) for x, _ in means], [float(y) for _, y in means]


def knn_curve(run: RunFiles) -> tuple[list[float], list[float]]:
    """Images seen and accuracy in percent; the untrained backbone's is at 0."""
    records = [record for record in run.knn if record.get("features") != "pixels"]
    return [float(record["step"] * run.batch) for record in records], [100.0 * record["top1"] for record in records]


def as_json(runs: Sequence[RunFiles]) -> dict[str, Any]:
    return {
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "finished": run.finished,
                "verdict": run.verdict or None,
                "last": dict(run.lines[-1]) if run.lines else None,
                "knn": [dict(record) for record in run.knn],
                "summary": dict(run.summary),
                "evaluations": [
                    dict(zip(("data", "protocol", "figure"), key, strict=True)) | dict(value)
                    for key, value in run.evaluations.items()
                ],
            }
            for run in runs
        ],
        "differing_settings": {line[0]: [run.settings.get(line[0]) for run in runs] for line in settings_table(runs)[1:]},
        "cautions": cautions(runs),
    }


def _read(folder: Path, name: str) -> RunFiles:
    config = folder / "config.toml"
    if not config.is_file():
        raise UserError(f"{folder} is no run directory: it has no config.toml. Give directories of --run.dir on this machine.")
    try:
        settings = keys(recorded_toml(config.read_text(), str(config)))
        summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else {}
        lines = [line for line in read_metrics(folder) if {"step", "images_seen"} <= line.keys()]
        finding = read_verdict(folder, lines)
        verdict = str(finding.verdict) if finding else ""
        return RunFiles(name, folder, settings, lines, read_knn(folder), dict(summary), verdict, _evaluations(folder / "eval"))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} holds files that are not those of a run ({type(error).__name__}: {error}).") from None


def _evaluations(folder: Path) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """Of the run's own checkpoints, the latest where a figure was taken of several."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("evaluation_*.json"))]
    own = [record for record in records if isinstance(record["from"].get("step"), int)]
    return {
        (str(record["data"]["name"]), protocol, figure): value
        for record in sorted(own, key=lambda record: record["from"]["step"])
        for protocol, part in record["protocols"].items()
        for figure, value in part["figures"].items()
    }


def _median(run: RunFiles, key: str) -> float | None:
    values = [line[key] for line in run.lines if isinstance(line.get(key), int | float)]
    return median(values) if values else None


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return NOTHING
    return f"{value:.3f}" if abs(value) < 10 or not math.isfinite(value) else f"{value:,.1f}"


def _percent(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else NOTHING


def _duration(value: Any) -> str:
    from massl_ray.reporting.console import duration

    return duration(value) if isinstance(value, int | float) else NOTHING


def _figure(value: Mapping[str, Any] | None) -> str:
    if value is None or not isinstance(value.get("value"), int | float):
        return NOTHING
    low, high = value.get("low"), value.get("high")
    return _number(value["value"]) + (f" [{_number(low)}, {_number(high)}]" if low is not None and high is not None else "")


def _value(value: Any) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return in_a_line(redacted(shown)) or "(empty)"
