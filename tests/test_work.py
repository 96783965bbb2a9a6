"""Operations and CPU seconds of an image."""

import json
from pathlib import Path

import pytest

from massl_ray.config import load, resolve
from massl_ray.planning.work import CPU_FLOPS_PER_S, VIEWS_S, readout_flops, step_flops, work

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_constants_are_those_of_the_benchmarks():
    views = json.loads((BENCHMARKS / "views_cpu.json").read_text())
    assert pytest.approx(1 / views["images_per_s_per_core"], rel=1e-3) == VIEWS_S
    step = json.loads((BENCHMARKS / "step_cpu.json").read_text())
    for precision, rate in CPU_FLOPS_PER_S.items():
        case = step["cases"][f"vit_small_{precision}"]
        assert rate == pytest.approx(case["matmul_flops_per_s"] * case["matmul_share"] / step["threads"], rel=0.01)


def test_operations_are_those_of_the_benchmark():
    """4 images of ViT-S, as benchmarks/step_cpu.json counted them; an image needs the same in any batch."""
    counted = json.loads((BENCHMARKS / "step_cpu.json").read_text())["cases"]["vit_small_bf16"]["flops"]
    config = load(["--preset", "vit_small", "--train.global_batch_size", "4"])
    assert step_flops(config, resolve(config, 10**6)) == counted
    usual = load(["--preset", "vit_small"])
    assert work(usual, resolve(usual, 10**6)).flops == sum(counted.values()) / 4


def test_cpu_seconds():
    recipe, small = load(["--preset", "vit_small"]), load(["--preset", "vit_small", "--views.num_local", "0"])
    assert work(recipe, resolve(recipe, 1000)).cpu_s == pytest.approx(2.273e-3)
    pixels = 2 * 224 * 224
    assert work(small, resolve(small, 1000)).cpu_s == pytest.approx(0.65e-3 + 1.623e-3 * pixels / (pixels + 10 * 96 * 96))
    on_gpu = load(["--preset", "vit_small", "--views.device", "cuda"])
    assert work(on_gpu, resolve(on_gpu, 1000)).cpu_s == 0.65e-3
    assert work(recipe, resolve(recipe, 1000), cpu_s=0.01).cpu_s == 0.01
    assert work(recipe, resolve(recipe, 1000)).view_bytes == 577_536


def test_readout_by_hand():
    """2 views and 2 teacher rows of 1 image, 3 slots, width 5: 4 x 3 x 5 multiply-adds, twice."""
    assert readout_flops(2, 1, 3, 5) == 2 * 2 * 4 * 3 * 5
