"""What a sweep leaves: the table, the best settings, the page."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest

from massl_ray.config import load
from massl_ray.config.space import Sweep, base_of
from massl_ray.sweeping import results
from massl_ray.sweeping.page import importance
from massl_ray.sweeping.results import Interim, to_table, write_results
from massl_ray.sweeping.trials import Outcome, Row, Trial, folder_of, write_outcome
from tests.helpers import metrics_line
from tests.test_html import Page

SPEC = Sweep(space={"memory.size": {"choice": [64, 128]}, "memory.num_blocks": {"choice": [2, 4]}})  # type: ignore[dict-item]


def write_trial(root: Path, name: str, size: int, blocks: int, seed: int, top1: float | None, status: str = "finished") -> Trial:
    trial = Trial(name, {"memory.size": size, "memory.num_blocks": blocks}, seed)
    folder = folder_of(root, trial)
    (folder / "eval").mkdir(parents=True)
    if top1 is not None:
        (folder / "metrics.jsonl").write_text(json.dumps(metrics_line(10)) + "\n")
        (folder / "config.toml").write_text("memory = { size = 64, num_blocks = 2 }\ntrain = { steps = 10 }\n")
        record = {"features": "step_10", "step": 10, "top1": top1}
        (folder / "eval" / "knn_step_10.json").write_text(json.dumps(record))
    if status != "waiting":
        write_outcome(root, trial, Outcome(status, 30.0, "<b>no</b> memory" if status == "failed" else ""))
    return trial


@pytest.fixture
def trials(tmp_path) -> list[Trial]:
    figures = {(64, 2): (0.50, 0.52), (64, 4): (0.60, 0.62), (128, 2): (0.40, 0.42)}
    made = [
        write_trial(tmp_path, f"{size}-{blocks}-{seed}", size, blocks, seed, top1)
        for (size, blocks), both in figures.items()
        for seed, top1 in enumerate(both)
    ]
    return [*made, write_trial(tmp_path, "f", 128, 4, 0, None, "failed"), write_trial(tmp_path, "w", 128, 4, 1, None, "waiting")]


def test_results(tmp_path, trials):
    base = base_of(SPEC, {"train": {"steps": 10}})
    found = write_results(tmp_path, SPEC, base, trials)
    assert [tuple(score.point.values()) for score in found] == [(64, 4), (64, 2), (128, 2)]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 8 and list(rows[0])[:5] == ["trial", "memory.size", "memory.num_blocks", "run.seed", "status"]
    assert rows[3] | {"trial": "64-4-1", "memory.size": "64", "memory.num_blocks": "4", "run.seed": "1", "knn": "0.62"} == rows[3]
    assert [row["verdict"] for row in rows] == ["healthy"] * 6 + [""] * 2
    assert (rows[6]["status"], rows[6]["cause"], rows[6]["knn"]) == ("failed", "<b>no</b> memory", "")
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet")
    assert table["knn"].to_pylist() == [0.50, 0.52, 0.60, 0.62, 0.40, 0.42, None, None]
    best = load(["--config", str(tmp_path / "best.toml")])
    assert (best.memory.size, best.memory.num_blocks, best.train.steps, best.run.dir) == (64, 4, 10, str(tmp_path / "best"))


def test_gains_are_over_the_untrained_backbone(tmp_path, trials):
    for trial, untrained in zip(trials[:2], (0.475, 0.54), strict=True):
        record = {"features": "untrained", "step": 0, "top1": untrained, "adapted": True}
        (folder_of(tmp_path, trial) / "eval" / "knn_untrained.json").write_text(json.dumps(record))
    write_results(tmp_path, SPEC, base_of(SPEC), trials)
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet")
    assert table["gain"].to_pylist() == [pytest.approx(2.5), pytest.approx(-2.0), *[None] * 6]
    texts = Page(tmp_path / "report.html").texts
    assert "k-NN over untrained" in texts and "+2.5 points" in texts and "-2.0 points" in texts


def test_the_page(tmp_path, trials):
    write_results(tmp_path, SPEC, base_of(SPEC), trials)
    page = Page(tmp_path / "report.html")
    assert "memory.size 64, memory.num_blocks 4" in page.text and "61.0%" in page.texts
    # two points of two seeds each: 10 points apart, deviations of 1.4
    assert "It leads by 10.0%, more than twice the standard error of such a difference (1.4%)." in page.text
    assert list(page.images()) == [
        "k-NN accuracy (%) by memory",
        "k-NN accuracy by memory.size",
        "k-NN accuracy by memory.num_blocks",
        "Variance that each setting explains alone",
        "Points side by side (orange: the best)",
        "k-NN accuracy on the way",
    ]
    assert "failed: <b>no</b> memory" in page.texts  # as text
    assert page.texts.count("verdict") == 1 and page.texts.count("healthy") == 6
    assert {attributes["href"] for tag, attributes in page.tags if tag == "a"} == {
        f"trials/{trial.name}/report.html" for trial in trials[:6]
    }


def test_smaller_micro_batches_are_said_and_kept(tmp_path, trials):
    best = next(trial for trial in trials if trial.name == "64-4-1")
    write_outcome(tmp_path, best, Outcome("finished", 30.0, "", 16))
    write_results(tmp_path, SPEC, base_of(SPEC), trials)
    rows = {row["trial"]: row for row in csv.DictReader((tmp_path / "results.csv").open())}
    assert rows["64-4-1"]["train.micro_batch_size"] == "16" and rows["64-4-0"]["train.micro_batch_size"] == ""
    assert load(["--config", str(tmp_path / "best.toml")]).train.micro_batch_size == 16
    assert "finished, micro-batch 16" in Page(tmp_path / "report.html").texts


def test_what_it_cost(tmp_path, trials):
    priced = SPEC.model_copy(update={"sweep": SPEC.sweep.model_copy(update={"price": 2.0, "workers": 3})})
    write_results(tmp_path, priced, base_of(SPEC), trials)
    page = Page(tmp_path / "report.html")  # 30 s of 3 workers, 7 times
    assert page.texts.count("0.05") == 7 and "0.35" in page.texts and "at 2 an hour of a worker" in page.text


def test_a_population(tmp_path):
    """Figures of the last generation choose; the others are told from it, and who went on from whom is said."""
    spec = SPEC.model_copy(update={"sweep": SPEC.sweep.model_copy(update={"scheduler": "population", "generations": 2})})
    trials = []
    for name, blocks, parent, generation, top1 in (
        ("0-gen-0", 2, "", 0, 0.9),
        ("1-gen-0", 4, "", 0, 0.1),
        ("0-gen-1", 2, "0-gen-0", 1, 0.5),
        ("1-gen-1", 4, "0-gen-0", 1, 0.7),
    ):
        trial = write_trial(tmp_path, name, 64, blocks, 0, top1)
        trials.append(replace(trial, parent=parent, generation=generation))
    (found, _) = write_results(tmp_path, spec, base_of(SPEC), trials)
    assert (found.point["memory.num_blocks"], found.mean) == (4, 0.7)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["parent"] for row in rows] == ["", "", "0-gen-0", "0-gen-0"]
    page = Page(tmp_path / "report.html")
    assert "Generations (orange: took over another one's weights)" in list(page.images())
    assert page.texts.count("finished, from 0-gen-0") == 2


def test_nothing_has_finished(tmp_path):
    trial = write_trial(tmp_path, "w", 64, 2, 0, None, "waiting")
    assert write_results(tmp_path, SPEC, base_of(SPEC), [trial]) == []
    assert "No trial has finished yet." in Page(tmp_path / "report.html").texts and not (tmp_path / "best.toml").exists()


def test_interim_results_take_a_twentieth_of_the_time(monkeypatch):
    class Clock:
        now, written = 1000.0, 0

        def monotonic(self) -> float:
            return self.now

        def write(self) -> None:
            self.now, self.written = self.now + 2.0, self.written + 1

    clock = Clock()
    monkeypatch.setattr(results, "time", clock)
    interim = Interim(clock.write)
    counts = []
    for pause in (0.0, 1.0, 36.0, 1.0, 1.0):
        clock.now += pause
        interim()
        counts.append(clock.written)
    assert counts == [1, 1, 1, 2, 2]


def test_importance_by_hand():
    points = [{"a": a, "b": b} for a in (1, 2) for b in (1, 2)]
    shares = importance(points, [0.0, 1.0, 4.0, 5.0])  # 4 for each step of a, 1 of b: variances 4 and 0.25
    assert shares == pytest.approx({"a": 16 / 17, "b": 1 / 17})
    assert importance(points, [3.0] * 4) == {"a": 0.0, "b": 0.0}


def test_columns_of_any_kind():
    points = [
        {"model.backbone": "a", "data.test_source": None, "views.blur": (0.1, 0.2)},
        {"model.backbone": "b", "data.test_source": "x", "views.blur": (1, 2)},
    ]
    rows = [Row(Trial("t", point, 0), "finished", "", 1.0, None, 1, math.nan, 0, 1, 2.0, 3) for point in points]
    table = to_table(rows).to_pydict()
    assert table["model.backbone"] == ["a", "b"] and table["data.test_source"] == [None, "x"]
    assert table["views.blur"] == ["(0.1, 0.2)", "(1, 2)"]
    assert table["knn"] == [None, None] and table["loss"] == [3, 3]
