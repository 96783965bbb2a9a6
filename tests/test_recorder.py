"""The recorder: what lies in a run directory afterwards, and what the console hears."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from massl_ray.config import keys
from massl_ray.data.decode import read
from massl_ray.data.order import samples_at, step_positions
from massl_ray.evaluation.features import backbone_features, pixel_features
from massl_ray.evaluation.neighbours import nearest_neighbours
from massl_ray.method.views import make_views
from massl_ray.reporting.pictures import view_grid
from massl_ray.reporting.recorder import RunRecorder, Silent, drop_lines_after, evenly
from massl_ray.training.checkpoint import list_checkpoints, read_checkpoint
from massl_ray.training.collectives import Local
from massl_ray.training.loop import Views, train
from massl_ray.training.run import Run
from massl_ray.training.state import build_state, state_sha256, to_tensors
from tests.helpers import make_images, metrics_line, tiny_run
from tests.images import write_images

CPU = torch.device("cpu")


class Recorded:
    """A recorder of a tiny run, the run's state, and what was announced."""

    def __init__(self, run: Run, start_step: int = 0, stop: bool = False):
        self.run, self.events = run, []
        self.recorder = RunRecorder(run, self.events.append, lambda: stop, start_step)
        self.state = build_state(run.config, run.resolved, CPU, Local())

    def evaluate(self, step: int) -> list[str]:
        """Evaluate as if at a step; returns the files of eval/."""
        self.state.step = step
        self.recorder.evaluate(self.state)
        return sorted(path.name for path in (self.run.dir / "eval").iterdir())

    def scalars(self) -> dict[str, dict[int, float]]:
        """What TensorBoard shows."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.recorder.close()
        events = EventAccumulator(str(self.run.dir / "tensorboard"))
        events.Reload()
        return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.fixture
def recorded(tiny_images, tmp_path):
    made = Recorded(tiny_run(tiny_images, tmp_path / "run", "--train.steps", "6", "--eval.knn_k", "3"))
    yield made
    made.recorder.close()


def batches(run: Run):
    for step in range(run.resolved.steps):
        epochs, samples = samples_at(step_positions(step, 8, 0, 8), len(run.images), run.config.run.seed)
        made = [
            make_views(read(run.images.path(int(sample))), run.config.views, seed=0, epoch=int(epoch), sample=int(sample))
            for epoch, sample in zip(epochs, samples, strict=True)
        ]
        pairs = [torch.from_numpy(np.stack(views)) for views in zip(*made, strict=True)]
        yield Views(pairs[0], pairs[1], ["/x.png: cut"] if step == 1 else [])


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_these_files(recorded):
    run = recorded.run
    outcome = train(run, recorded.state, batches(run), Local(), recorded.recorder)
    recorded.recorder.close()
    assert (outcome.status, outcome.step) == ("finished", 6)
    files = {str(path.relative_to(run.dir)) for path in run.dir.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith("tensorboard/")} == {
        "config.toml",
        "metrics.jsonl",
        "views.png",
        "checkpoints/step_4/manifest.json",
        "checkpoints/step_4/state.safetensors",
        "checkpoints/step_6/manifest.json",
        "checkpoints/step_6/state.safetensors",
        "eval/knn_pixels.json",
        "eval/knn_untrained.json",
        "eval/knn_step_6.json",
        "eval/neighbours.json",
    }
    lines = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(line) == set(metrics_line(0))
        assert line["images_seen"] == 8 * line["step"] and line["epoch"] == pytest.approx(line["step"] / 6)
        assert line["kl"] == pytest.approx(line["loss"] - line["teacher_entropy"])
    kinds = [event["kind"] for event in recorded.events]
    expected = ["knn", "knn", "skipped", "metrics", "metrics", "checkpoint", "metrics", "checkpoint", "knn"]
    assert kinds == expected
    assert recorded.events[2] == {"kind": "skipped", "images": ["/x.png: cut"]}
    tensors, _ = read_checkpoint(run.checkpoints / "step_6")
    assert state_sha256(tensors) == state_sha256(to_tensors(recorded.state))


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_go_to_the_file_the_board_and_the_console(recorded):
    recorded.recorder.metrics([metrics_line(1), metrics_line(2, loss=1.25)])
    recorded.recorder.metrics([])
    recorded.recorder.metrics([metrics_line(3)])
    text = (recorded.run.dir / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [metrics_line(1), metrics_line(2, loss=1.25), metrics_line(3)]
    assert recorded.events == [
        {"kind": "metrics", "line": metrics_line(2, loss=1.25)},
        {"kind": "metrics", "line": metrics_line(3)},
    ]
    board = recorded.scalars()
    assert set(board) == set(metrics_line(0)) - {"step"}
    assert board["loss"] == {1: pytest.approx(3.9), 2: 1.25, 3: pytest.approx(3.7)}


def test_a_life_that_was_rolled_back_is_dropped(tiny_images, tmp_path):
    run = tiny_run(tiny_images, tmp_path / "run", "--train.steps", "6")
    first = Recorded(run)
    first.recorder.metrics([metrics_line(step) for step in (1, 2, 3, 4, 5, 6)])
    first.recorder.close()
    second = Recorded(run, start_step=4)
    second.recorder.metrics([metrics_line(5, loss=9.0)])
    lines = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines[3:]] == [(4, 3.6), (5, 9.0)] and len(lines) == 5
    assert second.scalars()["loss"] == {step: pytest.approx(4 - step / 10) for step in range(1, 5)} | {5: 9.0}


def write(path: Path, *steps: int, tail: str = "") -> Path:
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in steps) + tail)
    return path


def steps_in(path: Path) -> list[int]:
    assert path.read_text() == "" or path.read_text().endswith("\n")
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("step", "kept"), [(0, []), (1, [1]), (3, [1, 2, 3]), (4, [1, 2, 3]), (5, [1, 2, 3, 5]), (99, [1, 2, 3, 5, 6])]
)
def test_drop_lines_after(tmp_path, step, kept):
    path = write(tmp_path / "metrics.jsonl", 1, 2, 3, 5, 6)
    drop_lines_after(path, step)
    assert steps_in(path) == kept


@pytest.mark.parametrize(
    "tail", ['{"step": 3, "lo', "{", '{"step": 3', "\x00\x00", '{"loss": 1.0}', '{"step": 2}xx\n{"step": 1}\n']
)
def test_a_line_cut_short_is_dropped(tmp_path, tail):
    path = write(tmp_path / "metrics.jsonl", 1, 2, tail=tail)
    drop_lines_after(path, 99)
    assert steps_in(path) == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_lines_yet(tmp_path):
    drop_lines_after(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


# ---- views, checkpoints, wishes --------------------------------------------------------------------------------------


def test_views_show_the_first_eight_images(recorded):
    random = np.random.default_rng(0)
    two, three = (random.integers(0, 256, (10, views, 16, 16, 3), dtype=np.uint8) for views in (2, 3))
    recorded.recorder.views(Views(torch.from_numpy(two), torch.from_numpy(three), []))
    assert np.array_equal(np.asarray(Image.open(recorded.run.dir / "views.png")), view_grid(two[:8], three[:8]))


def test_checkpoints_say_where_they_come_from(recorded):
    recorded.state.step = 4
    recorded.recorder.checkpoint(recorded.state)
    (path,) = list_checkpoints(recorded.run.checkpoints)
    tensors, manifest = read_checkpoint(path)
    assert state_sha256(tensors) == state_sha256(to_tensors(recorded.state)) and int(tensors["step"]) == 4
    assert manifest == {
        "format": 1,
        "step": 4,
        "images_seen": 32,
        "next_position": 32,
        "dataset_size": 48,
        "config": json.loads(json.dumps(keys(recorded.run.config))),
        "versions": manifest["versions"],
        "state_sha256": state_sha256(tensors),
    }
    assert manifest["versions"]["torch"] == torch.__version__
    assert recorded.events == [{"kind": "checkpoint", "step": 4}]


def test_as_many_checkpoints_as_asked_for(tiny_images, tmp_path):
    made = Recorded(tiny_run(tiny_images, tmp_path / "run", "--train.steps", "6", "--checkpoint.keep", "3"))
    for step in range(1, 6):
        made.state.step = step
        made.recorder.checkpoint(made.state)
    made.recorder.close()
    assert [path.name for path in list_checkpoints(made.run.checkpoints)] == ["step_3", "step_4", "step_5"]


@pytest.mark.parametrize("stop", [True, False])
def test_the_wish_to_stop(tiny_images, tmp_path, stop):
    made = Recorded(tiny_run(tiny_images, tmp_path / "run", "--train.steps", "6"), stop=stop)
    made.recorder.close()
    assert made.recorder.stop_requested() is stop


def test_every_other_worker_is_silent_but_for_skipped_images():
    events = []
    silent = Silent(events.append)
    silent.metrics([metrics_line(1)])
    for call in (silent.views, silent.checkpoint, silent.evaluate):
        assert call(None) is None  # type: ignore[arg-type]
    silent.skipped([])
    assert events == [] and silent.stop_requested() is False
    silent.skipped(["a: cut"])
    assert events == [{"kind": "skipped", "images": ["a: cut"]}]


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


def record(run: Run, name: str) -> dict:
    return json.loads((run.dir / "eval" / f"knn_{name}.json").read_text())


def test_knn_before_the_first_step(recorded):
    run = recorded.run
    with torch.no_grad():  # the teacher is asked, so that is what must differ
        for parameter in recorded.state.student.parameters():
            parameter.zero_()
    assert recorded.evaluate(0) == ["knn_pixels.json", "knn_untrained.json"]
    assert run.bank is not None and run.queries is not None
    backbone = recorded.state.teacher.backbone
    teacher = [backbone_features(backbone, part, run.config, CPU) for part in (run.bank, run.queries)]
    pixels = [pixel_features(part) for part in (run.bank, run.queries)]
    assert len(run.queries) > 2
    for name, features in (("pixels", pixels), ("untrained", teacher)):
        assert record(run, name) == {
            "features": name,
            "step": 0,
            "top1": pytest.approx(plain_knn(*features, k=3, temperature=0.07)),
            "k": 3,
            "temperature": 0.07,
            "bank_images": len(run.bank),
            "query_images": len(run.queries),
        }
    assert recorded.events == [{"kind": "knn", **record(run, name)} for name in ("pixels", "untrained")]
    board = recorded.scalars()
    assert board["knn"] == {0: pytest.approx(record(run, "untrained")["top1"])}
    assert board["knn_pixels"] == {0: pytest.approx(record(run, "pixels")["top1"])}


def test_knn_of_pixels_does_not_ask_the_backbone(recorded):
    with torch.no_grad():
        for parameter in recorded.state.teacher.parameters():
            parameter.zero_()
    recorded.evaluate(0)
    bank, queries = (pixel_features(part) for part in (recorded.run.bank, recorded.run.queries))
    assert record(recorded.run, "pixels")["top1"] == pytest.approx(plain_knn(bank, queries, k=3, temperature=0.07))
    assert record(recorded.run, "untrained")["top1"] < record(recorded.run, "pixels")["top1"]


def test_knn_on_the_way_and_at_the_end(recorded):
    assert recorded.evaluate(4) == ["knn_step_4.json"]
    assert recorded.evaluate(6) == ["knn_step_4.json", "knn_step_6.json", "neighbours.json"]
    run = recorded.run
    assert run.bank is not None
    found = backbone_features(recorded.state.teacher.backbone, run.bank, run.config, CPU)
    assert json.loads((run.dir / "eval" / "neighbours.json").read_text()) == nearest_neighbours(found, run.bank)
    assert [event["step"] for event in recorded.events] == [4, 6]


def test_images_without_classes_have_neighbours_but_no_knn(tmp_path):
    made = Recorded(tiny_run(make_images(tmp_path / "plain", 12), tmp_path / "run", "--train.steps", "6", "--eval.max_images", "5"))
    assert made.evaluate(0) == [] and made.evaluate(4) == []
    assert made.evaluate(6) == ["neighbours.json"]
    made.recorder.close()
    rows = json.loads((made.run.dir / "eval" / "neighbours.json").read_text())
    assert [Path(row["path"]).name for row in rows] == ["000.png", "002.png", "005.png", "008.png", "011.png"]
    assert all(row["class"] is None and len(row["neighbours"]) == 4 for row in rows)
    assert made.events == []


def test_a_side_that_cannot_be_read_gives_no_knn(tmp_path):
    run = tiny_run(write_images(tmp_path / "images", 30), tmp_path / "run", "--train.steps", "6")
    assert run.queries is not None
    for sample in range(len(run.queries)):
        Path(run.queries.path(sample)).write_bytes(b"")
    made = Recorded(run)
    assert made.evaluate(0) == [] and made.evaluate(6) == ["neighbours.json"]
    made.recorder.close()


@pytest.mark.parametrize(("size", "at_most", "places"), [(3, 10, [0, 1, 2]), (10, 3, [0, 4, 9]), (1, 5, [0]), (7, 7, [*range(7)])])
def test_evenly(size, at_most, places):
    assert evenly(size, at_most).tolist() == places
