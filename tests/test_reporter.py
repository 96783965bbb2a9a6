"""The reporter: what the loop has to tell becomes events and states to keep."""

import json
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from massl_ray.config import DataSection, keys
from massl_ray.data.order import samples_at, step_positions
from massl_ray.evaluation.adapted import adapt_statistics, training_views
from massl_ray.evaluation.features import backbone_features, pixel_features
from massl_ray.evaluation.neighbours import nearest_neighbours
from massl_ray.method.resampling import resizer
from massl_ray.method.views import make_views
from massl_ray.reporting import reporter as module
from massl_ray.reporting.pictures import add_pictures, view_grid
from massl_ray.reporting.reporter import Reporter, Silent, evenly
from massl_ray.training.collectives import Local
from massl_ray.training.loop import Views, Wish, train
from massl_ray.training.run import Run
from massl_ray.training.state import build_state, state_sha256, to_tensors
from tests.helpers import make_images, metrics_line, read, tiny_run
from tests.images import write_images

CPU = torch.device("cpu")


class Memo:
    """A line and a writer of checkpoints that remember."""

    def __init__(self) -> None:
        self.events: list[dict] = []
        self.steps: list[int] = []
        self.kept: list[tuple[dict, dict]] = []
        self.saved: list[tuple[dict, dict]] = []
        self.wished = Wish.NONE

    def announce(self, event) -> None:
        self.events.append(event)

    def progress(self, step) -> None:
        self.steps.append(step)

    def keep(self, tensors, facts) -> None:
        self.kept.append((tensors, facts))

    def wish(self) -> Wish:
        return self.wished

    def save(self, tensors, facts) -> None:
        self.saved.append((tensors, facts))


class Told:
    """A reporter of a tiny run, the run's state, and what was told."""

    def __init__(self, run: Run):
        self.run, self.memo = run, Memo()
        self.reporter = Reporter(run, self.memo, self.memo)  # type: ignore[arg-type]
        self.state = build_state(run.config, run.resolved, CPU, Local())

    def evaluate(self, step: int) -> list[dict]:
        """Evaluate as if at a step; returns the new events."""
        before = len(self.memo.events)
        self.state.step = step
        self.reporter.evaluate(self.state)
        return self.memo.events[before:]


