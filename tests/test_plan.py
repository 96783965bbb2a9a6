"""Plans by hand and by property, and the command that prints them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from massl_ray.config import Config, load
from massl_ray.errors import UserError
from massl_ray.plan import main
from massl_ray.planning import plan as planning
from massl_ray.planning.cluster_file import Cluster, Pool
from massl_ray.planning.gpus import GPUS
from massl_ray.planning.here import this_machine
from massl_ray.planning.plan import ROOM, plan
from massl_ray.planning.words import counted, duration, usd_text
from massl_ray.planning.work import CPU_FLOPS_PER_S

ROOT = Path(__file__).parents[1]
TINY = (
    "--model.backbone test_vit --views.global_size 32 --views.local_size 16 --views.num_local 2 --head.hidden_dim 16 --head.dim 8 "
    "--memory.size 64 --memory.num_blocks 2 --train.global_batch_size 64 --train.micro_batch_size 8 --train.epochs 100"
)
HEAD = Pool("head", 1, 1, 0, 0, usd_on_demand=0.5)
GPU = Pool("gpu", 0, 4, 8, 2, "L4", True, 4.0, 1.0)
CPU = Pool("cpu", 0, 3, 16, 0, None, True, 0.8, 0.2)
CLUSTER = Cluster("it", "launcher", HEAD, (GPU, CPU), 7)


def config(flags: str = "") -> Config:
    return load(["--config", "/dev/null", *TINY.split(), *flags.split()])


@pytest.fixture(autouse=True)
def worked_out_once(monkeypatch):
    work_out_once(monkeypatch)


def work_out_once(monkeypatch):
    """Networks without memory take a second; most plans here are of the same."""
    for name in ("footprint", "work"):
        monkeypatch.setattr(planning, name, remember(name, getattr(planning, name)))


KNOWN = {}


def remember(name, compute):
    def remembered(config, resolved, *others):
        sections = [getattr(config, section) for section in ("model", "views", "head", "memory", "data")]
        key = (name, *sections, config.train.precision, resolved.micro_batch_size, resolved.memory_size, *others)
        if key not in KNOWN:
            KNOWN[key] = compute(config, resolved, *others)
        return KNOWN[key]

    return remembered


def test_a_row_by_hand():
    """640 images, 100 epochs, 1,000 steps of 8 micro-batches; 3 workers take 3, 3 and 2 of them; 10 images/s each."""
    made = plan(config(), 640, CLUSTER, rate=10.0, cpu_s=0.5)
    row = next(row for row in made.rows if row.workers == 3)
    assert (row.device, row.batch_per_worker, row.micro_batches) == ("L4", (16, 24), (2, 3))
    assert row.efficiency == 8 / 9 and row.images_per_s == pytest.approx(10 * 3 * 8 / 9)
    assert row.cpus_needed == pytest.approx(10 * 3 * 8 / 9 * 0.5) and row.cpus_spare == 2 * 8 - 3 * 0.75
    assert row.machines == {"gpu": 2} and row.cpu_machines == 0 and row.feeds
    hours = 640 * 100 / (10 * 3 * 8 / 9) / 3600
    assert row.hours == pytest.approx(hours)
    assert row.usd == pytest.approx(hours * (0.5 + 2 * 1.0)) and row.usd_on_demand == pytest.approx(hours * (0.5 + 2 * 4.0))
    assert row.memory_bytes == GPUS["L4"].memory_gib * 2**30 and row.fits
    assert made.measured and made.work.cpu_s == 0.5


def test_machines_without_gpus_help_where_views_are_slow():
    """Two workers at 10 images/s need 40 CPUs at 2 s an image; theirs have 8 - 1.5 spare, so 3 more machines of 16 do."""
    made = plan(config("--elastic.max_workers 2 --elastic.min_workers 2"), 640, CLUSTER, rate=10.0, cpu_s=2.0)
    (row,) = made.rows
    assert row.cpus_needed == 40 and row.cpus_spare == 6.5 and row.cpu_machines == 3 and row.feeds and row.images_per_s == 20
    assert row.usd == pytest.approx(row.hours * (0.5 + 1.0 + 3 * 0.2))
    (short,) = plan(config("--elastic.max_workers 2 --elastic.min_workers 2"), 640, CLUSTER, rate=10.0, cpu_s=4.0).rows
    assert short.cpu_machines == 3 and not short.feeds and short.images_per_s == pytest.approx((6.5 + 48) / 4)


def test_numbers_of_workers():
    assert [row.workers for row in plan(config(), 640, CLUSTER, rate=1.0).rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    many = replace(CLUSTER, pools=(replace(GPU, max=9, gpus=4),), max_machines=None)
    small = "--train.micro_batch_size 1"
    assert [row.workers for row in plan(config(small), 640, many, rate=1.0).rows] == [*range(1, 9), 16, 32, 36]
    assert [row.workers for row in plan(config("--train.micro_batch_size 16"), 640, many, rate=1.0).rows] == [1, 2, 3, 4]
    assert [
        row.workers for row in plan(config(f"{small} --elastic.min_workers 7 --elastic.max_workers 20"), 640, many, rate=1.0).rows
    ] == [7, 8, 16, 20]
    with pytest.raises(UserError, match="No run of at least 9 workers"):
        plan(config("--elastic.min_workers 9 --elastic.max_workers 9"), 640, CLUSTER, rate=1.0)


def test_cuda_without_gpus():
    with pytest.raises(UserError, match="train.device is cuda, but it has no GPUs"):
        plan(config("--train.device cuda"), 640, replace(CLUSTER, pools=(CPU,)))


@pytest.mark.parametrize(
    ("preset", "batch", "micro_batch", "measured_s"),
    [("vit_small", 64, 64, 0.0716), ("vit_small", 128, 128, 0.1332), ("vit_base", 64, 64, 0.1349), ("vit_small", 1024, 64, 1.122)],
)
def test_rates_of_an_h100(preset, batch, micro_batch, measured_s):
    """Steps that were timed on one (docs/log.md)."""
    sizes = ["--train.global_batch_size", str(batch), "--train.micro_batch_size", str(micro_batch)]
    one = Cluster("it", "launcher", HEAD, (replace(GPU, gpu="H100", gpus=1, max=1, cpus=64),))
    (row,) = plan(load(["--preset", preset, *sizes]), 1_281_167, one).rows
    assert batch / row.rate == pytest.approx(measured_s, rel=0.11)


def test_estimated_rates():
    for made, tflops in ((plan(config(), 640, CLUSTER), 121), (plan(config("--train.precision fp32"), 640, CLUSTER), 30.3)):
        kept = made.rows[0].footprint.activations / made.resolved.micro_batch_size
        seconds = made.work.flops / (0.8 * tflops * 1e12) + 22 * kept / 300e9
        assert made.rows[0].rate == pytest.approx(1 / seconds) and not made.measured
    machines = Cluster("it", "launcher", HEAD, (replace(CPU, max=4),))
    on_cpus = plan(config("--train.threads 2"), 640, machines, cpu_s=1e-9)
    assert [row.workers for row in on_cpus.rows] == [1, 2, 3, 4] and on_cpus.rows[0].device == "CPU"
    assert on_cpus.rows[0].images_per_s == pytest.approx(2 * CPU_FLOPS_PER_S["bf16"] / on_cpus.work.flops)
    assert on_cpus.rows[1].machines == {"cpu": 2} and on_cpus.rows[1].cpus_spare == 2 * 16 - 2 * 2 * 0.75


def test_each_kind_of_gpu_has_rows_of_its_own():
    both = replace(CLUSTER, pools=(GPU, Pool("big", 0, 1, 8, 2, "H100", False, 9.0)))
    assert [(row.device, row.workers) for row in plan(config(), 640, both).rows][:4] == [
        ("H100", 1),
        ("H100", 2),
        ("L4", 1),
        ("L4", 2),
    ]


def test_what_is_cheapest():
    """One worker of a machine of two wastes half of it; more machines waste less of the head."""
    made = plan(config(), 640, CLUSTER, rate=10.0, cpu_s=1e-6)
    costs = {row.workers: row.usd for row in made.rows}
    assert made.cheapest is not None and made.cheapest.usd == min(costs.values()) and made.cheapest.workers == 8
    assert costs[1] == pytest.approx(64000 / 10 / 3600 * 1.5) and costs[8] == pytest.approx(64000 / 80 / 3600 * 4.5)
    unpriced = replace(CLUSTER, head=Pool("head", 1, 1, 0, 0))
    assert all(row.usd is None for row in plan(config(), 640, unpriced, rate=10.0).rows)
    assert plan(config(), 640, unpriced, rate=10.0, cpu_s=1e-6).cheapest.workers == 8  # the fastest


def test_nothing_fits(monkeypatch):
    monkeypatch.setitem(GPUS, "L4", replace(GPUS["L4"], memory_gib=1.0))
    made = plan(config(), 640, CLUSTER)
    assert made.cheapest is None and not any(row.fits for row in made.rows)
    row = made.rows[0]
    assert not replace(row, memory_bytes=row.footprint.total / ROOM * 0.999).fits
    assert replace(row, memory_bytes=row.footprint.total / ROOM * 1.001).fits and replace(row, memory_bytes=None).fits


def test_more_images_cost_more_and_a_faster_worker_less():
    plans = [plan(config(), images, CLUSTER, rate=rate) for images, rate in ((640, 10), (1280, 10), (1280, 20))]
    for few, more, faster in zip(*(made.rows for made in plans), strict=True):
        assert more.hours == pytest.approx(2 * few.hours) and more.usd == pytest.approx(2 * few.usd)
        assert faster.hours < more.hours and faster.usd < more.usd


def test_the_length_that_counts():
    assert plan(config("--train.steps 50"), 640, CLUSTER, rate=10.0).rows[0].hours == pytest.approx(50 * 64 / 10 / 3600)
    stopped = plan(config("--train.steps 50 --train.stop_at 5"), 640, CLUSTER, rate=10.0)
    assert stopped.rows[0].hours == pytest.approx(5 * 64 / 10 / 3600)


def test_workers_reserve_what_the_layout_says():
    from massl_ray.on_ray.layout import DATA_TASK_CPUS

    assert planning.WORKER_CPUS == 1 - DATA_TASK_CPUS


def test_words():
    assert [duration(hours) for hours in (0.001, 0.02, 0.2, 1.4, 3.44, 100, math.inf)] == [
        "4 s",
        "72 s",
        "12 min",
        "84 min",
        "3.4 h",
        "4.2 days",
        "for ever",
    ]
    assert [usd_text(usd) for usd in (None, math.inf, 0.123, 1234.5)] == ["-", "-", "0.12", "1,234"]
    assert counted(1, "worker") == "1 worker" and counted(1200, "worker") == "1,200 workers"


@pytest.mark.parametrize("name", ["aws", "azure", "gcp", "kuberay"])
def test_command_on_the_files_of_cluster(name, capsys):
    path = ROOT / "cluster" / f"{name}.yaml"
    assert main(["--config", "/dev/null", *TINY.split(), "--cluster", str(path), "--images", "100000"]) == 0
    out = capsys.readouterr().out
    assert "Run       100,000 images; 156,250 steps (train.epochs) of 64 images, 100.0 epochs" in out
    assert out.count("cheapest") == 1 and "--images" not in out and "Costs     include the head" in out
    header = next(line for line in out.splitlines() if line.startswith("workers"))
    assert header.split() == "workers on images each even images/s CPUs: need spare machines GiB takes USD on demand".split()


def test_command_for_this_machine(capsys):
    assert main(["--images", "1000", "--rate", "50", "--train.device", "cpu", *TINY.split()]) == 0
    out = capsys.readouterr().out
    assert "Machines  this one: " in out and "as given: 50.0 images/s a worker" in out
    assert "USD" not in out and "Costs" not in out and out.count("fastest") == 1


def test_command_on_the_demo_says_so(capsys):
    assert main(TINY.split()) == 0
    assert "Planned on the 3,149 images of data.source 'demo'; --images N plans for another number." in capsys.readouterr().out


def test_command_for_programs(tmp_path, capsys):
    path = ROOT / "cluster" / "aws.yaml"
    assert main([*TINY.split(), "--cluster", str(path), "--images", "64000", "--rate", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["images"] == 64000
        and found["batch_size"] == 64
        and found["rate_measured"] is True
        and found["cluster"] == "massl-ray"
    )
    first = found["rows"][0]
    assert first["workers"] == 1 and first["images_per_s"] == 10 and first["fits"] is True and first["device"] == "L4"
    assert first["footprint"]["total"] == sum(value for key, value in first["footprint"].items() if key != "total")
    assert [row["cheapest"] for row in found["rows"]].count(True) == 1


def test_remarks(tmp_path, capsys):
    """A T4 has no bf16; 1 CPU feeds few; prices are missing; a micro-batch that is too large does not fit."""
    (tmp_path / "t4.yaml").write_text(
        "head_node_type: head\nmax_workers: 2\navailable_node_types:\n  head: {resources: {CPU: 0}}\n"
        "  gpu: {max_workers: 2, resources: {CPU: 1, GPU: 1}, labels: {massl-ray/gpu: T4}}\n"
    )
    assert main(["--preset", "vit_small", "--cluster", str(tmp_path / "t4.yaml"), "--images", "10000", "--rate", "1000"]) == 0
    out = capsys.readouterr().out
    assert "Precision T4 has no units for bf16" in out and "Prices    are missing" in out
    assert "CPUs      from 1 worker on, views cannot be made fast enough" in out and "waits for CPUs" in out
    flags = ["--train.micro_batch_size", "256", "--cluster", str(tmp_path / "t4.yaml"), "--images", "10000"]
    assert main(["--preset", "vit_small", *flags]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "lower train.micro_batch_size (256)" in out and "cheapest" not in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--images", "1"], "--images is 1; training needs at least 2."),
        (["--images", "many"], "The flags could not be read: argument --images: invalid int value"),
        (["--rate", "0"], "--rate is 0"),
        (["--rate", "nan"], "--rate is nan"),
        (["--cluster", "none.yaml"], "The cluster file none.yaml cannot be read"),
        (["--model.backbone", "vit_tiny_patch", "--images", "10"], "is no timm model"),
        (["--data.source", "/nowhere"], "there is no folder or file /nowhere"),
        (["--claster", "x"], "There is no setting 'claster'; the nearest is 'cluster'"),
    ],
)
def test_a_mistake_is_one_sentence(flags, words, capsys):
    assert main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.startswith("massl-ray: ") and err.count("\n") == 1


def test_a_gpu_without_a_name(tmp_path, capsys):
    """Its rate cannot be estimated; with a rate there is a plan, without a word on memory."""
    (tmp_path / "x.yaml").write_text(
        "head_node_type: head\nmax_workers: 2\navailable_node_types:\n  head: {resources: {CPU: 0}}\n"
        "  gpu: {max_workers: 2, resources: {CPU: 8, GPU: 1}}\n"
    )
    flags = [*TINY.split(), "--cluster", str(tmp_path / "x.yaml"), "--images", "1000"]
    assert main(flags) == 2
    assert "massl-ray knows no GPU 'unknown'" in capsys.readouterr().err
    assert main([*flags, "--rate", "5"]) == 0
    assert " of 22" not in capsys.readouterr().out


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "usage: massl-ray plan [--cluster FILE] [--images N]" in capsys.readouterr().out


def test_this_machine(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: type("P", (), {"name": "NVIDIA H100 80GB HBM3", "total_memory": 79 << 30})()
    )
    machine = this_machine()
    assert machine.head.gpus == 2 and machine.head.gpu == "H100" and machine.head.cpus >= 1 and not machine.pools
    assert [row.workers for row in plan(config(), 640, machine).rows] == [1, 2]


def test_no_ray():
    import subprocess
    import sys

    code = (
        f"import sys; from massl_ray.plan import main; main({[*TINY.split(), '--images', '100']!r}); sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
