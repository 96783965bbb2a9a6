"""Trials: names, settings files, what is read off their directories, and points over their seeds."""

import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from massl_ray.config import Config, fill, keys, load, read_toml, resolve, to_toml
from massl_ray.sweeping.trials import (
    Outcome,
    Row,
    Trial,
    folder_of,
    hand_over,
    is_over,
    micro_batch_of,
    read_outcome,
    read_trials,
    row_of,
    scores,
    settings_of,
    shown,
    shrink,
    trials_of,
    write_outcome,
    write_settings,
    write_trials,
)
from massl_ray.training.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from tests.helpers import dead_lines

TRIAL = Trial("3-seed-1", {"memory.size": 512, "loss.teacher_temp": 0.05}, 1)


def row(point: int, seed: int, knn: float, status: str = "finished", **more) -> Row:
    figures = {"images_seen": 640, "effective_rank": 2.0, "loss": 1.0, "knn_step": 10, "steps": 10} | more
    return Row(Trial(f"{point}-{seed}", {"memory.size": point}, seed), status, "", 1.0, None, knn=knn, **figures)


def test_seed_by_seed():
    trials = trials_of([{"memory.size": size} for size in range(2, 13)], (0, 7))
    assert [trial.name for trial in trials[:2]] == ["00-seed-0", "01-seed-0"] and trials[-1].name == "10-seed-7"
    assert trials[11] == Trial("00-seed-7", {"memory.size": 2}, 7) and len(trials) == 22


def test_settings_are_those_of_the_command(tmp_path):
    base = load(["--train.steps", "6"])
    write_settings(tmp_path, TRIAL, base, 2, shared=True)
    config = load(["--config", str(settings_of(tmp_path, TRIAL))])
    assert (config.memory.size, config.loss.teacher_temp, config.run.seed, config.train.steps) == (512, 0.05, 1, 6)
    assert config.run.dir == str(tmp_path / "trials" / "3-seed-1")
    assert (config.elastic.min_workers, config.elastic.max_workers, config.elastic.view_tasks) == (1, 2, 1)
    write_settings(tmp_path, TRIAL, base, 1, shared=False)
    assert read_toml(settings_of(tmp_path, TRIAL))["elastic"]["view_tasks"] == "auto"


def write_run(root: Path, trial: Trial, base: Config) -> None:
    """As it lies there after a start: its own settings are filled in."""
    write_settings(root, trial, base, 1, shared=False)
    config = load(["--config", str(settings_of(root, trial))])
    folder_of(root, trial).mkdir(parents=True, exist_ok=True)
    (folder_of(root, trial) / "config.toml").write_text(to_toml(fill(config, resolve(config, 3_000))))


def test_smaller_micro_batches(tmp_path):
    """The largest divisor up to half, down to one image; the run begins anew."""
    sizes = []
    write_run(tmp_path, TRIAL, load(["--train.global_batch_size", "24", "--train.micro_batch_size", "auto"]))
    while shrink(tmp_path, TRIAL):
        assert not folder_of(tmp_path, TRIAL).exists()
        config = load(["--config", str(settings_of(tmp_path, TRIAL))])
        assert (config.memory.size, config.run.seed) == (512, 1)
        sizes.append(micro_batch_of(tmp_path, TRIAL))
        folder_of(tmp_path, TRIAL).mkdir(parents=True)
        (folder_of(tmp_path, TRIAL) / "config.toml").write_text(to_toml(fill(config, resolve(config, 3_000))))
    assert sizes == [12, 6, 3, 1]
    shutil.rmtree(folder_of(tmp_path, TRIAL))
    assert not shrink(tmp_path, TRIAL)  # it had not even begun


def test_a_sweep_that_goes_on_keeps_smaller_micro_batches(tmp_path):
    base = load(["--train.global_batch_size", "24", "--train.micro_batch_size", "24"])
    write_run(tmp_path, TRIAL, base)
    assert shrink(tmp_path, TRIAL)
    write_settings(tmp_path, TRIAL, base, 1, shared=False)  # the next command
    assert micro_batch_of(tmp_path, TRIAL) == 12


