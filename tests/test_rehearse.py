"""The rehearsal's timeline, and the whole of it on request (-m elastic)."""

import json
import subprocess
import sys

import pytest

from massl_ray.benches import rehearse
from massl_ray.benches.rehearse import Timeline, Watch, draw


class Cloud:
    """Of so many machines."""

    def __init__(self):
        self.alive: list[str] = []

    def machines(self) -> list[str]:
        return self.alive


class Job:
    code: int | None = None

    def poll(self) -> int | None:
        return self.code


@pytest.fixture
def watch(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearse, "LOOK_S", 0.0)
    made = Watch(Cloud(), tmp_path, Job())  # type: ignore[arg-type]
    made.write = lambda name, *lines: (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))  # type: ignore[attr-defined]
    return made


TRANSITION = {"from": 1, "to": 2, "cause": "added", "seconds": 7.25, "pause_s": 1.0, "steps_repeated": 0, "step": 5}


def test_what_is_seen(watch, capsys):
    watch.look()
    watch.cloud.alive = ["a"]
    watch.write("metrics.jsonl", {"step": 1, "world_size": 1}, {"step": 2, "world_size": 1})
    watch.look()
    watch.cloud.alive = ["a", "b"]
    watch.write("metrics.jsonl", {"step": 2, "world_size": 1}, {"step": 9, "world_size": 2})
    watch.write("elastic.jsonl", TRANSITION)
    watch.look()
    watch.look()  # nothing new
    kept = watch.timeline
    assert [number for _, number in kept.machines] == [1, 2] and [number for _, number in kept.workers] == [1, 2]
    assert [step for _, step in kept.steps] == [2, 9] and kept.transitions == [TRANSITION]
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in shown] == [
        "0 -> 1 machines", "1 -> 2 machines", "1 -> 2 workers (added): 7.2 s, 1.0 s without a step, 0 steps repeated",
    ]  # fmt: skip


def test_a_line_under_way_is_left_for_later(watch, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "world_size": 1}\n{"step": 2, "wor')
    watch.look()
    assert watch.step == 1


def test_what_does_not_happen_is_named(watch, monkeypatch):
    monkeypatch.setattr(rehearse, "PATIENCE_S", 0.0)
    with pytest.raises(RuntimeError, match="^a second machine: it did not happen within 0 s$"):
        watch.until("a second machine", lambda: False)
    monkeypatch.setattr(rehearse, "PATIENCE_S", 60.0)
    watch.job.code = 0
    with pytest.raises(RuntimeError, match="^20 more steps: the run ended first; give it more --steps"):
        watch.until_steps(20)


def test_only_later_transitions_count(watch, monkeypatch):
    monkeypatch.setattr(rehearse, "PATIENCE_S", 0.05)
    watch.write("elastic.jsonl", TRANSITION)
    watch.look()
    with pytest.raises(RuntimeError, match="did not happen"):
        watch.until_transition("added", 2)


def test_the_picture_shows_every_series():
    timeline = Timeline(
        [(0.0, "begin"), (3.0, "1 -> 2 machines"), (9.0, "end")], [(1.0, 1), (8.0, 7)], [(0.5, 1), (3.0, 2)], [(1.0, 1)]
    )
    above, below = draw(timeline).axes
    assert above.lines[0].get_xydata().tolist() == [[1, 1], [8, 7]]
    assert below.lines[0].get_xydata().tolist() == [[0, 0], [0.5, 1], [3, 2], [9, 2]]
    assert [text.get_text().strip() for text in above.texts] == ["begin", "end"]


@pytest.mark.elastic
def test_the_whole_rehearsal(tmp_path):
    command = [sys.executable, "-m", "massl_ray.benches.rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "timeline.json").read_text())
    assert result["equal"] and result["exit_code"] == 0
    assert result["repeated_steps"]["added"] == result["repeated_steps"]["notice"] == 0
    assert (tmp_path / "timeline.png").stat().st_size > 20_000
