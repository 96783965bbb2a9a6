"""Whether a run would start and fit, how fast it is, and what it takes."""

from dataclasses import replace

import pytest
import torch

from massl_ray.checkup import fit
from massl_ray.checkup.fit import Measured, check_length, check_memory, check_start, make_plan, measure, state_bytes
from massl_ray.planning import plan as planning
from massl_ray.planning.cluster_file import Cluster
from massl_ray.planning.gpus import GPUS
from massl_ray.planning.plan import ROOM
from tests.sources import encoded_images, write_folder
from tests.test_plan import CLUSTER, CPU, HEAD, config, work_out_once


@pytest.fixture(autouse=True)
def worked_out_once(monkeypatch):
    work_out_once(monkeypatch)


@pytest.fixture
def settings(tmp_path):
    folder = write_folder(tmp_path / "images", encoded_images(20))
    return config(f"--data.source {folder} --run.dir {tmp_path / 'run'} --train.device cpu")


def test_what_train_would_refuse(settings, tmp_path):
    run, finding = check_start(settings)
    assert run is not None and finding.severity == "ok" and not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    run, finding = check_start(settings)
    assert run is None and finding.severity == "error" and "exists and is not a run of massl-ray" in finding.sentence


def test_measured(settings, monkeypatch):
    """8 micro-batches; 64 images in 4 s are 16 images/s."""
    monkeypatch.setattr(fit, "rehearse", lambda run, state, workers: 4.0)
    run, _ = check_start(settings)
    threads = torch.get_num_threads()
    measured, finding = measure(run)
    assert (measured.device, measured.step_s, measured.images_per_s) == ("CPU", 4.0, 16.0) and measured.peak_bytes > 1e8
    assert finding.severity == "ok" and "takes 4 s a step, 16.0 images/s" in finding.sentence and torch.get_num_threads() == threads

    def too_large(run, state, workers):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(fit, "rehearse", too_large)
    measured, finding = measure(run)
    assert (
        measured is None
        and finding.severity == "error"
        and "A micro-batch of 8 images does not fit: CUDA out of" in finding.sentence
    )


def test_a_backbone_that_cannot_be_exact_is_an_error(settings, monkeypatch):
    def refused(run, state, workers):
        raise RuntimeError("avg_pool3d_backward_cuda does not have a deterministic implementation, but you set ...")

    monkeypatch.setattr(fit, "rehearse", refused)
    run, _ = check_start(settings)
    measured, finding = measure(run)
    assert measured is None and finding.severity == "error" and "(avg_pool3d_backward_cuda)" in finding.sentence
    assert "--elastic.exact false" in finding.remedy


def test_really_measured(settings):
    run, _ = check_start(settings)
    measured, _ = measure(run)
    assert 0 < measured.step_s < 60 and measured.images_per_s == 64 / measured.step_s


def test_a_measured_rate_counts_on_the_same_device_only():
    gpu, cpu = Measured("L4", 1.0, 1, 7.0), Measured("CPU", 1.0, 1, 7.0)
    made, _ = make_plan(config(), 640, CLUSTER, gpu, 1e-6)
    assert made.measured and made.rows[0].rate == 7.0 and made.work.cpu_s == 1e-6
    assert not make_plan(config(), 640, CLUSTER, cpu, None)[0].measured
    assert make_plan(config(), 640, replace(CLUSTER, pools=(CPU,)), cpu, None)[0].measured


def test_no_plan():
    made, (finding,) = make_plan(config("--elastic.min_workers 9 --elastic.max_workers 9"), 640, CLUSTER, None, None)
    assert made is None and finding.severity == "error" and "No run of at least 9 workers" in finding.sentence


def test_memory(monkeypatch):
    made = planning.plan(config(), 640, CLUSTER)
    (finding,) = check_memory(made)
    assert finding.severity == "ok" and finding.sentence.endswith("of the 22.0 GiB of L4.")
    totals = {row.workers: row.footprint.total for row in made.rows}
    between = (min(totals.values()) + max(totals.values())) / 2 / ROOM
    for memory, severity, words in (
        (1.0, "error", "does not fit"),
        (between, "warning", "with 8 it fits"),
        (None, "note", "not known"),
    ):
        (finding,) = check_memory(replace(made, rows=tuple(replace(row, memory_bytes=memory) for row in made.rows)))
        assert finding.severity == severity and words in finding.sentence, finding
    other = tuple(replace(row, device="H100") for row in made.rows)
    both = replace(made, rows=(*other, *(replace(row, memory_bytes=1.0) for row in made.rows)))
    assert [finding.severity for finding in check_memory(both)] == ["ok", "warning"]  # there is a kind that it fits
    assert GPUS["L4"].memory_gib == 22.0


def test_time_and_cost():
    made = planning.plan(config(), 640, CLUSTER, rate=10.0, cpu_s=1e-6)
    (finding,) = check_length(made)
    assert finding.sentence == (
        "1,000 steps take 13 min with 8 workers on L4, at 80 images/s (measured), USD 1.00 as rented and 3.67 all on demand."
    )
    starved = check_length(planning.plan(config(), 640, CLUSTER, rate=10.0, cpu_s=100.0))
    assert [finding.severity for finding in starved] == ["note", "warning"]
    assert list(check_length(replace(made, rows=()))) == []


def test_a_checkpoint_is_state_and_memory():
    made = planning.plan(config(), 640, Cluster("it", "launcher", HEAD, (CPU,)))
    assert state_bytes(made) == made.rows[0].footprint.state + 64 * 8 * 4
