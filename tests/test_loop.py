"""The loop on one worker without Ray: figures a step, checkpoints, wishes, verdicts, continuation to the bit."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from massl_ray.config import load
from massl_ray.data.order import samples_at, step_positions
from massl_ray.method.views import make_views
from massl_ray.training.collectives import Local
from massl_ray.training.loop import Views, Wish, train
from massl_ray.training.run import Run, prepare_run
from massl_ray.training.state import build_state, from_tensors, state_sha256, to_tensors
from massl_ray.training.verdict import ADVICE, Facts, Verdict, judge
from tests.helpers import read
from tests.images import TINY


class Memo:
    """A recorder that remembers. `wishes`: what it asks for during a step, by the step's number, counted from 1."""

    def __init__(self, wishes: dict[int, Wish] | None = None):
        self.lines: list[dict] = []
        self.saved: dict[int, dict] = {}
        self.evaluated: list[int] = []
        self.unreadable: list[str] = []
        self.calls: list[str] = []  # what was recorded, in order, but for metrics
        self.wishes = wishes or {}
        self.asked = 0

    def views(self, views: Views) -> None:
        self.first = views

    def metrics(self, lines) -> None:
        self.lines += lines

    def skipped(self, images) -> None:
        self.unreadable += images

    def checkpoint(self, state) -> None:
        self.saved[state.step] = to_tensors(state)
        self.calls.append(f"checkpoint {state.step}")

    def snapshot(self, state) -> None:
        self.calls.append(f"snapshot {state.step}")

    def step_done(self, state) -> None:
        self.calls.append(f"done {state.step}")

    def evaluate(self, state) -> None:
        self.evaluated.append(state.step)
        self.calls.append(f"evaluate {state.step}")

    def wish(self) -> Wish:
        self.asked += 1
        return self.wishes.get(self.asked, Wish.NONE)


@pytest.fixture
def make_run(tiny_images, tmp_path):
    def make(*flags: str) -> Run:
        return prepare_run(load([*TINY, "--data.source", str(tiny_images), "--run.dir", str(tmp_path / "run"), *flags]))

    return make


def stream(run: Run, start: int = 0, skipped: list[str] | None = None) -> Iterator[Views]:
    size = run.resolved.batch_size
    for step in range(start, run.resolved.steps):
        epochs, samples = samples_at(step_positions(step, size, 0, size), len(run.images), run.config.run.seed)
        made = [
            make_views(read(run.images.path(s)), run.config.views, seed=run.config.run.seed, epoch=int(e), sample=int(s))
            for e, s in zip(epochs, samples, strict=True)
        ]
        yield Views(*(torch.from_numpy(np.stack(views)) for views in zip(*made, strict=True)), skipped or [])


def start(run: Run, recorder: Memo, tensors=None, skipped=None, collectives: Local | None = None):
    collectives = collectives or Local()
    state = build_state(run.config, run.resolved, torch.device("cpu"), collectives)
    if tensors:
        from_tensors(state, tensors)
    return train(run, state, stream(run, state.step, skipped), collectives, recorder)


def test_a_whole_run(make_run):
    run, recorder = make_run("--train.steps", "9", "--eval.knn_every", "6"), Memo()
    outcome = start(run, recorder)
    assert (outcome.status, outcome.step) == ("finished", 9)
    assert [line["step"] for line in recorder.lines] == list(range(1, 10))
    assert [line["images_seen"] for line in recorder.lines] == [8 * step for step in range(1, 10)]
    assert recorder.lines[-1]["epoch"] == pytest.approx(9 * 8 / 48)
    assert sorted(recorder.saved) == [4, 6, 8, 9] and recorder.evaluated == [0, 6, 9]
    for line in recorder.lines:
        koleo = run.config.loss.koleo_weight * line["koleo"]
        assert line["kl"] == pytest.approx(line["loss"] - koleo - line["teacher_entropy"])
        assert line["world_size"] == 1 and line["images_per_s"] > 0 and 0 <= line["data_wait"] <= 1
    assert recorder.lines[0]["loss"] != recorder.lines[-1]["loss"]


