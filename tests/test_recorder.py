"""The recorder: events in, and what lies in a run directory afterwards."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.summary.writer import event_file_writer

from massl_ray.reporting.recorder import RunRecorder, drop_lines_after
from massl_ray.reporting.summary import read_knn, read_metrics
from massl_ray.training.run import Run
from tests.helpers import make_images, metrics_line, no_file_over, tiny_run

AT = "2026-01-02T03:04:05.678+00:00"


class Recorded:
    """A recorder of a tiny run that follows events."""

    def __init__(self, run: Run):
        self.run = run
        self.recorder = RunRecorder(run)

    def follow(self, *events: dict) -> None:
        for event in events:
            self.recorder.follow(event)

    def scalars(self) -> dict[str, dict[int, float]]:
        """What TensorBoard shows."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.recorder.close()
        events = EventAccumulator(str(self.run.dir / "tensorboard"))
        events.Reload()
        shown = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        return {tag: values for tag, values in shown.items() if values}


@pytest.fixture(autouse=True)
def first_files(monkeypatch):
    """TensorBoard reads its files by name: second of creation and a number of the process, of which 10 sorts before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.fixture
def run(tmp_path) -> Run:
    return tiny_run(make_images(tmp_path / "images", 8), tmp_path / "run", "--train.steps", "6")


@pytest.fixture
def recorded(run):
    made = Recorded(run)
    yield made
    made.recorder.close()


def started(step: int) -> dict:
    return {"kind": "started", "step": step, "world_size": 1, "device": "cpu", "step_s": 1.0, "parameters": 1}


def metrics(*steps: int, **changes) -> dict:
    return {"kind": "metrics", "lines": [metrics_line(step, **changes) for step in steps]}


def transition(**changes) -> dict:
    event = {"kind": "transition", "at": "2026-01-02T03:04:05.678+00:00", "from": 3, "to": 2, "cause": "lost", "seconds": 4.2}
    return event | {"steps_repeated": 2, "step": 4} | changes


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_go_to_the_file_and_the_board(recorded):
    recorded.follow(metrics(1), metrics(2, loss=1.25), metrics(3))
    assert read_metrics(recorded.run.dir) == [metrics_line(1), metrics_line(2, loss=1.25), metrics_line(3)]
    board = recorded.scalars()
    assert set(board) == set(metrics_line(0)) - {"step"}
    assert board["loss"] == {1: pytest.approx(3.9), 2: 1.25, 3: pytest.approx(3.7)}


def test_a_life_that_was_rolled_back_is_dropped(recorded):
    recorded.follow(started(0), metrics(1, 2, 3), metrics(4, 5, 6), started(4), metrics(5, loss=9.0))
    lines = read_metrics(recorded.run.dir)
    assert [(line["step"], line["loss"]) for line in lines[3:]] == [(4, 3.6), (5, 9.0)] and len(lines) == 5
    assert recorded.scalars()["loss"] == {step: pytest.approx(4 - step / 10) for step in range(1, 5)} | {5: 9.0}


def test_a_life_that_was_rolled_back_to_the_start_is_dropped(recorded):
    recorded.follow(started(0), metrics(1, 2), knn("untrained", 0, 0.25), started(0))
    assert read_metrics(recorded.run.dir) == [] and recorded.scalars() == {}


def test_an_earlier_command_is_dropped_too(run):
    """And not before the workers say where they go on."""
    first = Recorded(run)
    first.follow(started(0), metrics(1, 2, 3, 4, 5))
    first.recorder.close()
    second = Recorded(run)
    assert len(read_metrics(run.dir)) == 5
    second.follow(started(4), metrics(5, loss=9.0))
    assert [line["loss"] for line in read_metrics(run.dir)[3:]] == [3.6, 9.0]
    assert second.scalars()["loss"] == {step: pytest.approx(4 - step / 10) for step in range(1, 5)} | {5: 9.0}


@pytest.fixture
def ended_threads(recorded):
    """TensorBoard's threads end with what they could not write: waited for, so that pytest hears of it in a test that allows it."""
    yield
    recorded.recorder.close()
    for thread in threading.enumerate():
        if isinstance(thread, event_file_writer._AsyncWriterThread):
            thread.join(30)


