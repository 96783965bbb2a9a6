"""Trials: names, settings files, what is read off their directories, and points over their seeds."""

import json
import math
import statistics

import pytest

from massl_ray.config import load, read_toml
from massl_ray.config.space import Plan
from massl_ray.sweeping.trials import (
    Outcome,
    Row,
    Trial,
    folder_of,
    is_over,
    read_outcome,
    row_of,
    scores,
    trials_of,
    write_outcome,
    write_settings,
)

TRIAL = Trial("3-seed-1", {"memory.size": 512, "loss.teacher_temp": 0.05}, 1)


def row(point: int, seed: int, knn: float, status: str = "finished", **more) -> Row:
    figures = {"images_seen": 640, "effective_rank": 2.0, "loss": 1.0, "knn_step": 10, "steps": 10} | more
    return Row(Trial(f"{point}-{seed}", {"memory.size": point}, seed), status, "", 1.0, knn=knn, **figures)


def test_seed_by_seed():
    trials = trials_of(Plan(tuple({"memory.size": size} for size in range(2, 13)), ()), (0, 7))
    assert [trial.name for trial in trials[:2]] == ["00-seed-0", "01-seed-0"] and trials[-1].name == "10-seed-7"
    assert trials[11] == Trial("00-seed-7", {"memory.size": 2}, 7) and len(trials) == 22


def test_settings_are_those_of_the_command(tmp_path):
    base = load(["--train.steps", "6"])
    path = write_settings(tmp_path, TRIAL, base, 2, shared=True)
    config = load(["--config", str(path)])
    assert (config.memory.size, config.loss.teacher_temp, config.run.seed, config.train.steps) == (512, 0.05, 1, 6)
    assert config.run.dir == str(tmp_path / "trials" / "3-seed-1")
    assert (config.elastic.min_workers, config.elastic.max_workers, config.elastic.view_tasks) == (1, 2, 1)
    alone = read_toml(write_settings(tmp_path, TRIAL, base, 1, shared=False))
    assert alone["elastic"]["view_tasks"] == "auto"


@pytest.mark.parametrize(
    ("status", "over"), [("finished", True), ("stopped early", True), ("failed", False), ("out of memory", False)]
)
def test_what_is_over(tmp_path, status, over):
    assert read_outcome(tmp_path, TRIAL) is None and not is_over(tmp_path, TRIAL)
    outcome = Outcome(status, 12.5, "why")
    write_outcome(tmp_path, TRIAL, outcome)
    assert read_outcome(tmp_path, TRIAL) == outcome and is_over(tmp_path, TRIAL) == over


def test_a_row_is_read_off_the_files(tmp_path):
    folder = folder_of(tmp_path, TRIAL)
    waiting = row_of(tmp_path, TRIAL)
    assert (waiting.status, waiting.images_seen) == ("waiting", 0) and math.isnan(waiting.knn) and math.isnan(waiting.loss)
    (folder / "eval").mkdir(parents=True)
    for name, step, top1 in (("pixels", 0, 0.9), ("untrained", 0, 0.8)):
        (folder / "eval" / f"knn_{name}.json").write_text(json.dumps({"features": name, "step": step, "top1": top1}))
    assert math.isnan(row_of(tmp_path, TRIAL).knn)  # nothing trained yet
    for step, top1 in ((20, 0.3), (100, 0.2)):
        record = {"features": f"step_{step}", "step": step, "top1": top1}
        (folder / "eval" / f"knn_step_{step}.json").write_text(json.dumps(record))
    lines = [{"step": step, "images_seen": 64 * step, "loss": 5 / step, "effective_rank": step} for step in (50, 125)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12')
    write_outcome(tmp_path, TRIAL, Outcome("failed", 3.0, "it broke"))
    found = row_of(tmp_path, TRIAL)
    assert found == Row(TRIAL, "failed", "it broke", 3.0, 8000, 0.2, 100, 125, 125.0, 0.04)
    assert [found.measured_at(name) for name in ("knn", "loss", "effective_rank")] == [6400, 8000, 8000]


def test_points_over_their_seeds():
    rows = [
        row(1, 0, 0.5),
        row(1, 1, 0.7),
        row(2, 0, 0.65),
        row(2, 1, 0.6),
        row(3, 0, 0.9),
        row(4, 0, 0.9, "failed"),
        row(5, 0, math.nan),
    ]
    found = scores(rows, "knn")
    assert [(score.point["memory.size"], score.seeds) for score in found] == [(2, 2), (1, 2), (3, 1)]  # one seed is not enough
    assert found[0].mean == pytest.approx(0.625) and found[0].spread == pytest.approx(statistics.stdev([0.65, 0.6]))
    assert math.isnan(found[2].spread)


def test_less_loss_is_better():
    rows = [row(1, 0, 0.5, loss=3.0), row(2, 0, 0.4, loss=2.0)]
    assert [score.point["memory.size"] for score in scores(rows, "loss")] == [2, 1]
    assert [score.point["memory.size"] for score in scores(rows, "knn")] == [1, 2]