def test_continued_from_a_checkpoint_to_the_bit(make_run):
    """Drop path on: steps 5 to 8 after a restart from step 4 give the state that an undisturbed run has."""
    run = make_run("--train.steps", "8")
    whole, again = Memo(), Memo()
    start(run, whole)
    outcome = start(run, again, tensors=whole.saved[4])
    assert outcome.status == "finished"
    assert state_sha256(again.saved[8]) == state_sha256(whole.saved[8])
    assert [line["loss"] for line in again.lines] == [line["loss"] for line in whole.lines[4:]]
    assert state_sha256(whole.saved[4]) != state_sha256(whole.saved[8])


def test_a_run_in_two_parts(make_run):
    """train.stop_at ends it earlier, evaluated and saved, on the schedules of the whole; what comes after does not depend on it."""
    whole, first, second = Memo(), Memo(), Memo()
    start(make_run("--train.steps", "9"), whole)
    part = make_run("--train.steps", "9", "--train.stop_at", "5")
    outcome = start(part, first)
    assert (outcome.status, outcome.step) == ("finished", 5) and part.resolved.steps == 9
    assert sorted(first.saved) == [4, 5] and first.evaluated == [0, 5]
    start(make_run("--train.steps", "9"), second, tensors=first.saved[5])
    assert state_sha256(second.saved[9]) == state_sha256(whole.saved[9])
    assert [line["lr"] for line in [*first.lines, *second.lines]] == [line["lr"] for line in whole.lines]
    again = Memo()
    assert start(part, again, tensors=first.saved[5]).status == "finished" and not again.lines  # nothing left to do
    assert make_run("--train.steps", "9", "--train.stop_at", "20").resolved.end == 9


def test_stop_saves_and_says_where(make_run):
    """The step during which it is asked for is the last one; its line of metrics is not lost."""
    run, recorder = make_run("--train.steps", "40"), Memo({7: Wish.STOP})
    outcome = start(run, recorder)
    assert (outcome.status, outcome.step) == ("stopped", 7)
    assert outcome.message == "Stopped on request after step 7, which is saved."
    assert sorted(recorder.saved) == [4, 7] and recorder.lines[-1]["step"] == 7
    assert recorder.calls[-2:] == ["done 6", "checkpoint 7"]


def test_resize_leaves_with_a_snapshot(make_run):
    run, recorder = make_run("--train.steps", "40"), Memo({7: Wish.RESIZE})
    outcome = start(run, recorder)
    assert (outcome.status, outcome.step, outcome.message) == ("resize", 7, "")
    assert sorted(recorder.saved) == [4] and recorder.lines[-1]["step"] == 7
    assert recorder.calls[-2:] == ["done 6", "snapshot 7"]


def test_a_wish_to_save_is_a_snapshot_and_training_goes_on(make_run):
    """Where a checkpoint is due anyway, that is it."""
    run, recorder = make_run("--train.steps", "7"), Memo({3: Wish.SAVE, 4: Wish.SAVE})
    outcome = start(run, recorder)
    assert (outcome.status, outcome.step) == ("finished", 7)
    assert recorder.calls == [
        "evaluate 0", "done 1", "done 2", "snapshot 3", "done 3", "checkpoint 4", "done 4", "done 5", "done 6",
        "evaluate 7", "checkpoint 7", "done 7",
    ]  # fmt: skip


@pytest.mark.parametrize("wish", [Wish.RESIZE, Wish.STOP])
def test_nobody_leaves_after_the_last_step(make_run, wish):
    run, recorder = make_run("--train.steps", "3"), Memo({3: wish})
    assert start(run, recorder).status == "finished" and sorted(recorder.saved) == [3]


def test_an_evaluation_comes_before_a_checkpoint_and_implies_one(make_run):
    """So that a manifest can say how good its state is."""
    run, recorder = make_run("--train.steps", "7", "--eval.knn_every", "3"), Memo()
    start(run, recorder)
    assert [call for call in recorder.calls if not call.startswith("done")] == [
        "evaluate 0", "evaluate 3", "checkpoint 3", "checkpoint 4", "evaluate 6", "checkpoint 6", "evaluate 7", "checkpoint 7",
    ]  # fmt: skip


class Others(Local):
    """As if there were more workers, one of which has wishes."""

    def __init__(self, wishes: dict[int, Wish]):
        self.wishes, self.heard = wishes, []

    def start_agreement(self, wish: int):
        self.heard.append(wish)
        return lambda: max(wish, self.wishes.get(len(self.heard), Wish.NONE))