@pytest.fixture
def told(tiny_images, tmp_path):
    return Told(tiny_run(tiny_images, tmp_path / "run", "--train.steps", "6", "--eval.knn_k", "3"))


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set; the wall clock may do what it likes."""

    class Clock:
        now, wall = 1000.0, 1.7e9

        def monotonic(self) -> float:
            return self.now

        def time(self) -> float:
            return self.wall

    stopped = Clock()
    monkeypatch.setattr(module, "time", stopped)
    return stopped


def batches(run: Run):
    for step in range(run.resolved.steps):
        epochs, samples = samples_at(step_positions(step, 8, 0, 8), len(run.images), run.config.run.seed)
        made = [
            make_views(read(run.images.path(int(sample))), run.config.views, seed=0, epoch=int(epoch), sample=int(sample))
            for epoch, sample in zip(epochs, samples, strict=True)
        ]
        pairs = [torch.from_numpy(np.stack(views)) for views in zip(*made, strict=True)]
        yield Views(pairs[0], pairs[1], ["/x.png: cut"] if step == 1 else [])


def test_a_whole_run(told):
    """Nothing is written: whoever follows the events does that."""
    before = {path: path.stat().st_mtime_ns for path in told.run.dir.rglob("*")}
    outcome = train(told.run, told.state, batches(told.run), Local(), told.reporter)
    assert (outcome.status, outcome.step) == ("finished", 6)
    kinds = [event["kind"] for event in told.memo.events]
    assert kinds == ["knn", "knn", "views", "skipped", "metrics", "metrics", "metrics", "knn", "neighbours"]
    assert told.memo.events[3] == {"kind": "skipped", "images": ["/x.png: cut"]}
    lines = [line for event in told.memo.events if event["kind"] == "metrics" for line in event["lines"]]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(line) == set(metrics_line(0))
        assert line["images_seen"] == 8 * line["step"] and line["epoch"] == pytest.approx(line["step"] / 6)
    assert told.memo.steps == [1, 2, 3, 4, 5, 6]
    assert [int(tensors["step"]) for tensors, _ in told.memo.saved] == [4, 6]
    tensors, facts = told.memo.saved[-1]
    assert state_sha256(tensors) == state_sha256(to_tensors(told.state))
    (final,) = [event for event in told.memo.events if event.get("features") == "step_6"]
    assert facts["knn_top1"] == final["top1"] and "knn_top1" not in told.memo.saved[0][1]
    assert {path: path.stat().st_mtime_ns for path in told.run.dir.rglob("*")} == before


def test_every_other_worker_is_silent_but_for_skipped_images():
    memo = Memo()
    memo.wished = Wish.STOP
    silent = Silent(memo)
    silent.metrics([metrics_line(1)])
    for call in (silent.views, silent.checkpoint, silent.evaluate, silent.snapshot, silent.step_done):
        assert call(None) is None  # type: ignore[arg-type]
    silent.skipped([])
    assert memo.events == memo.steps == memo.kept == [] and silent.wish() == Wish.NONE
    silent.skipped(["a: cut"])
    assert memo.events == [{"kind": "skipped", "images": ["a: cut"]}]


def test_lines_of_metrics(told):
    told.reporter.metrics([])
    told.reporter.metrics([metrics_line(1), metrics_line(2)])
    assert told.memo.events == [{"kind": "metrics", "lines": [metrics_line(1), metrics_line(2)]}]


def test_views_show_the_first_eight_images(told):
    random = np.random.default_rng(0)
    two, three = (random.integers(0, 256, (10, views, 16, 16, 3), dtype=np.uint8) for views in (2, 3))
    told.reporter.views(Views(torch.from_numpy(two), torch.from_numpy(three), []))
    (event,) = told.memo.events
    assert event["kind"] == "views" and np.array_equal(event["grid"], view_grid(two[:8], three[:8]))


# ---- states to keep --------------------------------------------------------------------------------------------------


def test_a_snapshot_is_kept_and_a_checkpoint_is_also_written(told):
    told.state.step = 3
    told.reporter.snapshot(told.state)
    assert len(told.memo.kept) == 1 and told.memo.saved == []
    told.state.step = 4
    told.reporter.checkpoint(told.state)
    assert [int(tensors["step"]) for tensors, _ in told.memo.kept] == [3, 4]
    assert len(told.memo.saved) == 1 and int(told.memo.saved[0][0]["step"]) == 4


def test_what_is_kept_is_a_copy(told):
    told.reporter.snapshot(told.state)
    before = state_sha256(told.memo.kept[0][0])
    with torch.no_grad():
        for parameter in told.state.student.parameters():
            parameter.add_(1.0)
        told.state.memory.rows.zero_()
    assert state_sha256(told.memo.kept[0][0]) == before


def test_facts_say_where_a_state_comes_from(told):
    told.state.step = 4
    told.reporter.checkpoint(told.state)
    expected = {
        "images_seen": 32,
        "next_position": 32,
        "dataset_size": 48,
        "config": keys(told.run.config),
        "versions": {"torch": str(torch.__version__), "python": platform.python_version(), "resizer": resizer()},
        "hardware": torch.backends.cpu.get_cpu_capability(),
    }
    assert told.memo.saved[0][1] == told.memo.kept[0][1] == expected
    json.dumps(expected)  # they go into a manifest
    assert type(told.memo.kept[0][1]["versions"]["torch"]) is str  # torch's own type is unpickled by importing torch


def test_facts_say_how_good_a_state_is_if_it_was_measured(told):
    (event,) = told.evaluate(4)
    told.reporter.checkpoint(told.state)
    assert told.memo.saved[-1][1]["knn_top1"] == event["top1"]
    told.state.step = 5
    told.reporter.checkpoint(told.state)
    assert "knn_top1" not in told.memo.saved[-1][1]


def test_a_copy_is_due_when_the_last_is_half_as_old_as_may_be_lost(told, clock):
    """30 seconds may be lost."""
    told.reporter.snapshot(told.state)
    wishes = []
    for seconds in (0, 14.9, 15.0, 15.1, 100):
        clock.now = 1000.0 + seconds
        wishes.append(told.reporter.wish())
    assert wishes == [Wish.NONE, Wish.NONE, Wish.NONE, Wish.SAVE, Wish.SAVE]
    told.reporter.snapshot(told.state)
    assert told.reporter.wish() == Wish.NONE
    clock.now += 15.1
    assert told.reporter.wish() == Wish.SAVE
    told.reporter.checkpoint(told.state)
    assert told.reporter.wish() == Wish.NONE


def test_the_first_copy_is_due_after_the_start(told, clock):
    reporter = Reporter(told.run, told.memo, told.memo)  # type: ignore[arg-type]
    assert reporter.wish() == Wish.NONE
    clock.now += 15.1
    assert reporter.wish() == Wish.SAVE


def test_how_much_may_be_lost_is_asked_of_the_configuration(tiny_images, tmp_path, clock):
    told = Told(tiny_run(tiny_images, tmp_path / "run", "--train.steps", "6", "--elastic.max_lost_seconds", "4"))
    clock.now += 1.9
    assert told.reporter.wish() == Wish.NONE
    clock.now += 0.2
    assert told.reporter.wish() == Wish.SAVE


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_wall_clock_that_jumps_changes_nothing(told, clock, jump):
    told.reporter.snapshot(told.state)
    clock.wall += jump
    assert told.reporter.wish() == Wish.NONE
    clock.now += 15.1
    clock.wall -= 2 * jump
    assert told.reporter.wish() == Wish.SAVE


@pytest.mark.parametrize("wished", list(Wish))
def test_the_larger_of_two_wishes_counts(told, clock, wished):
    told.reporter.snapshot(told.state)
    told.memo.wished = wished
    assert told.reporter.wish() == wished
    clock.now += 15.1
    assert told.reporter.wish() == max(wished, Wish.SAVE)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def plain_knn(bank, queries, k: int, temperature: float) -> float:
    """Accuracy of a weighted vote, one query at a time."""
    hits = 0
    unit = [
        rows.rows.double().numpy() / np.linalg.norm(rows.rows.double().numpy(), axis=1, keepdims=True) for rows in (bank, queries)
    ]
    for row, truth in zip(unit[1], queries.labels.tolist(), strict=True):
        similarity = unit[0] @ row
        votes = np.zeros(3)
        for place in np.argsort(-similarity)[:k]:
            votes[bank.labels[place]] += np.exp(similarity[place] / temperature)
        hits += int(votes.argmax() == truth)
    return hits / len(unit[1])


def per_class(features) -> dict[str, float]:
    """Mean over classes of what the three nearest say, where the largest has more than twice as many queries as the smallest."""
    bank, queries = features
    counts = np.bincount(queries.labels.numpy())
    if counts.max() <= 2 * counts[counts > 0].min():
        return {}
    shares = []
    for kind in range(3):
        own = queries.labels == kind
        if own.any():
            part = replace(queries, rows=queries.rows[own], labels=queries.labels[own])
            shares.append(plain_knn(bank, part, k=3, temperature=0.07))
    return {"mean_per_class": pytest.approx(np.mean(shares))}


def test_knn_before_the_first_step(told):
    run = told.run
    with torch.no_grad():  # the teacher is asked, so that is what must differ
        for parameter in told.state.student.parameters():
            parameter.zero_()
    backbone = told.state.teacher.backbone
    teacher = [backbone_features(backbone, part, run.config, CPU) for part in (run.bank, run.queries)]
    pixels = [pixel_features(part, DataSection()) for part in (run.bank, run.queries)]
    assert len(run.queries) > 2
    assert told.evaluate(0) == [
        {
            "kind": "knn",
            "features": name,
            "step": 0,
            "top1": pytest.approx(plain_knn(*features, k=3, temperature=0.07)),
            "top1_k1": pytest.approx(plain_knn(*features, k=1, temperature=0.07)),
            "k": 3,
            "temperature": 0.07,
            "bank_images": len(run.bank),
            "query_images": len(run.queries),
        }
        | per_class(features)
        | ({"adapted": False} if name == "untrained" else {})  # a vision transformer
        for name, features in (("pixels", pixels), ("untrained", teacher))
    ]


def test_the_untrained_backbone_is_measured_with_adapted_statistics(tiny_images, tmp_path, monkeypatch):
    """And the state that is trained from then on is the one that was there before, to the bit."""
    told = Told(tiny_run(tiny_images, tmp_path / "run", "--train.steps", "6", "--model.backbone", "test_resnet"))
    run, before, measured = told.run, to_tensors(told.state), []

    def watched(backbone, *arguments):
        measured.append(state_sha256(backbone.state_dict()))
        return backbone_features(backbone, *arguments)

    monkeypatch.setattr(module, "backbone_features", watched)
    _, untrained = told.evaluate(0)
    backbone = adapt_statistics(told.state.teacher.backbone, training_views(run.images, run.config))
    adapted = [backbone_features(backbone, part, run.config, CPU) for part in (run.bank, run.queries)]
    assert untrained["adapted"] is True
    assert untrained["top1"] == pytest.approx(plain_knn(*adapted, k=20, temperature=0.07))
    assert measured == [state_sha256(backbone.state_dict())] * 2 != [state_sha256(told.state.teacher.backbone.state_dict())] * 2
    after = to_tensors(told.state)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_knn_of_pixels_does_not_ask_the_backbone(told):
    with torch.no_grad():
        for parameter in told.state.teacher.parameters():
            parameter.zero_()
    bank, queries = (pixel_features(part, DataSection()) for part in (told.run.bank, told.run.queries))
    pixels, untrained = told.evaluate(0)
    assert pixels["top1"] == pytest.approx(plain_knn(bank, queries, k=3, temperature=0.07))
    assert untrained["top1"] < pixels["top1"]


def test_knn_on_the_way_and_at_the_end(told):
    assert [(event["kind"], event["features"], event["step"]) for event in told.evaluate(4)] == [("knn", "step_4", 4)]
    knn, neighbours = told.evaluate(6)
    assert (knn["kind"], knn["features"], knn["step"]) == ("knn", "step_6", 6)
    found = backbone_features(told.state.teacher.backbone, told.run.bank, told.run.config, CPU)
    expected = nearest_neighbours(found, told.run.bank)
    add_pictures([entry for query in expected for entry in (query, *query["neighbours"])], told.run.bank, told.run.config.data)
    assert neighbours == {"kind": "neighbours", "found": expected} and all(query["picture"] for query in expected)


def test_images_without_classes_have_neighbours_but_no_knn(tmp_path):
    told = Told(tiny_run(make_images(tmp_path / "plain", 12), tmp_path / "run", "--train.steps", "6", "--eval.max_images", "5"))
    assert told.evaluate(0) == [] and told.evaluate(4) == []
    (event,) = told.evaluate(6)
    assert [Path(row["path"]).name for row in event["found"]] == ["000.png", "002.png", "005.png", "008.png", "011.png"]
    assert all(row["class"] is None and len(row["neighbours"]) == 4 for row in event["found"])
    told.reporter.checkpoint(told.state)
    assert "knn_top1" not in told.memo.saved[0][1]


def test_a_side_that_cannot_be_read_gives_no_knn(tmp_path):
    run = tiny_run(write_images(tmp_path / "images", 30), tmp_path / "run", "--train.steps", "6")
    assert run.queries is not None
    for sample in range(len(run.queries)):
        Path(run.queries.path(sample)).write_bytes(b"")
    told = Told(run)
    assert told.evaluate(0) == [] and [event["kind"] for event in told.evaluate(6)] == ["neighbours"]
    told.reporter.checkpoint(told.state)
    assert "knn_top1" not in told.memo.saved[0][1]


@pytest.mark.parametrize(("size", "at_most", "places"), [(3, 10, [0, 1, 2]), (10, 3, [0, 4, 9]), (1, 5, [0]), (7, 7, [*range(7)])])
def test_evenly(size, at_most, places):
    assert evenly(size, at_most).tolist() == places
