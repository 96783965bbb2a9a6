"""What a life begins with: the furthest state there is, from wherever it is at hand."""

import pytest
import torch

from massl_ray.on_ray import life
from massl_ray.on_ray.life import find_newer, take_up
from massl_ray.training.checkpoint import write_checkpoint
from massl_ray.training.collectives import Local
from massl_ray.training.exact_sums import Exact
from massl_ray.training.state import build_state, state_sha256, to_tensors
from tests.helpers import tiny_run

CPU = torch.device("cpu")


class Line:
    """A way to the command that has kept a state of this step, or none."""

    def __init__(self, kept: dict | None = None):
        self.copy = kept
        self.told: list[dict] = []

    def kept(self):
        return self.copy and (int(self.copy["step"]), ["reference"], {})

    def announce(self, event):
        self.told.append(event)


@pytest.fixture
def run(tiny_images, tmp_path):
    return tiny_run(tiny_images, tmp_path / "run")


@pytest.fixture
def workers(run):
    return Exact(Local(), run.resolved.num_micro_batches)


@pytest.fixture
def at(run, workers, monkeypatch):
    """The state of a step, as tensors; what a line has kept is fetched from itself."""
    made: dict[int, dict] = {}

    def at(step: int) -> dict:
        state = build_state(run.config, run.resolved, CPU, workers)
        state.step = step
        state.memory.rows += step
        made[step] = to_tensors(state)
        return made[step]

    monkeypatch.setattr(life, "ray", type("Ray", (), {"get": staticmethod(lambda reference: reference)}))
    monkeypatch.setattr(life, "unpack", lambda reference: made[max(made)])
    return at


def test_nothing_is_newer_than_nothing(run):
    assert find_newer(run, Line(), than=None) is None  # type: ignore[arg-type]


def test_the_furthest_of_checkpoint_and_copy_counts(run, at):
    write_checkpoint(run.checkpoints, at(8), {}, keep=2)
    assert find_newer(run, Line(), than=None)[0] == 8  # type: ignore[arg-type, index]
    found = find_newer(run, Line(at(9)), than=None)  # type: ignore[arg-type]
    assert found and found[0] == 9 and int(found[1]["step"]) == 9
    write_checkpoint(run.checkpoints, at(12), {}, keep=2)
    assert find_newer(run, Line({"step": 9}), than=None)[0] == 12  # type: ignore[arg-type, index]


def test_a_state_at_hand_is_used_without_reading_storage(run, at, workers, monkeypatch):
    write_checkpoint(run.checkpoints, at(8), {}, keep=2)
    monkeypatch.setattr(life, "read_latest", lambda folder: pytest.fail("storage was read"))
    state = build_state(run.config, run.resolved, CPU, workers)
    state.step = 10
    assert find_newer(run, Line({"step": 10}), than=state) is None  # type: ignore[arg-type]
    assert find_newer(run, Line({"step": 7}), than=state) is None  # type: ignore[arg-type]


def test_a_damaged_checkpoint_is_named_and_the_copy_used(run, at):
    folder = write_checkpoint(run.checkpoints, at(8), {}, keep=2)
    (folder.path / "state.safetensors").write_bytes(b"half")
    line = Line(at(4))
    assert find_newer(run, line, than=None)[0] == 4  # type: ignore[arg-type, index]
    assert "step_8" in line.told[0]["text"] and "cannot be read" in line.told[0]["text"]


def test_storage_that_fails_is_no_reason_to_stop_where_there_is_a_copy(run, at):
    run.checkpoints.path.rmdir()
    run.checkpoints.path.write_text("in the way")
    line = Line(at(4))
    found = find_newer(run, line, than=None)  # type: ignore[arg-type]
    assert found and found[0] == 4 and "Going on from the copy of step 4" in line.told[0]["text"]
    with pytest.raises(OSError, match="checkpoints"):  # it may hold a state that is further than the start
        find_newer(run, Line(), than=None)  # type: ignore[arg-type]


def test_a_run_that_begins_has_the_state_of_its_seed(run, workers):
    state = take_up(run, CPU, workers, None, None, None)
    expected = build_state(run.config, run.resolved, CPU, workers)
    assert state.step == 0 and state_sha256(to_tensors(state)) == state_sha256(to_tensors(expected))


def test_what_is_newer_is_loaded_into_what_is_there(run, workers, at):
    tensors = at(8)
    fresh = take_up(run, CPU, workers, None, 8, tensors)
    assert fresh.step == 8 and state_sha256(to_tensors(fresh)) == state_sha256(tensors)
    there = take_up(run, CPU, workers, fresh, 12, at(12))
    assert there is fresh and there.step == 12


def test_a_state_that_all_have_is_left_alone(run, workers, monkeypatch):
    state = build_state(run.config, run.resolved, CPU, workers)
    state.step, state.replica = 5, None  # type: ignore[assignment]
    monkeypatch.setattr(life, "from_tensors", lambda state, tensors: pytest.fail("it was loaded again"))
    assert take_up(run, CPU, workers, state, 5, None) is state
    assert state.replica is state.student  # wrapped anew for the workers of this life


def test_a_backbone_that_differs_from_time_to_time_is_named(run, workers, monkeypatch):
    """On a GPU with elastic.exact: the run ends at once with a sentence, and nobody starts it again."""

    def rehearse(*_):
        raise RuntimeError("avg_pool3d_backward_cuda does not have a deterministic implementation, but you set ...")

    closed = []

    def views(*_):
        try:
            yield
        finally:
            closed.append(True)

    def begun(*arguments):
        stream = views()
        next(stream)
        return stream

    monkeypatch.setattr(life, "rehearse", rehearse)
    monkeypatch.setattr(life, "stream_views", begun)
    monkeypatch.setattr(life, "data_tasks", lambda *_: None)
    line = Line()
    outcome = life._train(run, line, None, CPU, workers, life.Remains(feeder=None), first_life=True)  # type: ignore[arg-type]
    assert outcome.status == "failed" and closed
    assert "(avg_pool3d_backward_cuda)" in outcome.message and "--elastic.exact false" in outcome.message
    monkeypatch.setattr(life, "rehearse", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        life._train(run, line, None, CPU, workers, life.Remains(feeder=None), first_life=True)  # type: ignore[arg-type]