def test_what_workers_agree_on_counts_not_the_own_wish(make_run):
    run, recorder, others = make_run("--train.steps", "40"), Memo({2: Wish.SAVE}), Others({2: Wish.NONE, 5: Wish.STOP})
    outcome = start(run, recorder, collectives=others)
    assert (outcome.status, outcome.step) == ("stopped", 5)
    assert others.heard == [Wish.NONE, Wish.SAVE, Wish.NONE, Wish.NONE, Wish.NONE]
    assert "snapshot 2" in recorder.calls


def test_wishes_of_several_workers_are_ordered():
    assert sorted(Wish) == [Wish.NONE, Wish.SAVE, Wish.RESIZE, Wish.STOP]
    assert max(Wish.SAVE, Wish.STOP, Wish.RESIZE) == Wish.STOP and not Wish.NONE


def test_collapse_is_named(make_run):
    run, recorder = make_run("--train.steps", "40", "--monitor.min_spread", "1", "--monitor.patience", "6"), Memo()
    outcome = start(run, recorder)
    assert (outcome.status, outcome.step) == ("collapsed", 6)
    assert max(recorder.saved) == 4 and recorder.calls[-1] == "done 5"


MONITORED = ["--train.steps", "40", "--monitor.min_kl", "0.15", "--monitor.patience", "12"]


def test_a_dead_run_is_stopped_and_says_what_to_change(make_run):
    """A rate of a thousand times the usual one: real embeddings that become one point, real figures, soon after the warm-up. Where
    the batch joins the memory, this rate kills nothing."""
    run, recorder = make_run(*MONITORED, "--optim.lr", "5", "--loss.recipe", "paper"), Memo()
    outcome = start(run, recorder)
    assert outcome.status == "dead" and outcome.step <= 30 and ADVICE[Verdict.DEAD] in outcome.message
    assert all(line["kl"] < 0.15 for line in recorder.lines if outcome.step - 12 < line["step"] <= outcome.step)
    assert recorder.lines[outcome.step - 1]["embedding_std"] < 0.05 and max(recorder.saved) < outcome.step


def test_a_living_run_is_left_alone(make_run):
    """Forty steps of 48 images teach it little, which may be said, but nothing is wrong with its figures."""
    run, recorder = make_run(*MONITORED), Memo()
    assert start(run, recorder).status == "finished"
    finding = judge(recorder.lines, [], Facts.of(run.config.model_dump()))
    assert finding is not None and finding.verdict in (Verdict.HEALTHY, Verdict.SLOW)


def test_koleo_is_nothing_that_the_student_could_learn(make_run):
    """kl is the read-out's part of the loss less the teacher's entropy: it cannot be negative, whatever KoLeo adds."""
    run, recorder = make_run("--train.steps", "4", "--loss.koleo_weight", "3"), Memo()
    start(run, recorder)
    for line in recorder.lines:
        assert abs(line["koleo"]) > 0.01
        assert line["kl"] == pytest.approx(line["loss"] - 3 * line["koleo"] - line["teacher_entropy"])
        assert line["kl"] > 0


def test_too_many_unreadable_images_end_the_run(make_run):
    run, recorder = make_run("--train.steps", "40", "--data.max_skipped", "0.1"), Memo()
    outcome = start(run, recorder, skipped=["a.png: OSError: gone"])
    assert outcome.status == "unreadable" and "6 of 48 images" in outcome.message
    assert recorder.unreadable == ["a.png: OSError: gone"] * 6  # not before every image had its turn
    run, recorder = make_run("--train.steps", "4", "--data.max_skipped", "0.2"), Memo()
    assert start(run, recorder, skipped=["a.png: OSError: gone"]).status == "finished"


def test_a_step_draws_nothing_from_the_global_generators(make_run):
    run = make_run("--train.steps", "3")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        state_before = np.random.get_state()[1].copy()  # type: ignore[index]
        start(run, Memo())
        np.testing.assert_array_equal(np.random.get_state()[1], state_before)  # type: ignore[index]
    assert torch.equal(torch.random.get_rng_state(), before)
