"""Machines, workers and the command end at bad moments, and the run ends in the bits of an undisturbed one. Real Ray, on machines
that are pretended and processes that are killed."""

import json
import math
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import pytest

from massl_ray.benches.exact import final_hash
from massl_ray.config import load
from massl_ray.on_ray.launch import Stopped
from massl_ray.on_ray.practice import PracticeCluster, Scenario, practice_cluster, run_through
from massl_ray.reporting.summary import read_metrics
from massl_ray.training.run import Run, claim_directory, prepare_run
from tests.images import TINY, write_images

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.elastic]

LEAST_STEPS, RUN_S = 240, 75.0  # of a run: several times what a machine that is lost and another one that comes take
FLAGS = "--train.checkpoint_every 20 --elastic.max_lost_seconds 2 --elastic.timeout_seconds 60".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("elastic") / "images", 48)


@pytest.fixture(scope="module")
def cluster():
    """Two machines; each test leaves it with two."""
    with practice_cluster(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def steps(images, tmp_path_factory, cluster) -> int:
    """So many that everything has happened before they are done, however fast the computer is."""
    folder = tmp_path_factory.mktemp("pace") / "run"
    flags = ["--data.source", str(images), "--run.dir", str(folder), "--train.steps", "60"]
    run = claim_directory(prepare_run(load([*TINY, *FLAGS, *flags])))
    run_through(run, cluster, lambda event: None)
    step_s = run.resolved.batch_size / median(line["images_per_s"] for line in read_metrics(run.dir))
    return max(LEAST_STEPS, 20 * math.ceil(RUN_S / step_s / 20))


@pytest.fixture
def prepared(images, tmp_path, steps):
    def prepared(*flags: str, workers: tuple[int, int] = (1, 2), name: str = "run", times: int = 1) -> Run:
        """A run of `times` as many steps."""
        least, most = map(str, workers)
        elastic = ["--elastic.min_workers", least, "--elastic.max_workers", most]
        source = ["--data.source", str(images), "--run.dir", str(tmp_path / name)]
        long = ["--train.steps", str(times * steps)]
        return claim_directory(prepare_run(load([*TINY, *FLAGS, *long, *elastic, *source, *flags])))

    return prepared


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory, cluster, steps) -> str:
    """state_sha256 of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    flags = ["--data.source", str(images), "--run.dir", str(folder), "--train.steps", str(steps)]
    run = claim_directory(prepare_run(load([*TINY, *FLAGS, *flags])))
    run_through(run, cluster, lambda event: None)
    return final_hash(run)


def transitions(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.dir / "elastic.jsonl").read_text().splitlines()]


def check_whole(run: Run, undisturbed: str) -> None:
    """The same bits, one line of metrics a step, and no more repeated than was allowed."""
    assert final_hash(run) == undisturbed
    assert [line["step"] for line in read_metrics(run.dir)] == list(range(1, run.resolved.steps + 1))


def go_through(run: Run, cluster: PracticeCluster, script) -> list[dict]:
    scenario = Scenario(script)
    outcome, events = run_through(run, cluster, scenario.meet)
    assert outcome.status == "finished", outcome
    assert scenario.over, "the run was over before everything had happened"
    return events


def mend(cluster: PracticeCluster) -> None:
    """Back to two machines."""
    while len(cluster.machines) < 2:
        cluster.add()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("in_place", ["true", "false"])
def test_a_worker_is_killed_in_the_middle_of_a_step(prepared, cluster, undisturbed, rank, in_place):
    run = prepared("--elastic.in_place", in_place)

    def script(scenario):
        yield from scenario.transition(2)
        yield from scenario.steps(30)
        cluster.kill_worker(rank)
        yield from scenario.transition(2)

    events = go_through(run, cluster, script)
    check_whole(run, undisturbed)
    assert [(each["from"], each["to"], each["cause"]) for each in transitions(run)] == [(0, 2, "start"), (2, 2, "failure")]
    if in_place == "true":  # otherwise Ray Train may end the others before they can say what befell them
        assert any(event["kind"] == "failure" for event in events)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_is_lost_and_another_one_comes(prepared, cluster, undisturbed, rank):
    """The first worker's, which writes the checkpoints, or another's. Nothing is repeated when the new one joins."""
    run = prepared()

    def script(scenario):
        yield from scenario.transition(2)
        yield from scenario.steps(20)
        cluster.kill(rank)
        yield from scenario.transition(1)
        cluster.add()
        yield from scenario.transition(2)

    go_through(run, cluster, script)
    check_whole(run, undisturbed)
    start, lost, added = transitions(run)
    assert (start["to"], lost["to"], added["to"]) == (2, 1, 2)
    assert lost["cause"] in ("lost", "failure") and added["cause"] == "added" and added["steps_repeated"] == 0
    mend(cluster)


def test_a_machine_is_lost_in_the_first_step_after_a_change(prepared, cluster, undisturbed):
    run = prepared()

    def script(scenario):
        yield from scenario.transition(2)
        yield from scenario.steps(10)
        cluster.kill_worker(1)
        while scenario.life == 1:
            yield
        cluster.kill(1)  # as soon as the next life has begun
        yield from scenario.transition(1)

    go_through(run, cluster, script)
    check_whole(run, undisturbed)
    mend(cluster)


def test_a_notice_costs_no_step(prepared, cluster, undisturbed):
    run = prepared()

    def script(scenario):
        yield from scenario.transition(2)
        yield from scenario.steps(20)
        cluster.give_notice(0, 15.0, then_kill=True)
        yield from scenario.transition(1)

    go_through(run, cluster, script)
    check_whole(run, undisturbed)
    (_, notice) = transitions(run)
    assert (notice["cause"], notice["steps_repeated"]) == ("notice", 0)
    mend(cluster)


def test_a_worker_is_lost_in_the_middle_of_a_collective(prepared, cluster, undisturbed):
    """It is frozen first, so that the other one waits for it in its gather or sum."""
    run = prepared()

    def script(scenario):
        yield from scenario.transition(2)
        yield from scenario.steps(20)
        os.kill(cluster.placed[1]["pid"], signal.SIGSTOP)
        same = 0
        while same < 10:
            before = scenario.step
            yield
            same = same + 1 if scenario.step == before else 0
        cluster.kill_worker(1)
        yield from scenario.transition(2)

    go_through(run, cluster, script)
    check_whole(run, undisturbed)


def test_a_worker_is_lost_in_the_middle_of_writing_a_checkpoint(prepared, cluster, undisturbed):
    run = prepared()
    cut: list[str] = []

    def end_the_writer() -> None:
        while not cut:
            cut.extend(path.name for path in run.checkpoints.path.glob(".unfinished_*"))
        cluster.kill_worker(0)

    def script(scenario):
        yield from scenario.transition(2)
        yield from scenario.steps(5)
        threading.Thread(target=end_the_writer, daemon=True).start()
        yield from scenario.transition(2)

    go_through(run, cluster, script)
    check_whole(run, undisturbed)
    assert cut and not list(run.checkpoints.path.glob(".unfinished_*"))


def test_the_command_is_stopped_and_run_again_with_another_number_of_workers(prepared, cluster, undisturbed):
    def script(scenario):
        yield from scenario.steps(25)
        os.kill(os.getpid(), signal.SIGTERM)

    run = prepared(workers=(1, 1))
    with pytest.raises(Stopped) as stopped:
        run_through(run, cluster, Scenario(script).meet)
    assert stopped.value.signum == signal.SIGTERM
    again = prepared(workers=(2, 2))
    outcome, _ = run_through(again, cluster, lambda event: None)
    assert outcome.status == "finished"
    check_whole(again, undisturbed)
    assert [each["steps_repeated"] for each in transitions(again)] == [0, 0]


def test_a_lost_machine_costs_no_more_than_was_allowed(prepared, cluster, undisturbed):
    """From the first step that has to be done again to the loss."""
    run = prepared("--elastic.max_lost_seconds", "6")
    lost_at: list[float] = []

    def script(scenario):
        yield from scenario.transition(2)
        yield from scenario.steps(70)
        lost_at.append(time.monotonic())
        cluster.kill(0)
        yield from scenario.transition(1)

    events = go_through(run, cluster, script)
    check_whole(run, undisturbed)
    begun = [event["step"] for event in events if event["kind"] == "started"][-1]
    done_at = [event["seen"] for event in events if event["kind"] == "progress" and event["life"] == 1 and event["step"] > begun]
    assert not done_at or lost_at[0] - min(done_at) <= 6.0
    mend(cluster)


def test_storage_that_comes_back(prepared, cluster, undisturbed):
    """A file lies where the checkpoints should: nothing can be written or read until it is taken away, and nobody waits for
    that, not even after a loss."""
    run = prepared("--train.checkpoint_every", "5")
    folder = run.checkpoints.path

    def script(scenario):
        yield from scenario.transition(2)
        folder.rename(folder.with_name("away"))
        folder.write_text("in the way")
        yield from scenario.steps(30)
        cluster.kill_worker(1)
        yield from scenario.transition(2)
        folder.unlink()

    events = go_through(run, cluster, script)
    check_whole(run, undisturbed)
    notes = " ".join(event["text"] for event in events if event["kind"] == "note")
    assert "could not be written" in notes and "cannot be read" in notes and "can be written to again" in notes


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes more rights than these")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread ends
def test_a_full_disk(prepared, cluster, undisturbed, small_disk):
    """Neither checkpoints nor metrics can be written for a while; training goes on, and nothing is missing in the end."""
    run = prepared("--run.dir", str(small_disk / "run"), "--checkpoint.keep", "1")
    ballast = small_disk / "ballast"

    def script(scenario):
        yield from scenario.transition(2)
        yield from scenario.steps(10)
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        yield from scenario.noted("cannot be written")
        ballast.unlink()

    events = go_through(run, cluster, script)
    check_whole(run, undisturbed)
    assert any("nothing is missing" in event.get("text", "") for event in events)


def test_a_clock_that_jumps(prepared, cluster, undisturbed, monkeypatch):
    """Of the machine with the command: an hour forward, then two back."""
    run, jump_s, real = prepared(), [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s[0])

    def script(scenario):
        yield from scenario.transition(2)
        for jump_s[0] in (3600.0, -3600.0):
            yield from scenario.steps(20)
        cluster.kill(1)
        yield from scenario.transition(1)

    go_through(run, cluster, script)
    check_whole(run, undisturbed)
    assert all(0 < each["seconds"] < 600 for each in transitions(run))
    mend(cluster)


@pytest.mark.soak
def test_soak(prepared, cluster, undisturbed):
    """Twenty kills and joins, at moments drawn with a fixed seed."""
    import numpy as np

    random = np.random.default_rng(0)
    run = prepared(name="soak", times=5)
    calm = prepared(name="calm", times=5)
    happened: list[str] = []

    def script(scenario):
        yield from scenario.transition(2)
        while len(happened) < 20:
            yield from scenario.steps(int(random.integers(5, 30)))
            alive = len(cluster.machines)
            what = "join" if alive < 2 else ("kill", "worker")[int(random.integers(2))]
            happened.append(what)
            if what == "join":
                cluster.add()
                yield from scenario.transition(2)
            elif what == "kill":
                cluster.kill(int(random.integers(2)))
                yield from scenario.transition(1)
            else:
                cluster.kill_worker(int(random.integers(2)))
                yield from scenario.transition(2)

    go_through(run, cluster, script)
    mend(cluster)
    run_through(calm, cluster, lambda event: None)
    assert len(happened) == 20 and final_hash(run) == final_hash(calm)
    assert [line["step"] for line in read_metrics(run.dir)] == list(range(1, run.resolved.steps + 1))
