"""The console: events become the lines that people read."""

import io

import pytest
from rich.console import Console as RichConsole

from massl_ray.reporting import console as module
from massl_ray.reporting.console import Console, duration
from massl_ray.reporting.skipped import SkippedImages
from massl_ray.training.run import Run
from tests.helpers import make_images, metrics_line, tiny_run
from tests.images import write_images

STARTED = {"kind": "started", "step": 0, "world_size": 2, "device": "cpu", "parameters": 1_234_567, "step_s": 3.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("console")
    return tiny_run(write_images(folder / "images", 12), folder / "run", "--train.steps", "1200")


@pytest.fixture
def console(run, tmp_path) -> Console:
    return Console(run, SkippedImages(tmp_path))


@pytest.fixture
def said(console, capsys):
    """Follows events and returns the lines they make."""

    def lines(*events: dict) -> list[str]:
        for event in events:
            console.follow(event)
        return capsys.readouterr().out.splitlines()

    return lines


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    frozen = Clock()
    monkeypatch.setattr(module, "time", frozen)
    return frozen


def metrics(step: int, **changes) -> dict:
    """The line of this step comes last of several."""
    return {"kind": "metrics", "lines": [metrics_line(step - 1, loss=9.0), metrics_line(step, **changes)]}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (45, "45 s"),
        (89, "89 s"),
        (90, "2 min"),
        (12 * 60 + 10, "12 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (3.4 * 3600, "3.4 h"),
        (47.9 * 3600, "47.9 h"),
        (172800, "2.0 days"),
        (2.1 * 86400, "2.1 days"),
        (100 * 86400, "100.0 days"),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_plan(console, capsys, run):
    console.plan()
    assert capsys.readouterr().out.splitlines() == [
        f"Images    12 in {run.images.root}, 3 classes for k-NN",
        "Steps     1,200 of 8 images (800.0 epochs), 2 views of 32 px and 2 of 16 px",
        "Memory    64 slots, read in 2 random blocks of 32",
        f"Run       {run.dir}",
    ]


def test_plan_without_classes(tmp_path, capsys):
    run = tiny_run(make_images(tmp_path / "images", 10), tmp_path / "run", "--train.steps", "5")
    Console(run, SkippedImages(tmp_path)).plan()
    out = capsys.readouterr().out
    assert f"10 in {run.images.root}, no labels, so no k-NN" in out and "5 of 8 images (4.0 epochs)" in out


def test_started(said):
    assert said(STARTED) == [
        "Workers   2 on cpus; test_vit, 1.2 M parameters, fp32",
        "Time      About 60 min for 1,200 steps, evaluation not counted",
    ]
    assert said(STARTED | {"world_size": 1, "device": "NVIDIA H200", "step": 1000, "step_s": 0.2}) == [
        "Workers   1 on NVIDIA H200; test_vit, 1.2 M parameters, fp32",
        "Time      Continuing after step 1,000. About 40 s for 200 steps, evaluation not counted",
    ]


def test_metrics_line(said, clock):
    (line,) = said(metrics(100, loss=2.34567, images_per_s=1234.4, step_s=0.5, data_wait=0.256))
    assert line == "step 100/1200  epoch 16.7  loss 2.346  1234 images/s  data wait 26%  9 min left"


def test_progress_lines_keep_their_distance_and_the_last_comes_always(said, clock):
    steps = []
    for step, seconds in ((10, 0), (20, 9.9), (30, 10.1), (40, 15), (50, 20.3), (1200, 20.4)):
        clock.now = 1000.0 + seconds
        steps += [line.split("/")[0] for line in said(metrics(step))]
    assert steps == ["step 10", "step 30", "step 50", "step 1200"]


def test_knn(said, clock):
    knn = {"kind": "knn", "step": 0, "top1": 0.5}
    assert said(
        knn | {"features": "pixels"},
        knn | {"features": "untrained", "top1": 0.6, "top1_k1": 0.5, "adapted": True},
        knn | {"features": "untrained", "top1": 0.6, "adapted": False},
        knn | {"features": "step_40", "step": 40, "top1": 0.7125, "top1_k1": 0.65, "mean_per_class": 0.3},
    ) == [
        "k-NN      50.0%  raw pixels",
        "k-NN      60.0%  untrained, statistics adapted (k = 1 50.0%)",
        "k-NN      60.0%  untrained",
        "k-NN      71.2%  step 40 (k = 1 65.0%, mean per class 30.0%)",
    ]
    assert "data wait 25%  k-NN 71.2%  " in said(metrics(50))[0]


def test_skipped_images_are_named_once_and_at_most_three_a_time(said, console):
    names = [f"/x/{letter}.png: cut" for letter in "abcde"]
    assert said({"kind": "skipped", "images": names}) == [f"Skipped   {name}" for name in names[:3]]
    assert said({"kind": "skipped", "images": names}) == []
    assert said({"kind": "skipped", "images": [*names, "/y.png: cut"]}) == ["Skipped   /y.png: cut"]
    assert len(console.skipped) == 6


def test_stopping(said):
    (line,) = said({"kind": "stopping"})
    assert line.startswith("Stopping: the current step is finished and saved first.")


def test_failure(said):
    text = "Worker 1 failed: ValueError: none of the 48 images in /x [y] can be read any more"
    assert said({"kind": "failure", "text": text}) == [text]


def test_note(said):
    text = "Checkpoint passed over: 50% [/gone]"
    assert said({"kind": "note", "text": text}) == [f"Note      {text}"]


TRANSITION = {
    "kind": "transition", "at": "2026-01-02T03:04:05.678+00:00", "from": 3, "to": 2, "cause": "lost", "seconds": 4.26,
    "steps_repeated": 7, "step": 12345,
}  # fmt: skip


def test_transition(said):
    assert said(TRANSITION, TRANSITION | {"from": 2, "to": 4, "cause": "added", "seconds": 12.0, "steps_repeated": 0}) == [
        "Workers   3 -> 2 (lost) after step 12,345; 4.3 s until the next step, 7 steps repeated",
        "Workers   2 -> 4 (added) after step 12,345; 12.0 s until the next step, 0 steps repeated",
    ]


def test_the_first_start_is_no_transition_to_speak_of(said):
    assert said(TRANSITION | {"from": 0, "to": 3, "cause": "start"}) == []


def test_unknown_events_say_nothing(said):
    assert said({"kind": "progress", "life": 1, "step": 3}, {"kind": "checkpoint", "step": 4}, {"kind": "invented"}) == []


@pytest.mark.parametrize(
    "name", ["[bold]x[/bold].png", "[/x].png", ":smile:.png", "a" * 300 + ".png", "two  spaces.png", "100%.png"]
)
def test_names_are_printed_as_they_are(said, name):
    assert said({"kind": "skipped", "images": [name]}) == [f"Skipped   {name}"]


def test_names_that_the_terminal_cannot_show(said, console, monkeypatch):
    assert said({"kind": "skipped", "images": ["/a\nb\x1b[2J.png: cut"]}) == ["Skipped   /a\\nb\\x1b[2J.png: cut"]
    assert said({"kind": "skipped", "images": ["/\udcff.png"]}) == ["Skipped   /\\udcff.png"]
    monkeypatch.setattr(RichConsole, "encoding", "ascii")
    assert said({"kind": "skipped", "images": ["/ß.png"]}) == ["Skipped   /\\xdf.png"]


SUMMARY = {
    "steps": 1200,
    "loss_final": 2.34567,
    "images_per_s": 99.6,
    "wall_s": 100.0,
    "verdict": "dead",
    "verdict_text": "At step 9 all is alike. Change it.",
    "knn_pixels": 0.5,
    "knn_untrained": 0.6,
    "knn_final": 0.8,
    "knn1_pixels": 0.85,
    "knn1_untrained": 0.55,
    "knn1_final": 0.75,
    "knn_adapted": True,
    "knn_queries": 1000,
}


def test_finished(console, capsys, tmp_path):
    console.skipped.add(["a: cut", "b: cut"])
    console.finished(SUMMARY, tmp_path / "report.html")
    assert capsys.readouterr().out.splitlines() == [
        "Done      1,200 steps in 2 min, loss 2.346, 100 images/s",
        "k-NN      50.0% raw pixels; 60.0% untrained, statistics adapted; 80.0% trained: +20.0 points by training",
        "k = 1     85.0% raw pixels; 55.0% untrained, statistics adapted; 75.0% trained",
        "Note      Raw pixels are better than the trained backbone: 85.0% for 75.0% at k = 1.",
        "Verdict   dead. At step 9 all is alike. Change it.",
        f"Skipped   2 unreadable images, listed in {tmp_path / 'skipped.jsonl'}",
        f"Report    {tmp_path / 'report.html'}",
    ]


def test_finished_without_knn_and_verdict(console, capsys, tmp_path):
    nothing = {key: None if key.startswith(("knn", "verdict")) else value for key, value in SUMMARY.items()}
    console.finished(nothing, tmp_path / "report.html")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["Done", "Report"]


def test_a_terminal_gets_a_line_that_moves(run, tmp_path):
    console = Console(run, SkippedImages(tmp_path))
    screen = io.StringIO()
    console.rich = RichConsole(file=screen, force_terminal=True, width=160, soft_wrap=True, highlight=False)
    console.follow(STARTED | {"step": 300})
    assert console.progress is not None
    try:
        (task,) = console.progress.tasks
        assert (task.completed, task.total) == (300, 1200)
        console.follow(metrics(400, loss=2.5))
        assert task.completed == 400 and "loss 2.500" in task.fields["figures"]
        console.follow({"kind": "knn", "features": "step_400", "step": 400, "top1": 0.7})
        before = console.progress
        console.follow(STARTED | {"step": 300})  # workers came back
        assert console.progress is before and len(console.progress.tasks) == 1
    finally:
        console.close()
    assert console.progress is None
    shown = screen.getvalue()
    assert "k-NN      70.0%  step 400" in shown and "step 400/1200" not in shown
    assert "400/1200" in shown and "loss 2.500" in shown
    console.close()  # twice does no harm
