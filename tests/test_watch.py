"""What ails a run is said once, while it trains."""

import json

import pytest

from massl_ray.config import load
from massl_ray.reporting.watch import Watch
from massl_ray.training.verdict import ADVICE, WINDOW, Verdict
from tests.helpers import dead_lines, metrics_line
from tests.images import TINY


@pytest.fixture
def watch(tmp_path) -> Watch:
    """Of a run of 64 slots in 2 blocks, written to tmp_path."""
    (tmp_path / "eval").mkdir()
    settings = load([*TINY, "--train.steps", "120"]).model_dump()
    (tmp_path / "config.toml").write_text("memory = { size = 64, num_blocks = 2 }\ntrain = { steps = 120 }\n")
    return Watch(settings, tmp_path)


def metrics(lines: list[dict]) -> dict:
    return {"kind": "metrics", "lines": lines}


def told(watch: Watch, lines: list[dict], at_once: int = 10) -> list[str]:
    """What is said while these lines come, a few at once."""
    return [watch.follow(metrics(lines[first : first + at_once])) for first in range(0, len(lines), at_once)]


def test_a_healthy_run_is_not_talked_about(watch):
    assert told(watch, [metrics_line(step) for step in range(1, 101)]) == [""] * 10
    assert watch.follow({"kind": "stopping"}) == ""


def test_each_is_said_once_with_what_to_change(watch):
    shrinking = [metrics_line(step, embedding_std=0.1) for step in range(1, 41)]
    said = told(watch, shrinking)
    assert [bool(text) for text in said] == [False, True, False, False]  # not before WINDOW lines
    assert "spread is 0.10" in said[1] and said[1].endswith(ADVICE[Verdict.SHRINKING])
    said = told(watch, [line | {"step": 40 + line["step"]} for line in dead_lines(40)])
    assert [bool(text) for text in said] == [False, True, False, False] and said[1].startswith("At step 60 the run is dead")


def test_steps_that_are_rolled_back_are_forgotten(watch):
    told(watch, dead_lines(WINDOW - 10))
    watch.follow({"kind": "started", "step": 0})
    assert told(watch, dead_lines(WINDOW))[0] == ""


def test_memorising_is_read_off_the_run_directory(watch, tmp_path):
    """Only where k-NN is measured: the lines of its best are long gone by then."""
    lines = [metrics_line(step, kl=2.0 - step / 100) for step in range(1, 121)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert told(watch, lines) == [""] * 12
    for step, top1 in ((0, 0.3), (40, 0.6), (120, 0.4)):
        name = f"step_{step}" if step else "untrained"
        record = {"features": name, "step": step, "top1": top1, "query_images": 400}
        (tmp_path / "eval" / f"knn_{name}.json").write_text(json.dumps(record))
        said = watch.follow({"kind": "knn", **record})
        assert bool(said) == (step == 120)
    assert "20.0 points below its best" in said and said.endswith(ADVICE[Verdict.MEMORISING])
    assert watch.follow({"kind": "knn", **record}) == ""
