"""Engines called together, led through lives and let go: real actors that only pretend to train."""

import os
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import ray
import torch

from massl_ray.config import Config
from massl_ray.on_ray import crew as module
from massl_ray.on_ray.crew import Crew, Ended
from massl_ray.on_ray.layout import Layout
from massl_ray.on_ray.place import Seat
from massl_ray.on_ray.telemetry import start_telemetry
from massl_ray.training.loop import Outcome

pytestmark = pytest.mark.ray

A, B, C = Seat("a", None), Seat("b", None), Seat("c", "0")
DONE = Outcome("finished", 7)


class Pretender:
    """Does in a life what `run.acts` says for its rank."""

    def report(self):
        return os.getpid(), f"host:{os.getpid()}"

    def live(self, run, telemetry, layout, life, failures, place):
        act = run.acts[place.rank]
        if act == "die":
            os._exit(1)
        if act == "hang":
            time.sleep(600)
        if act == "raise":
            raise RuntimeError("connection closed by peer")
        if act == "full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return asdict(Outcome(act, 7, f"{life} {failures} {place.rank}/{place.world_size} {place.meeting} {place.gpu}"))


class Stillborn(Pretender):
    def __init__(self):
        raise ImportError("no such library")


@pytest.fixture
def crew(ray_cluster, monkeypatch):
    """A crew whose members act as told, and `crew.events`."""
    made = []

    def crew(*acts: str, engine: type = Pretender, min_workers: int = 1) -> Crew:
        monkeypatch.setattr(module, "start_engine", lambda node: ray.remote(num_cpus=0)(engine).remote())
        run = SimpleNamespace(config=Config(), acts=list(acts))
        events: list[dict] = []
        made.append(Crew(run, start_telemetry(), Layout(min_workers, 8, False, {"CPU": 1.0}), events.append))  # type: ignore[arg-type]
        made[-1].events = events
        return made[-1]

    yield crew
    for each in made:
        each.close()


def until_ended(crew: Crew, deadline_s: float = 60.0) -> Ended:
    end = time.monotonic() + deadline_s
    while (ended := crew.poll()) is None:
        assert time.monotonic() < end, "the life did not end"
        time.sleep(0.02)
    return ended


def pids(crew: Crew) -> list[int]:
    return [ray.get(engine.report.remote())[0] for _, engine in crew.members]


def is_gone(pid: int, deadline_s: float = 20.0) -> bool:
    end = time.monotonic() + deadline_s
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        time.sleep(0.05)
    return not os.path.exists(f"/proc/{pid}")


def test_a_life_from_call_to_outcome(crew):
    """The first one's outcome counts; everybody knows its rank, the meeting place and its GPU."""
    made = crew("resize", "resize", "resize")
    assert not made.busy
    made.begin([A, B, C])
    assert made.busy
    ended = until_ended(made)
    assert not made.busy and made.seats == [A, B, C]
    first = pids(made)[0]
    assert ended.outcome == Outcome("resize", 7, f"1 0 0/3 host:{first} None")
    assert [(event["kind"], event["rank"], event["node"]) for event in made.events] == [("placed", n, "abc"[n]) for n in range(3)]
    assert [event["pid"] for event in made.events] == pids(made)


def test_those_who_stay_keep_their_process_and_come_first(crew):
    made = crew("resize", "resize", "resize")
    made.begin([A, B])
    until_ended(made)
    a, b = pids(made)
    made.begin([C, B])
    until_ended(made)
    assert made.seats == [B, C] and pids(made)[0] == b
    assert is_gone(a)


def test_two_seats_on_one_machine(crew):
    made = crew("resize", "resize")
    made.begin([A, A])
    until_ended(made)
    assert made.seats == [A, A] and len(set(pids(made))) == 2
    stayed = pids(made)
    made.begin([A, A])
    until_ended(made)
    assert pids(made) == stayed


def test_a_failure_ends_the_life_of_all_and_only_who_came_back_stays(crew):
    """One dies, one notices, one would hang for ever."""
    made = crew("raise", "die", "hang")
    made.begin([A, B, C])
    deadline = time.monotonic() + 60
    while len(made.calls) < 3 and time.monotonic() < deadline:
        made.poll()
    hanging = [event["pid"] for event in made.events if event["kind"] == "placed"][2]
    assert until_ended(made) == Ended(None)
    assert made.seats == [A] and not made.busy
    assert is_gone(hanging)
    assert [event["kind"] for event in made.events].count("failure") == 1


def test_the_next_life_after_a_failure_counts_it(crew):
    made = crew("raise")
    made.begin([A])
    assert until_ended(made) == Ended(None)
    assert "Worker 0: RuntimeError: connection closed by peer" in made.events[-1]["text"]
    ray.get(made.telemetry.begin.remote())  # the second life
    assert ray.get(made.telemetry.begin.remote()) == (3, 2)


def test_who_is_late_waits_for_the_next_life(crew, monkeypatch):
    monkeypatch.setattr(module, "COLD_S", 0.0)
    made = crew("finished", min_workers=1)
    made.begin([A])
    assert made.poll() is None and made.members == [] and not made.busy
    assert len(made.spares["a"]) == 1
    monkeypatch.setattr(module, "COLD_S", 60.0)
    waiting = ray.get(made.spares["a"][0][0].report.remote())[0]
    made.begin([A])
    assert until_ended(made).outcome.status == "finished" and pids(made) == [waiting]


def test_engines_that_cannot_start_end_the_run(crew):
    made = crew("finished", engine=Stillborn)
    ended = None
    for _ in range(Config().elastic.max_failures + 1):
        made.begin([A])
        while made.busy and ended is None:
            ended = made.poll()
            time.sleep(0.01)
    assert ended and ended.outcome and ended.outcome.status == "failed"
    assert "No worker could be started" in ended.outcome.message and "no such library" in ended.outcome.message


def test_spares(crew):
    made = crew("finished")
    made.keep_spares({"a": 1, "b": 2})
    assert {node: len(engines) for node, engines in made.spares.items()} == {"a": 1, "b": 2}
    assert not made.is_ready([A, A])
    ray.get([started for engines in made.spares.values() for _, started in engines])
    assert made.is_ready([A, B]) and not made.is_ready([A, A]) and not made.is_ready([C])
    spare = ray.get(made.spares["a"][0][0].report.remote())[0]
    made.keep_spares({"a": 1})
    assert list(made.spares) == ["a"]
    made.begin([A])
    until_ended(made)
    assert pids(made) == [spare] and made.spares["a"] == []


def test_out_of_memory_twice_in_a_row_is_the_end(crew):
    """The first time may be another process's doing. Other failures do not end a run so soon."""
    made = crew("raise", "full")
    made.begin([A, B])
    assert until_ended(made) == Ended(None)
    made.begin([A, B])
    ended = until_ended(made)
    assert ended.outcome and ended.outcome.status == "out_of_memory"
    assert ended.outcome.message == (
        "Out of memory, twice in a row. Worker 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. "
        "Choose another --run.dir and a train.micro_batch_size below auto."
    )
    other = crew("raise")
    for _ in range(3):
        other.begin([A])
        assert until_ended(other) == Ended(None)
