"""massl-ray sweep: mistakes, and real sweeps on a real Ray, killed and continued."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from massl_ray.sweep import main
from tests.images import TINY
from tests.test_train import plain_environment

SPEC = """
[sweep]
metric = "loss"
at_once = 1
[settings.train]
steps = 6
[space]
"model.backbone" = {choice = ["test_vit", "test_vit2", "no_such_net"]}
"""


@pytest.fixture
def flags(tiny_images, tmp_path) -> list[str]:
    (tmp_path / "spec.toml").write_text(SPEC)
    tiny = TINY[2:]  # without --config
    return [str(tmp_path / "spec.toml"), *tiny, "--data.source", str(tiny_images), "--train.checkpoint_every", "2"]


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "massl_ray.sweep", *arguments]
    return subprocess.Popen(command, env=plain_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def whole(*arguments: str) -> str:
    """What a sweep that goes well prints."""
    process = start(*arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def once_there(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


def results(root: Path) -> list[list[str]]:
    """Without the times."""
    return [[value for key, value in row.items() if key != "seconds"] for row in csv.DictReader((root / "results.csv").open())]


def test_mistakes_are_one_sentence(flags, tiny_images, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    image = next(path for path in tiny_images.rglob("*") if path.is_file())
    (tmp_path / "flat" / image.name).write_bytes(image.read_bytes())
    (tmp_path / "knn.toml").write_text(SPEC.replace('"loss"', '"knn"'))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for argv, words in (
        ([], "Give a file like those in sweeps/"),
        (["nowhere.toml"], "nowhere.toml cannot be read"),
        ([*flags, "--memory.sise", "3"], "There is no setting 'memory.sise'"),
        ([*flags, "--run.dir", str(tmp_path / "full")], f"{tmp_path}/full exists and is not a sweep. Choose another"),
        (["--resume", str(tmp_path / "full")], f"{tmp_path}/full holds no sweep"),
        ([str(tmp_path / "knn.toml"), "--data.source", str(tmp_path / "flat")], "no labels, so no trial would report it"),
        (["--resume", str(tmp_path), "--train.steps", "3"], "--resume takes a directory and nothing else"),
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and words in err and err.count("\n") == 1, argv


@pytest.mark.ray
@pytest.mark.slow
def test_killed_and_continued(flags, tmp_path):
    """One of three trials cannot run, which the others do not mind. A sweep whose command is killed ends with the same table."""
    out = whole(*flags, "--run.dir", str(tmp_path / "whole"))
    expected = results(tmp_path / "whole")
    assert [row[3] for row in expected] == ["finished", "finished", "failed"] and "no_such_net" in expected[2][4]
    assert "2-seed-0  failed in" in out and (tmp_path / "whole" / "trials" / "0-seed-0" / "summary.json").exists()

    root = tmp_path / "often"
    killed = start(*flags, "--run.dir", str(root))
    once_there(root / "trials" / "1-seed-0" / "checkpoints" / "step_2", killed)
    killed.kill()
    killed.communicate()
    first = root / "trials" / "0-seed-0" / "trial.json"
    written = os.stat(first).st_mtime_ns
    assert [row[3] for row in results(root)] == ["finished", "waiting", "waiting"]  # also in the middle
    whole("--resume", str(root))
    assert results(root) == expected and os.stat(first).st_mtime_ns == written  # not repeated

    other = start(*flags, "--run.dir", str(root), "--train.steps", "7")
    _, err = other.communicate()
    assert other.returncode == 2 and f"{root} holds a sweep of another space or other settings" in err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_by_a_signal(flags, tmp_path, number):
    """By Ctrl-C, or as `ray job stop` does it: one sentence."""
    root = tmp_path / "sweep"
    process = start(*flags, "--run.dir", str(root))
    once_there(root / "trials" / "0-seed-0" / "checkpoints" / "step_2", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume DIR, goes on with it" in err
    assert "SIGTERM received" not in err
    assert [row[3] for row in results(root)] == ["waiting"] * 3


@pytest.mark.ray
@pytest.mark.slow
def test_trials_that_lag_behind_end_early(flags, tmp_path):
    """By successive halving at equal images: of two trials, the one of the larger loss is over at the first look that tells."""
    (tmp_path / "spec.toml").write_text(
        '[sweep]\nmetric = "loss"\nscheduler = "asha"\nat_once = 1\n'
        "[settings.train]\nsteps = 90\nlog_every = 1\n"
        '[space]\n"memory.size" = {choice = [16, 256]}\n'
    )
    root = tmp_path / "sweep"
    whole(*flags, "--run.dir", str(root))
    first, second = csv.DictReader((root / "results.csv").open())
    assert first["status"] == "finished" and int(first["images_seen"]) == 90 * 8
    assert second["status"] == "stopped early" and int(second["images_seen"]) < 90 * 8


@pytest.mark.ray
@pytest.mark.slow
def test_a_population_hands_weights_on(flags, tmp_path):
    """After its first generation the worst member begins with the best one's weights, to the bit, and other settings."""
    (tmp_path / "spec.toml").write_text(
        '[sweep]\nmetric = "loss"\nscheduler = "population"\ngenerations = 2\nat_once = 1\n'
        '[settings.train]\nsteps = 8\n[space]\n"loss.student_temp" = {grid = [0.1, 0.4]}\n'
    )
    root = tmp_path / "sweep"
    out = whole(*flags, "--run.dir", str(root), "--checkpoint.keep", "9")
    assert "Trials    2 in 2 generations" in out
    rows = list(csv.DictReader((root / "results.csv").open()))
    first, second = rows[:2], rows[2:]
    assert [row["status"] for row in rows] == ["finished"] * 4 and [row["images_seen"] for row in rows] == ["32", "32", "64", "64"]
    losses = [float(row["loss"]) for row in first]
    best, worst = sorted(range(2), key=lambda member: losses[member])
    parents = [row["parent"] for row in second]
    assert parents == [first[best]["trial"]] * 2
    for row in second:
        checkpoints = [root / "trials" / name / "checkpoints" / "step_4" for name in (row["parent"], row["trial"])]
        parent, child = (json.loads((checkpoint / "manifest.json").read_text()) for checkpoint in checkpoints)
        assert child["state_sha256"] == parent["state_sha256"]
    changed = [row["loss.student_temp"] != first[best]["loss.student_temp"] for row in second]
    assert changed == [member == worst for member in range(2)]
    metrics = (root / "trials" / second[worst]["trial"] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [5, 6, 7, 8]


SHORT_OF_MEMORY = '''
"""A GPU that holds micro-batches of 4 images."""
import sys
from importlib.machinery import PathFinder

class Short:
    def find_spec(self, name, path=None, target=None):
        if name != "massl_ray.method.step":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            step = module.train_step

            def train_step(state, batch, *rest):
                if len(batch.micro_batches[0].global_views) > 4:
                    import torch

                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
                return step(state, batch, *rest)

            module.train_step = train_step

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Short())
'''


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_out_of_memory_has_smaller_micro_batches(flags, tmp_path, monkeypatch):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "sitecustomize.py").write_text(SHORT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "gpu"))
    (tmp_path / "spec.toml").write_text(
        '[sweep]\nmetric = "loss"\n[settings.train]\nsteps = 2\n[space]\n"loss.student_temp" = {choice = [0.1]}\n'
    )
    root = tmp_path / "sweep"
    whole(*flags, "--run.dir", str(root), "--train.micro_batch_size", "8")
    (row,) = csv.DictReader((root / "results.csv").open())
    assert (row["status"], row["train.micro_batch_size"]) == ("finished", "4")
    assert "micro_batch_size = 4" in (root / "best.toml").read_text()