def test_a_child_goes_on_from_its_parents_checkpoint(tmp_path):
    parent, base = Trial("0-gen-0", {"optim.lr": 0.1}, 1, stop_at=30), load(["--train.steps", "90"])
    child = Trial("1-gen-1", {"optim.lr": 0.2}, 1, "0-gen-0", 1, 60)
    write_run(tmp_path, parent, base)
    for step in (20, 30):
        tensors = {"step": torch.tensor(step), "weights": torch.arange(step)}
        write_checkpoint(folder_of(tmp_path, parent) / "checkpoints", tensors, {}, keep=2)
    write_settings(tmp_path, child, base, 1, shared=False)
    for _ in range(2):  # the second time nothing is left to do
        hand_over(tmp_path, child)
        (handed,) = list_checkpoints(folder_of(tmp_path, child) / "checkpoints")
        tensors, manifest = read_checkpoint(handed)
        assert int(tensors["step"]) == 30 and torch.equal(tensors["weights"], torch.arange(30))
    config = load(["--config", str(folder_of(tmp_path, child) / "config.toml")])
    before = load(["--config", str(folder_of(tmp_path, parent) / "config.toml")])
    different = {key for key, value in keys(config).items() if keys(before)[key] != value}
    assert different == {"run.dir", "optim.lr", "train.stop_at"} and (config.optim.lr, config.train.stop_at) == (0.2, 60)
    hand_over(tmp_path, parent)  # has none itself
    assert len(list_checkpoints(folder_of(tmp_path, parent) / "checkpoints")) == 2


def test_trials_are_read_as_they_were_written(tmp_path):
    assert read_trials(tmp_path) == []
    trials = [TRIAL, Trial("1-gen-1", {"memory.num_blocks": 2}, 1, "0-gen-0", 1, 60)]
    write_trials(tmp_path, trials)
    assert read_trials(tmp_path) == trials


@pytest.mark.parametrize(
    ("status", "over"), [("finished", True), ("stopped early", True), ("failed", False), ("out of memory", False)]
)
def test_what_is_over(tmp_path, status, over):
    assert read_outcome(tmp_path, TRIAL) is None and not is_over(tmp_path, TRIAL)
    outcome = Outcome(status, 12.5, "why", 4)
    write_outcome(tmp_path, TRIAL, outcome)
    assert read_outcome(tmp_path, TRIAL) == outcome and is_over(tmp_path, TRIAL) == over


def test_a_row_is_read_off_the_files(tmp_path):
    folder = folder_of(tmp_path, TRIAL)
    waiting = row_of(tmp_path, TRIAL)
    assert (waiting.status, waiting.images_seen) == ("waiting", 0) and math.isnan(waiting.knn) and math.isnan(waiting.loss)
    (folder / "eval").mkdir(parents=True)
    for name, step, top1 in (("pixels", 0, 0.9), ("untrained", 0, 0.125)):
        (folder / "eval" / f"knn_{name}.json").write_text(json.dumps({"features": name, "step": step, "top1": top1}))
    assert math.isnan(row_of(tmp_path, TRIAL).knn)  # nothing trained yet
    for step, top1 in ((20, 0.3), (100, 0.2)):
        record = {"features": f"step_{step}", "step": step, "top1": top1}
        (folder / "eval" / f"knn_step_{step}.json").write_text(json.dumps(record))
    lines = [{"step": step, "images_seen": 64 * step, "loss": 5 / step, "effective_rank": step} for step in (50, 125)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12')
    write_outcome(tmp_path, TRIAL, Outcome("failed", 3.0, "it broke", 32))
    found = row_of(tmp_path, TRIAL)
    assert found == Row(TRIAL, "failed", "it broke", 3.0, 32, 8000, 0.2, 100, 125, 125.0, 0.04, pytest.approx(7.5))
    assert (shown("gain", found.gain), shown("gain", math.nan), shown("knn", found.knn)) == ("+7.5 points", "-", "20.0%")
    (folder / "config.toml").write_text("memory = { size = 64, num_blocks = 2 }\ntrain = { steps = 100 }\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dead_lines(20)))
    assert (found.verdict, row_of(tmp_path, TRIAL).verdict) == ("", "dead")
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


def test_the_last_generation_counts():
    rows = [row(1, 0, 0.9), row(2, 0, 0.5), row(3, 0, 0.6)]
    rows[1:] = [replace(each, trial=replace(each.trial, generation=1)) for each in rows[1:]]
    assert [score.point["memory.size"] for score in scores(rows, "knn")] == [3, 2]


def test_less_loss_is_better():
    rows = [row(1, 0, 0.5, loss=3.0), row(2, 0, 0.4, loss=2.0)]
    assert [score.point["memory.size"] for score in scores(rows, "loss")] == [2, 1]
    assert [score.point["memory.size"] for score in scores(rows, "knn")] == [1, 2]
