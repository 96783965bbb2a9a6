"""Runs on a real Ray: one and two workers agree, trouble ends them all, a resumed run continues."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from massl_ray.config import load
from massl_ray.data.cache import hash_of
from massl_ray.data.decode import Decoding
from massl_ray.data.demo import cache_folder
from massl_ray.data.preparing import begin, do_part, finish
from massl_ray.data.sources import open_source
from massl_ray.errors import UserError
from massl_ray.on_ray.launch import Stopped, name_on_dashboard, run_workers
from massl_ray.reporting.recorder import RunRecorder
from massl_ray.storage import Folder
from massl_ray.training.checkpoint import list_checkpoints, read_checkpoint, read_manifest
from massl_ray.training.run import claim_directory, prepare_run
from tests.images import TINY
from tests.sources import KINDS, encoded_images
from tests.storages import on_s3, s3_server

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def start(ray_cluster, tiny_images, tmp_path):
    """Start a run with more flags; returns (outcome, run, events)."""

    def start(name: str, *flags: str, follow=None):
        run = prepare_run(load([*TINY, "--data.source", str(tiny_images), "--run.dir", str(tmp_path / name), *flags]))
        claim_directory(run)
        events: list[dict] = []
        recorder = RunRecorder(run)

        def keep(event):
            events.append(event)
            recorder.follow(event)
            if follow:
                follow(event)

        try:
            return run_workers(run, keep), run, events
        finally:
            recorder.close()

    return start


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]


def test_one_and_two_workers_agree(start):
    """The same state to the last bit, the same losses, and one line of metrics a step."""
    one, run_one, _ = start("one", "--train.steps", "8", "--elastic.max_workers", "1")
    two, run_two, events = start("two", "--train.steps", "8", "--elastic.min_workers", "2", "--elastic.max_workers", "2")
    assert (one.status, two.status) == ("finished", "finished")
    assert [event["world_size"] for event in events if event["kind"] == "started"] == [2]
    for first, second in zip(lines_of(run_one), lines_of(run_two), strict=True):
        assert first["step"] == second["step"] and (first["world_size"], second["world_size"]) == (1, 2)
        for key in ("loss", "teacher_entropy", "alignment", "embedding_std", "effective_rank", "uniformity", "memory_usage"):
            assert second[key] == pytest.approx(first[key], rel=1e-3), (first["step"], key)
    hashes = {read_manifest(list_checkpoints(run.checkpoints)[-1])["state_sha256"] for run in (run_one, run_two)}
    assert len(hashes) == 1
    (transition,) = [event for event in events if event["kind"] == "transition"]
    assert (transition["from"], transition["to"], transition["cause"], transition["steps_repeated"]) == (0, 2, "start", 0)


def test_batch_norm_statistics_agree_too(start):
    flags = [
        "--model.backbone",
        "test_resnet",
        "--model.drop_path",
        "0",
        "--head.batch_norm",
        "true",
        "--train.steps",
        "3",
        "--elastic.exact",
        "false",
    ]
    _, run_one, _ = start("one", *flags, "--elastic.max_workers", "1")
    _, run_two, _ = start("two", *flags, "--elastic.min_workers", "2", "--elastic.max_workers", "2")
    one, two = (read_checkpoint(list_checkpoints(run.checkpoints)[-1])[0] for run in (run_one, run_two))
    running = [name for name in one if "running" in name and name.startswith("student")]
    assert running
    for name in running:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_than_three_channels(start, tmp_path, channels):
    """From arrays with bands, through shards that know their means, to a checkpoint and figures."""
    random, source, folder = np.random.default_rng(0), tmp_path / "bands", Folder(tmp_path / "shards")
    for number in range(24):
        (source / str(number % 2)).mkdir(parents=True, exist_ok=True)
        levels = random.integers(0, 128 + 100 * (number % 2), (40, 50, channels), dtype=np.uint8)
        np.save(source / str(number % 2) / f"{number}.npy", levels)
    listing = open_source(str(source))
    flags = ["--train.steps", "4", "--data.channels", str(channels)]
    if channels == 5:
        with pytest.raises(UserError, match=r"data.mean is not known for 5 channels.*prepare --channels 5"):
            prepare_run(load([*TINY, *flags, "--data.source", str(source), "--run.dir", str(tmp_path / "refused")]))
    plan = begin(listing, folder, None, 64, Decoding(channels=channels))
    do_part(listing, folder, plan, 0)
    finish(listing, folder, plan)
    outcome, run, events = start("run", *flags, "--data.source", str(tmp_path / "shards"))
    assert outcome.status == "finished"
    assert run.config.data.mean == pytest.approx([0.353] * channels, abs=0.02) and len(run.config.data.std) == channels
    weights = read_checkpoint(list_checkpoints(run.checkpoints)[-1])[0]
    assert next(value for name, value in weights.items() if name.endswith("patch_embed.proj.weight")).shape[1] == channels
    (grid,) = [event["grid"] for event in events if event["kind"] == "views"]
    assert grid.ndim == 3 and grid.shape[2] == 3


def test_collapse_ends_all_workers_and_keeps_the_checkpoint(start):
    outcome, run, _ = start(
        "collapse", "--train.steps", "40", "--monitor.min_spread", "1", "--monitor.patience", "5",
        "--elastic.min_workers", "2", "--elastic.max_workers", "2",
    )  # fmt: skip
    assert (outcome.status, outcome.step) == ("collapsed", 5)
    assert "have collapsed" in outcome.message and "loss.koleo_weight" in outcome.message
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step_4"]


def test_a_loss_that_is_not_finite_ends_all_workers(start):
    outcome, run, _ = start(
        "nan", "--train.steps", "40", "--optim.lr", "1e38", "--optim.warmup_epochs", "0",
        "--elastic.min_workers", "2", "--elastic.max_workers", "2",
    )  # fmt: skip
    assert outcome.status == "non_finite" and outcome.step <= 6
    assert "optim.lr" in outcome.message
    for checkpoint in list_checkpoints(run.checkpoints):
        assert all(value.isfinite().all() for value in read_checkpoint(checkpoint)[0].values() if value.is_floating_point())


def test_a_failing_worker_is_an_error_not_a_hang(start, tiny_images):
    def break_images(event):
        if event["kind"] == "started":
            for path in tiny_images.rglob("*.png"):
                path.unlink()

    flags = ("--train.steps", "400", "--elastic.max_failures", "0", "--data.max_skipped", "1")
    outcome, _, events = start("broken", *flags, follow=break_images)
    assert outcome.status == "failed" and "elastic.max_failures 0" in outcome.message
    assert any("can be read any more" in event["text"] for event in events if event["kind"] == "failure")


def test_interrupted_and_continued(start, tmp_path):
    """Ctrl-C saves the step it stops at; the same command continues there, without doubled lines of metrics."""
    events: list[dict] = []

    def interrupt_at(step: int, signum: int):
        sent: list[int] = []

        def follow(event):
            events.append(event)
            if event["kind"] == "metrics" and event["lines"][-1]["step"] >= step and not sent:
                sent.append(signum)
                os.kill(os.getpid(), signum)

        return follow

    flags = ("--train.steps", "4000", "--elastic.max_workers", "1")
    with pytest.raises(Stopped) as stopped:
        start("run", *flags, follow=interrupt_at(6, signal.SIGINT))
    assert stopped.value.signum == signal.SIGINT
    saved = int(list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name.removeprefix("step_"))
    assert saved >= 6

    with pytest.raises(Stopped) as stopped:
        start("run", *flags, follow=interrupt_at(saved + 2, signal.SIGTERM))
    assert stopped.value.signum == signal.SIGTERM
    assert [event["step"] for event in events if event["kind"] == "started"] == [0, saved]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] > saved


def test_every_kind_of_source_trains_alike(ray_cluster, tmp_path):
    """The same images in the same order are the same run, whatever they lie in."""
    images = encoded_images(24)
    places = {kind: str(write(tmp_path, images)) for kind, write in KINDS.items()}
    listing = open_source(places["list"])
    with s3_server() as options:
        bucket = on_s3(options)
        for name, folder in (("shards", Folder(tmp_path / "shards")), ("remote shards", bucket / "shards")):
            plan = begin(listing, folder, None, 64)
            assert plan
            do_part(listing, folder, plan, 0)
            finish(listing, folder, plan)
            places[name] = str(folder)
        states = {}
        for kind, place in places.items():
            flags = ["--data.source", place, "--run.dir", str(tmp_path / "runs" / kind), "--train.steps", "2"]
            run = claim_directory(prepare_run(load([*TINY, *flags])))
            events: list[dict] = []
            outcome = run_workers(run, events.append)
            assert outcome.status == "finished" and not [event for event in events if event["kind"] in ("skipped", "failure")]
            states[kind] = read_manifest(list_checkpoints(run.checkpoints)[-1])["state_sha256"]
    copy = cache_folder() / "shards" / f"{hash_of(tmp_path / 'shards' / 'shard-00000.arrow')}.arrow"
    copy.unlink()  # Ray's workers keep it where this session's environment says
    by_folder = {states.pop("folder"), states.pop("pattern")}  # sorted by class, so another order
    assert len(by_folder) == 1 and len(set(states.values())) == 1 and by_folder != set(states.values()), states


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/runs/vit_small-2", "vit_small-2"),
        ("/runs/my run/ü", "_"),
        ("/runs/..x", "x"),
        ("s3://KEY:SECRET@bucket/runs/a?token=T", "a"),
    ],
)
def test_the_dashboard_calls_a_run_by_its_directory(folder, name):
    run = SimpleNamespace(folder=Folder(folder))
    assert name_on_dashboard(run) == name  # type: ignore[arg-type]
