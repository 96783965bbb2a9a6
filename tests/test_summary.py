"""summary.json: a dozen figures, each read off the file that it comes from."""

import json
from pathlib import Path

import pytest
import torch

from massl_ray.reporting.summary import read_knn, read_metrics, write_summary
from massl_ray.training.checkpoint import write_checkpoint
from massl_ray.training.state import state_sha256
from massl_ray.training.verdict import ADVICE, Verdict
from tests.helpers import dead_lines, metrics_line


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"step": torch.tensor(step), "student/weight": torch.arange(6.0) * step}


def write_lines(run_dir: Path, lines: list[dict], tail: str = "") -> Path:
    path = run_dir / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def write_knn(run_dir: Path, **accuracies: float) -> None:
    (run_dir / "eval").mkdir(exist_ok=True)
    for name, accuracy in accuracies.items():
        step = int(name.removeprefix("step_")) if name.startswith("step_") else 0
        record = {"features": name, "step": step, "top1": accuracy, "top1_k1": accuracy / 2, "query_images": step * 10}
        record |= {"adapted": True} if name == "untrained" else {}
        (run_dir / "eval" / f"knn_{name}.json").write_text(json.dumps(record))


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A finished run of 12 steps."""
    write_lines(
        tmp_path, [metrics_line(step, images_per_s=float(rate)) for step, rate in zip((4, 8, 12), (10, 90, 40), strict=True)]
    )
    (tmp_path / "config.toml").write_text("memory = { size = 64, num_blocks = 2 }\ntrain = { steps = 12 }\n")
    for step in (8, 12):
        write_checkpoint(tmp_path / "checkpoints", tensors(step), {}, keep=2)
    return tmp_path


def test_exactly_these_figures(run_dir):
    write_knn(run_dir, pixels=0.5, untrained=0.6, step_8=0.7, step_12=0.8)
    summary = write_summary(run_dir, run_dir / "checkpoints", wall_s=12.5)
    assert summary == {
        "status": "finished",
        "steps": 12,
        "images_seen": 96,
        "loss_final": pytest.approx(2.8),
        "knn_pixels": 0.5,
        "knn_untrained": 0.6,
        "knn_final": 0.8,
        "knn1_pixels": 0.25,
        "knn1_untrained": 0.3,
        "knn1_final": 0.4,
        "knn_adapted": True,
        "knn_queries": 120,
        "verdict": "healthy",
        "verdict_text": "At step 12 it is too early to tell more than that all figures are finite.",
        "images_per_s": 40.0,  # the median
        "wall_s": 12.5,
        "state_sha256": state_sha256(tensors(12)),
    }
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert list(summary) == list(json.loads((run_dir / "summary.json").read_text()))
    assert state_sha256(tensors(12)) != state_sha256(tensors(8))


def test_a_dead_run_is_no_success(run_dir):
    write_lines(run_dir, dead_lines(20))
    summary = write_summary(run_dir, run_dir / "checkpoints", wall_s=1.0)
    assert (
        summary["verdict"] == "dead"
        and "the run is dead" in summary["verdict_text"]
        and ADVICE[Verdict.DEAD] in summary["verdict_text"]
    )
    (run_dir / "config.toml").unlink()
    assert write_summary(run_dir, run_dir / "checkpoints", wall_s=1.0)["verdict"] is None


def test_a_run_that_was_stopped_between_two_checkpoints(run_dir):
    write_lines(run_dir, [metrics_line(step) for step in (12, 13)])
    summary = write_summary(run_dir, run_dir / "checkpoints", wall_s=1.0, status="stopped")
    assert (summary["status"], summary["steps"], summary["state_sha256"]) == ("stopped", 13, None)


def test_nothing_is_written_of_a_run_without_a_step(run_dir):
    write_lines(run_dir, [])
    assert write_summary(run_dir, run_dir / "checkpoints", 1.0, "failed") is None and not (run_dir / "summary.json").exists()


def test_without_knn(run_dir):
    summary = write_summary(run_dir, run_dir / "checkpoints", wall_s=1.0)
    assert [value for key, value in summary.items() if key.startswith("knn")] == [None] * 8


def test_final_knn_is_that_of_the_last_step(run_dir):
    write_knn(run_dir, pixels=0.5, step_8=0.7)
    assert write_summary(run_dir, run_dir / "checkpoints", wall_s=1.0)["knn_final"] is None


def test_metrics_come_back(run_dir):
    assert [line["step"] for line in read_metrics(run_dir)] == [4, 8, 12]
    assert read_metrics(run_dir)[0] == metrics_line(4, images_per_s=10.0)


@pytest.mark.parametrize("tail", ['{"step": 16, "lo', "{", "\x00\x00\x00"])
def test_a_line_cut_short_ends_the_metrics(run_dir, tail):
    write_lines(run_dir, [metrics_line(4), metrics_line(8)], tail)
    assert [line["step"] for line in read_metrics(run_dir)] == [4, 8]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == [] and read_knn(tmp_path) == []


def test_knn_by_step_pixels_first(run_dir):
    write_knn(run_dir, step_100=0.9, step_8=0.7, untrained=0.6, pixels=0.5, step_20=0.8)
    (run_dir / "eval" / "neighbours.json").write_text("[]")
    assert [record["features"] for record in read_knn(run_dir)] == ["pixels", "untrained", "step_8", "step_20", "step_100"]
