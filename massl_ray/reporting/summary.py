"""summary.json: a run that has ended, however it did, in a dozen figures read off the files of its run directory."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from massl_ray.reporting.yardstick import knn_summary
from massl_ray.storage import Place
from massl_ray.training.checkpoint import list_checkpoints, read_manifest
from massl_ray.training.run import write_json
from massl_ray.training.verdict import Facts, Finding, judge

FINISHED = "finished"


def write_summary(run_dir: Path, checkpoints: Place, wall_s: float, status: str = FINISHED) -> dict[str, Any] | None:
    """Gather and write summary.json; `wall_s` is this command's time in seconds, `status` that of the run's Outcome. None, and no
    file, where no step was taken."""
    lines = read_metrics(run_dir)
    if not lines:
        return None
    last, verdict = lines[-1], read_verdict(run_dir, lines)
    summary = {
        "status": status,
        "steps": last["step"],
        "images_seen": last["images_seen"],
        "loss_final": last["loss"],
        **knn_summary(read_knn(run_dir), last["step"]),
        "verdict": verdict and str(verdict.verdict),
        "verdict_text": verdict and verdict.text,
        "images_per_s": median(line["images_per_s"] for line in lines),
        "wall_s": wall_s,
        "state_sha256": _hash_at(last["step"], checkpoints),
    }
    write_json(run_dir / "summary.json", summary)
    return summary


def _hash_at(step: int, checkpoints: Place) -> str | None:
    """Of the state after that step; None where the newest checkpoint is of another one, or there is none."""
    saved = list_checkpoints(checkpoints)
    manifest = read_manifest(saved[-1]) if saved else {}
    return manifest["state_sha256"] if manifest.get("step") == step else None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, a dict a step. A line cut short, by a crash or because it is being written, ends it."""
    path = run_dir / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def read_knn(run_dir: Path) -> list[dict[str, Any]]:
    """The k-NN records of eval/, by step; raw pixels first."""
    records = [json.loads(path.read_text()) for path in (run_dir / "eval").glob("knn_*.json")]
    return sorted(records, key=lambda record: (record["features"] != "pixels", record["step"]))


def read_verdict(run_dir: Path, lines: Sequence[Mapping[str, Any]]) -> Finding | None:
    """On a run, finished or not, by its files; `lines` are those of its metrics.jsonl. None where they do not tell."""
    if not (run_dir / "config.toml").exists():
        return None
    return judge(lines, read_knn(run_dir), Facts.of(tomllib.loads((run_dir / "config.toml").read_text())))