allows_ended_threads = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@allows_ended_threads
def test_a_disk_that_takes_no_more_for_a_while(recorded, ended_threads):
    """No line is lost, none is doubled, none is cut; the board goes on after."""
    recorded.follow(started(0), metrics(1))
    size = (recorded.run.dir / "metrics.jsonl").stat().st_size
    with no_file_over(size + 30), pytest.raises(OSError, match="File too large"):
        recorded.follow(metrics(2, 3))
    assert [line["step"] for line in read_metrics(recorded.run.dir)] == [1]
    recorded.follow(metrics(2, 3), transition())
    with no_file_over(10), pytest.raises(OSError, match="File too large"):
        recorded.follow(transition())
    with no_file_over(10), pytest.raises(OSError, match="File too large"):
        recorded.follow(started(1))
    assert [line["step"] for line in read_metrics(recorded.run.dir)] == [1, 2, 3]
    assert len((recorded.run.dir / "elastic.jsonl").read_text().splitlines()) == 1
    assert not list(recorded.run.dir.glob(".metrics*"))
    recorded.follow({"kind": "checkpoint"}, {"kind": "checkpoint"}, metrics(4))
    assert 4 in recorded.scalars()["loss"]


@allows_ended_threads
def test_a_board_that_cannot_be_written_to_is_no_reason_to_fail(recorded, ended_threads):
    recorded.follow(started(0), metrics(1))
    recorded.recorder.board.folder.rename(recorded.run.dir / "away")
    (recorded.run.dir / "tensorboard").write_text("in the way")
    recorded.follow(started(1), metrics(2), {"kind": "checkpoint"}, transition())
    (recorded.run.dir / "tensorboard").unlink()
    recorded.follow({"kind": "checkpoint"}, metrics(3))
    assert recorded.scalars()["loss"].keys() == {3}
    assert [line["step"] for line in read_metrics(recorded.run.dir)] == [1, 2, 3]


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


# ---- machines that come and go ---------------------------------------------------------------------------------------


def test_transitions_are_listed_and_stay(recorded):
    """What was rolled back did happen."""
    recorded.follow(transition(), started(4), transition(cause="added", **{"from": 2, "to": 4}, step=5), started(0))
    lines = [json.loads(line) for line in (recorded.run.dir / "elastic.jsonl").read_text().splitlines()]
    assert lines == [
        {
            "at": "2026-01-02T03:04:05.678+00:00",
            "from": 3,
            "to": 2,
            "cause": "lost",
            "seconds": 4.2,
            "steps_repeated": 2,
            "step": 4,
        },
        {
            "at": "2026-01-02T03:04:05.678+00:00",
            "from": 2,
            "to": 4,
            "cause": "added",
            "seconds": 4.2,
            "steps_repeated": 2,
            "step": 5,
        },
    ]


def test_transitions_are_on_the_board(recorded):
    recorded.follow(transition(), transition(to=4, step=5))
    assert recorded.scalars() == {"world_size_after": {4: 2.0, 5: 4.0}}


# ---- evaluation and views --------------------------------------------------------------------------------------------


def knn(name: str, step: int, top1: float) -> dict:
    return {"kind": "knn", "features": name, "step": step, "top1": top1, "k": 3, "bank_images": 40}


def test_knn(recorded):
    records = [knn("pixels", 0, 0.25), knn("untrained", 0, 0.5), knn("step_4", 4, 0.75)]
    recorded.follow(*records)
    assert read_knn(recorded.run.dir) == [{key: value for key, value in each.items() if key != "kind"} for each in records]
    names = sorted(path.name for path in (recorded.run.dir / "eval").iterdir())
    assert names == ["knn_pixels.json", "knn_step_4.json", "knn_untrained.json"]
    assert recorded.scalars() == {"knn_pixels": {0: 0.25}, "knn": {0: 0.5, 4: 0.75}}


def test_neighbours(recorded):
    found = [{"path": "/a.png", "class": None, "neighbours": [{"path": "/b.png", "similarity": 0.5}]}]
    recorded.follow({"kind": "neighbours", "found": found})
    assert json.loads((recorded.run.dir / "eval" / "neighbours.json").read_text()) == found


def test_views(recorded):
    grid = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    recorded.follow({"kind": "views", "grid": grid})
    assert np.array_equal(np.asarray(Image.open(recorded.run.dir / "views.png")), grid)


def test_other_events_write_nothing(recorded):
    before = {path.name for path in recorded.run.dir.iterdir()}
    recorded.follow({"kind": "progress", "life": 1, "step": 3}, {"kind": "invented"}, {"kind": "checkpoint", "step": 4})
    assert {path.name for path in recorded.run.dir.iterdir()} == before
    assert before == {"checkpoints", "config.toml", "eval", "images.json", "tensorboard"}
