"""The command: one JSON object with the agreed fields, no Ray, operations counted right."""

import json
import math
import sys

import pytest
import torch

from massl_ray.bench import main
from massl_ray.benches import readout, step
from massl_ray.config import load
from massl_ray.method.step import METRICS
from tests.images import TINY


def test_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["readuot"])
    assert stop.value.code == 2 and "readout" in capsys.readouterr().err


def test_readout_fields(capsys, monkeypatch):
    """On a small memory; peaks are measured in processes that have the real sizes, so they are stood in for here."""
    monkeypatch.setattr(readout, "SIZE", 2048)
    monkeypatch.setattr(readout, "BLOCK", 512)
    monkeypatch.setattr(readout, "GROWTH", (512, 1024))
    monkeypatch.setattr(readout, "_peak", lambda device, dtype, batch, size, side: {"plain": 100, "ours": 2}[side])
    assert main(["readout", "--json", "--rounds", "1", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["memory_ratio"] == 50 and result["time_ratio"] == result["ratio"] > 0
    assert result["loss_difference"] < 1e-5
    assert set(result["growth"]["seconds"]) == {"512", "1024"} and result["growth"]["memory_growth"] == 0
    assert 0 < result["matmul_share"] < 2


def test_readout_flops_by_hand():
    """2 views and 2 teacher rows of 1 image, 3 slots, width 5: 4 x 3 x 5 multiply-adds, twice."""
    assert readout.readout_flops(2, 1, 3, 5) == 2 * 2 * 4 * 3 * 5


def test_step_flops_of_a_head():
    """The student's backward costs twice its forward but for the first layer's input gradient; the teacher sees two views."""
    config = load([*TINY, "--train.micro_batch_size", "8"])
    flops = step.step_flops(config)
    assert 2.5 * flops["teacher"] < flops["student"]
    assert flops["readout"] == readout.readout_flops(4, 8, 64, 16)


def test_benches_need_no_ray():
    import subprocess

    code = "import sys, massl_ray.benches.readout, massl_ray.benches.step; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_step_sides_run(monkeypatch):
    """Both sides take a step of a small configuration; the reference uses timm's own stochastic depth."""
    config = load([*TINY, "--train.micro_batch_size", "8"])
    monkeypatch.setattr(step, "IMAGES", 48)
    plain, ours = step.calls(config, torch.device("cpu"))
    metrics = ours()
    assert metrics.isfinite().all() and metrics[METRICS.index("grad_norm")] > 0
    for loss in (plain(), metrics[METRICS.index("loss")].item()):
        assert loss == pytest.approx(math.log(32), rel=0.3)  # untrained, in blocks of 32 slots
