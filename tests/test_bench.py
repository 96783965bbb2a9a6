"""The command: one JSON object with the agreed fields, no Ray, operations counted right."""

import importlib
import inspect
import json
import math
import sys

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import v2

from massl_ray.bench import main
from massl_ray.benches import readout, step, views
from massl_ray.config import ViewsSection, load, resolve
from massl_ray.method.step import METRICS
from tests.helpers import encoded, photograph
from tests.images import TINY


def test_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["readuot"])
    assert stop.value.code == 2 and "readout" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["readout", "views", "step", "resize", "exact", "cost", "ingest", "embed", "learn"])
def test_every_bench_runs_without_options(name):
    run = importlib.import_module(f"massl_ray.benches.{name}").run
    assert [each.name for each in inspect.signature(run).parameters.values() if each.default is each.empty] == ["device"]


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
    flops = step.step_flops(config, resolve(config, step.IMAGES))
    assert 2.5 * flops["teacher"] < flops["student"]
    assert flops["readout"] == readout.readout_flops(4, 8, 64, 16)


def test_benches_need_no_ray():
    import subprocess

    code = "import sys, massl_ray.benches.readout, massl_ray.benches.step, massl_ray.benches.views; print('ray' in sys.modules)"
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


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")  # the reference's decoder
def test_views_fields(capsys, monkeypatch):
    monkeypatch.setattr(views, "NUMBER", 1)
    assert main(["views", "--json", "--rounds", "1", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ratio"] == result["ratio_torchvision_pil"] > 0 and result["ratio_torchvision_v2"] > 0
    assert result["images_per_s_per_core"] == pytest.approx(1000 / result["ours_ms_per_image"])
    assert set(result["reference_ms_per_image"]) == {"torchvision_pil", "torchvision_v2"}
    assert result["bits_per_pixel"] > 1 and result["threads"] == 1


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")  # the reference's decoder
def test_views_sides_make_the_same_kind_of_views():
    """As many, as large, uint8, and alike on average; the references draw anew each time."""
    config = ViewsSection(global_size=48, local_size=32, num_local=3)
    data = encoded(photograph(160, 120), "JPEG")
    torch.manual_seed(0)
    means = []
    for name, make in views.makers(config).items():
        made = [make(data) for _ in range(150)]
        groups = [([*pair[0]], [*pair[1]]) if name == "ours" else (pair[:2], pair[2:]) for pair in made]
        for place, (number, side) in enumerate(((2, 48), (3, 32))):
            pixels = [np.asarray(view) for pair in groups for view in pair[place]]
            assert len(pixels) == 150 * number and {view.dtype for view in pixels} == {np.dtype(np.uint8)}
            assert {view.shape for view in pixels} == {(side, side, 3) if name == "ours" else (3, side, side)}
            means.append(np.mean(pixels))
    assert means[0:2] == pytest.approx(means[4:6], abs=12) and means[2:4] == pytest.approx(means[4:6], abs=12)


@pytest.mark.parametrize("module", [transforms, v2])
def test_views_references_are_the_recipe(module):
    first, second, *local = views.reference_views(module, ViewsSection())
    assert len(local) == 10
    for chain, size, scale, blur, solarize in (
        (first, [224, 224], (0.32, 1.0), 1.0, 0),
        (second, [224, 224], (0.32, 1.0), 0.1, 0.2),
        (local[9], [96, 96], (0.05, 0.32), 0.5, 0),
    ):
        crop, flip, jitter, gray, blurred, inverted = chain.transforms
        assert (list(crop.size), tuple(crop.scale), flip.p, jitter.p, gray.p) == (size, scale, 0.5, 0.8, 0.2)
        assert (blurred.p, inverted.p, tuple(blurred.transforms[0].sigma)) == (blur, solarize, (0.1, 2.0))
        assert tuple(jitter.transforms[0].brightness) == (0.6, 1.4) and tuple(jitter.transforms[0].hue) == (-0.1, 0.1)
