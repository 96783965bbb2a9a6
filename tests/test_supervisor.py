"""What the command does about machines that come and go: on a pretended cluster and a clock that stands until it is set."""

from types import SimpleNamespace

import pytest

from massl_ray.on_ray import supervisor as module
from massl_ray.on_ray.crew import Ended
from massl_ray.on_ray.layout import Layout
from massl_ray.on_ray.place import Seat
from massl_ray.on_ray.supervisor import LEAVE_S, LOOK_S, SETTLE_S, Supervisor
from massl_ray.training.loop import Outcome
from massl_ray.training.wish import Wish


class PretendedCrew:
    """Of engines that do what they are told at once."""

    def __init__(self) -> None:
        self.seats: list[Seat] = []
        self.spares: dict[str, int] = {}
        self.ended: Ended | None = None
        self.busy, self.ready = False, True

    def begin(self, seats):
        self.seats, self.busy = list(seats), True

    def end(self, outcome: Outcome | None) -> None:
        self.ended, self.busy = Ended(outcome), False

    def poll(self) -> Ended | None:
        ended, self.ended = self.ended, None
        return ended

    def is_ready(self, seats) -> bool:
        return self.ready

    def keep_spares(self, wanted) -> None:
        self.spares = dict(wanted)


class World:
    """Machines of one CPU, a run on them, and what its supervisor asks for and announces."""

    def __init__(self, monkeypatch, names: str, min_workers: int = 1, max_workers: int = 8, in_place: bool = False):
        self.now, self.wall = 1000.0, 1.7e9
        self.names, self.draining = names, {}
        self.asked: list[Wish] = []
        self.events: list[dict] = []
        self.told = 0
        self.coordinator: object | None = None
        monkeypatch.setattr(module, "ray", SimpleNamespace(nodes=self.nodes, get_actor=self.get_actor))
        self.free = ""  # machines whose CPU nobody uses
        ray_state = SimpleNamespace(get_draining_nodes=lambda: self.draining, available_resources_per_node=self.available)
        monkeypatch.setattr(module, "cluster_state", ray_state)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.wall))
        self.regroups = 0
        telemetry = SimpleNamespace(
            ask=SimpleNamespace(remote=self.asked.append), ask_regroup=SimpleNamespace(remote=self.count_regroup)
        )
        self.crew = PretendedCrew() if in_place else None
        layout = Layout(min_workers, max_workers, False, {"CPU": 0.75})
        self.supervisor = Supervisor(layout, telemetry, self.crew, self.events.append)  # type: ignore[arg-type]
        self.life = 0

    def count_regroup(self) -> None:
        self.regroups += 1

    def nodes(self) -> list[dict]:
        gone = [{"NodeID": "gone", "Alive": False, "Resources": {}}]
        return gone + [{"NodeID": name, "Alive": True, "Resources": {"CPU": 1.0}} for name in self.names]

    def available(self) -> dict[str, dict[str, float]]:
        return {name: {"CPU": 1.0 if name in self.free else 0.25} for name in self.names}

    def get_actor(self, name: str, namespace: str) -> object:
        assert name == namespace == "AutoscalingCoordinator"
        if not self.coordinator:
            raise ValueError("no such actor")
        return self.coordinator

    def run_on(self, names: str, step: int = 0) -> None:
        """Workers are placed on these machines, in no order, go on from `step`, and do one."""
        self.life += 1
        for rank in reversed(range(len(names))):
            self.supervisor.follow({"kind": "placed", "rank": rank, "node": names[rank], "pid": 1})
        self.supervisor.follow({"kind": "started", "world_size": len(names), "step": step})
        self.step(step + 1)

    def step(self, step: int) -> None:
        self.supervisor.progress(self.life, step)

    def look(self, after_s: float = LOOK_S) -> list[Wish]:
        """Look after so many seconds; returns what is asked for."""
        self.now += after_s
        self.wall += after_s
        before = len(self.asked)
        self.supervisor.look()
        return self.asked[before:]

    def notice(self, name: str, seconds: float) -> None:
        self.draining[name] = int((self.wall + seconds) * 1000)

    @property
    def causes(self) -> list[str]:
        return [event["cause"] for event in self.events]


@pytest.fixture
def world(monkeypatch):
    """Of so many machines, whose names are letters, with a run on the first of them."""

    def world(names: str, on: str, **limits) -> World:
        made = World(monkeypatch, names, **limits)
        made.look()
        made.run_on(on)
        return made

    return world


# ---- growth ----------------------------------------------------------------------------------------------------------


def test_nothing_happens_nothing_is_asked_for(world):
    ab = world("ab", "ab")
    assert [ab.look(10) for _ in range(5)] == [[]] * 5 and ab.causes == ["start"]


def test_growth_is_asked_for_once_the_machines_have_settled(world):
    ab = world("ab", "ab")
    ab.look(60)
    ab.names = "abc"
    assert ab.look() == []
    ab.names = "abcd"
    assert ab.look(SETTLE_S) == []  # another one: wait again
    assert ab.look(SETTLE_S) == []
    assert ab.look(0.6) == [Wish.RESIZE]


def test_growth_is_asked_for_once_for_each_set_of_machines(world):
    ab = world("ab", "ab")
    ab.names = "abc"
    ab.look()
    assert ab.look(2) == [Wish.RESIZE]
    assert ab.look(2) == []  # under way
    ab.run_on("ab", step=5)  # the new one could not be used
    assert [ab.look(5), ab.look(50)] == [[], []]
    ab.names = "abd"
    ab.look()
    assert ab.look(2) == [Wish.RESIZE]
    ab.run_on("abd", step=9)
    assert ab.look(50) == [] and ab.causes == ["start", "added", "added"]


def test_no_growth_beyond_what_is_wanted(world):
    ab = world("ab", "ab", max_workers=2)
    ab.names = "abcd"
    assert [ab.look(), ab.look(2), ab.look(50)] == [[], [], []]


def test_no_growth_onto_machines_that_leave(world):
    ab = world("ab", "ab")
    ab.names = "abc"
    ab.notice("c", 60)
    assert [ab.look(), ab.look(2)] == [[], []]


def test_no_growth_before_the_first_step(monkeypatch):
    """Workers that start have their hands full; they take what there is."""
    made = World(monkeypatch, "a")
    made.look()
    made.names = "ab"
    assert [made.look(), made.look(10)] == [[], []]
    made.run_on("a")
    assert made.look() == [Wish.RESIZE]


def test_looks_keep_their_distance(world):
    ab = world("ab", "ab")
    ab.look(60)
    ab.names = "abc"
    for _ in range(5):
        ab.look(LOOK_S / 6)
    assert len(ab.supervisor.alive) == 2
    ab.look(LOOK_S / 3)
    assert len(ab.supervisor.alive) == 3


# ---- notices ---------------------------------------------------------------------------------------------------------


def test_a_notice_is_answered_by_a_copy_at_once_and_by_leaving_in_time(world):
    abc = world("abc", "abc")
    abc.notice("b", 120)
    assert abc.look() == [Wish.SAVE]
    assert abc.look(10) == []  # once
    assert abc.look(120 - LEAVE_S - 10 - LOOK_S - 1) == []
    assert abc.look(1) == [Wish.RESIZE]
    assert abc.look(1) == []
    abc.run_on("ac", step=30)
    assert abc.look(1) == []
    assert abc.events[-1] | {"at": "", "pause_s": 0} == {
        "kind": "transition", "at": "", "from": 3, "to": 2, "cause": "notice",
        "seconds": 1.0, "pause_s": 0, "steps_repeated": 0, "step": 30,
    }  # fmt: skip
    abc.names, abc.draining = "ac", {}
    assert abc.look(5) == [] and abc.look(5) == []  # nobody lived there any more
    assert abc.causes == ["start", "notice"]


def test_a_short_notice_is_answered_by_both(world):
    abc = world("abc", "abc")
    abc.notice("b", 20)
    assert abc.look() == [Wish.SAVE, Wish.RESIZE]


def test_a_notice_without_a_deadline_is_a_short_one(world):
    abc = world("abc", "abc")
    abc.draining["b"] = 0
    assert abc.look() == [Wish.SAVE, Wish.RESIZE]


def test_of_two_notices_the_earlier_deadline_counts_and_each_gets_its_copy(world):
    abc = world("abc", "abc")
    abc.notice("b", 300)
    assert abc.look() == [Wish.SAVE]
    abc.notice("c", 60)
    assert abc.look() == [Wish.SAVE]
    assert abc.look(28) == [] and abc.look(2) == [Wish.RESIZE]


def test_nobody_leaves_where_the_others_are_not_enough(world):
    """Training on the machine until it goes is better than waiting for another."""
    abc = world("abc", "abc", min_workers=3)
    abc.notice("b", 20)
    assert abc.look() == [Wish.SAVE] and abc.look(5) == []
    abc.names = "abcd"
    assert abc.look() == [Wish.RESIZE]


def test_a_notice_to_a_machine_without_workers_is_none_of_ours(world):
    abc = world("abc", "ab", max_workers=2)
    abc.notice("c", 20)
    assert abc.look() == []


def test_machines_of_an_earlier_life_are_not_ours(world):
    abc = world("abc", "abc", max_workers=3)
    abc.run_on("ab", step=5)
    abc.notice("c", 20)
    assert abc.look() == []


# ---- transitions -----------------------------------------------------------------------------------------------------


def test_the_start_is_a_transition(monkeypatch):
    made = World(monkeypatch, "ab")
    made.now += 7.25
    made.run_on("ab", step=40)
    (event,) = made.events
    at = event.pop("at")
    assert event == {
        "kind": "transition", "from": 0, "to": 2, "cause": "start",
        "seconds": 7.25, "pause_s": 7.25, "steps_repeated": 0, "step": 40,
    }  # fmt: skip
    assert len(at) == len("2026-01-02T03:04:05.678+00:00") and at.endswith("+00:00")


def test_a_machine_that_vanishes(world):
    """From when it is noticed to the first new step; the steps since the copy are repeated."""
    abc = world("abc", "abc")
    for step in range(2, 20):
        abc.step(step)
    abc.names = "ab"
    assert abc.look() == []
    abc.now += 6.5
    abc.run_on("ab", step=16)
    assert abc.events[-1] | {"at": ""} == {
        "kind": "transition", "at": "", "from": 3, "to": 2, "cause": "lost",
        "seconds": 6.5, "pause_s": 7.0, "steps_repeated": 3, "step": 16,
    }  # fmt: skip
    abc.names = "abd"
    abc.look()
    assert abc.look(2) == [Wish.RESIZE]
    abc.now += 1
    abc.run_on("abd", step=17)
    assert abc.events[-1]["from"] == 2 and abc.events[-1]["steps_repeated"] == 2  # still fewer than were once done
    assert abc.events[-1]["cause"] == "added" and abc.events[-1]["seconds"] == 3.0  # since it came


def test_a_machine_without_workers_that_vanishes_is_no_transition(world):
    abc = world("abc", "ab", max_workers=2)
    abc.names = "ab"
    abc.look()
    assert abc.supervisor.cause is None and abc.look(10) == []


def test_a_worker_that_says_it_failed(world):
    ab = world("ab", "ab")
    ab.step(2)
    ab.now += 1
    ab.supervisor.follow({"kind": "failure", "text": "Worker 1 failed"})
    ab.now += 3
    ab.supervisor.follow({"kind": "failure", "text": "Worker 0 failed, too"})
    ab.run_on("ab", step=2)
    assert (ab.events[-1]["cause"], ab.events[-1]["seconds"], ab.events[-1]["steps_repeated"]) == ("failure", 3.0, 0)


def test_a_worker_that_says_nothing_failed_since_its_last_step(world):
    ab = world("ab", "ab")
    ab.step(2)
    ab.now += 9
    ab.run_on("ab", step=1)
    assert (ab.events[-1]["cause"], ab.events[-1]["seconds"], ab.events[-1]["steps_repeated"]) == ("failure", 9.0, 1)


def test_a_machine_that_is_gone_explains_the_failure_of_the_others(world):
    """They notice it first."""
    abc = world("abc", "abc")
    abc.supervisor.follow({"kind": "failure", "text": "Worker 0 failed: connection closed by peer"})
    abc.names = "ab"
    abc.look(2)
    abc.now += 4
    abc.run_on("ab", step=1)
    assert (abc.events[-1]["cause"], abc.events[-1]["seconds"]) == ("lost", 6.0)


def test_the_first_cause_names_a_transition(world):
    abc = world("abc", "abc")
    abc.notice("b", 20)
    assert abc.look() == [Wish.SAVE, Wish.RESIZE]
    abc.supervisor.follow({"kind": "failure", "text": "in the middle of it"})
    abc.names, abc.draining = "ac", {}
    abc.look()
    abc.run_on("ac", step=1)
    assert abc.causes == ["start", "notice"]


def test_a_transition_ends_with_a_new_step_not_before(world):
    ab = world("ab", "ab")
    ab.step(10)
    ab.names = "a"
    ab.look()
    ab.supervisor.progress(1, 10)  # old news
    ab.supervisor.progress(2, 0)  # a life without a step
    ab.supervisor.follow({"kind": "started", "world_size": 1, "step": 8})
    ab.supervisor.progress(2, 0)
    ab.supervisor.progress(2, 8)
    assert ab.causes == ["start"]
    ab.supervisor.progress(2, 9)
    assert ab.causes == ["start", "lost"] and ab.events[-1]["steps_repeated"] == 2


def test_the_coordinator_hears_of_new_machines_and_of_a_resize(world):
    ab = world("ab", "ab")
    told = []
    remote = SimpleNamespace(remote=lambda name, recompute: told.append((name, recompute)))
    ab.coordinator = SimpleNamespace(get_reserved_resources=remote)
    ab.look()
    assert told == []
    ab.names = "abc"
    ab.look()
    assert told == [("nobody", True)]
    assert ab.look(2) == [Wish.RESIZE] and len(told) == 2


# ---- in place --------------------------------------------------------------------------------------------------------


def seats(names: str) -> tuple[Seat, ...]:
    return tuple(Seat(name, None) for name in names)


@pytest.fixture
def in_place(monkeypatch):
    """Machines with a crew that trains on the first of them, Ray Train's seats being there."""

    def in_place(names: str, on: str, **limits) -> World:
        made = World(monkeypatch, names, in_place=True, **limits)
        made.look()
        made.supervisor.lead(seats(on))
        made.run_on(on)
        return made

    return in_place


def test_a_life_begins_on_the_seats_as_soon_as_there_are_enough(monkeypatch):
    made = World(monkeypatch, "abc", min_workers=2, in_place=True)
    made.look()
    assert made.supervisor.lead(None) is None and not made.crew.busy
    made.supervisor.lead(seats("a"))
    assert not made.crew.busy
    made.supervisor.lead(seats("abc"))
    assert made.crew.busy and made.crew.seats == list(seats("abc"))


def test_a_free_machine_is_used_before_ray_train_has_found_it(in_place):
    ab = in_place("ab", "ab")
    ab.names, ab.free = "abc", "c"
    ab.crew.ready = False
    ab.look()
    assert ab.look(2) == [] and ab.regroups == 0
    ab.supervisor.lead(seats("ab"))
    assert ab.asked == []
    ab.crew.ready = True
    ab.supervisor.lead(seats("ab"))
    assert ab.asked == [Wish.RESIZE]
    ab.crew.end(Outcome("resize", 9))
    ab.supervisor.lead(seats("ab"))
    assert ab.crew.seats == list(seats("abc"))
    assert ab.look() == [] and ab.regroups == 0  # not before it trains there
    ab.run_on("abc", step=9)
    assert ab.look() == [] and ab.regroups == 1
    ab.supervisor.lead(None)
    ab.supervisor.lead(seats("cab"))
    assert ab.look(5) == [] and ab.regroups == 1 and ab.asked == [Wish.RESIZE]
    assert ab.causes == ["start", "added"]


def test_a_free_machine_that_somebody_else_takes_meanwhile_is_left_again(in_place):
    a = in_place("a", "a")
    a.names, a.free = "ab", "b"
    a.look(), a.look(2)
    a.supervisor.lead(seats("a"))
    a.crew.end(Outcome("resize", 9))
    a.supervisor.lead(seats("a"))
    a.run_on("ab", step=9)
    a.look()
    assert a.regroups == 1
    a.supervisor.lead(None)
    a.supervisor.lead(seats("a"))  # Ray Train got no more
    assert a.asked == [Wish.RESIZE, Wish.RESIZE]
    a.crew.end(Outcome("resize", 12))
    a.supervisor.lead(seats("a"))
    assert a.crew.seats == list(seats("a"))
    a.run_on("a", step=12)
    assert a.look(50) == [] and a.regroups == 1


def test_a_free_machine_that_vanishes_before_it_was_used_holds_up_nobody(in_place):
    a = in_place("a", "a")
    a.crew.ready = False
    a.names, a.free = "ab", "b"
    a.look(), a.look(2)
    a.names, a.free = "a", ""
    a.look(), a.look(2)
    a.names, a.free = "ac", "c"
    a.look(), a.look(2)
    a.crew.ready = True
    a.supervisor.lead(seats("a"))
    assert a.asked == [Wish.RESIZE]
    a.crew.end(Outcome("resize", 9))
    a.supervisor.lead(seats("a"))
    assert a.crew.seats == list(seats("ac"))


def test_growth_leaves_training_alone_until_there_are_seats_and_engines(in_place):
    ab = in_place("ab", "ab")
    ab.names = "abc"
    ab.look()
    assert ab.look(2) == [] and ab.regroups == 1  # Ray Train is to find seats; nobody is asked to leave
    assert ab.look(5) == [] and ab.regroups == 1
    ab.supervisor.lead(None)  # its workers start anew
    ab.crew.ready = False
    ab.supervisor.lead(seats("abc"))
    assert ab.asked == []
    ab.crew.ready = True
    ab.supervisor.lead(seats("abc"))
    ab.supervisor.lead(seats("abc"))
    assert ab.asked == [Wish.RESIZE]
    ab.crew.end(Outcome("resize", 9))
    ab.supervisor.lead(seats("abc"))
    assert ab.crew.seats == list(seats("abc")) and ab.crew.busy
    ab.run_on("abc", step=9)
    assert ab.causes == ["start", "added"] and ab.events[-1]["seconds"] == 7.0  # since the machine came
    assert ab.events[-1]["steps_repeated"] == 0


def test_seats_that_stay_the_same_change_nothing(in_place):
    """Ray Train starts its workers anew after a loss; the crew has long gone on."""
    ab = in_place("ab", "ab")
    ab.supervisor.lead(None)
    ab.supervisor.lead(seats("ba"))
    assert ab.asked == []


def test_a_resize_that_could_not_be_done_is_not_asked_for_again(in_place):
    ab = in_place("abc", "ab")
    ab.supervisor.lead(seats("abc"))
    ab.run_on("ab", step=5)  # the third engine did not come
    ab.supervisor.lead(seats("abc"))
    assert ab.asked == [Wish.RESIZE]


def test_a_lost_machine_in_place(in_place):
    """The others go on at once: Ray Train's seats on them are still those of before."""
    abc = in_place("abc", "abc")
    abc.crew.end(None)
    abc.supervisor.lead(None)
    assert abc.crew.seats == list(seats("abc"))  # nobody knows yet that it was the machine; its engine will not answer
    abc.names = "ab"
    abc.look()
    abc.crew.end(None)
    abc.supervisor.lead(None)
    assert abc.crew.seats == list(seats("ab")) and abc.crew.busy
    abc.run_on("ab", step=1)
    assert abc.causes == ["start", "lost"]


def test_a_notice_in_place_needs_no_new_seats(in_place):
    abc = in_place("abc", "abc")
    abc.notice("b", 20)
    assert abc.look() == [Wish.SAVE, Wish.RESIZE]
    abc.crew.end(Outcome("resize", 9))
    abc.supervisor.lead(seats("abc"))
    assert abc.crew.seats == list(seats("ac"))
    abc.run_on("ac", step=9)
    abc.supervisor.lead(seats("abc"))
    assert abc.look() == [] and abc.causes == ["start", "notice"]


def test_the_outcome_is_told_once(in_place):
    a = in_place("a", "a")
    a.crew.end(Outcome("finished", 40))
    assert a.supervisor.lead(seats("a")) == Outcome("finished", 40)
    assert a.supervisor.lead(seats("a")) is None and not a.crew.busy


def test_spares_wait_where_workers_may_come(monkeypatch, in_place):
    """Before the start only if all will be used; later on every machine that stays, unless there is only ever one worker."""
    assert in_place("abc", "ab", max_workers=2).crew.spares == {}
    made = World(monkeypatch, "ab", max_workers=2, in_place=True)
    made.look()
    assert made.crew.spares == {"a": 1, "b": 1}
    abc = in_place("abc", "ab", max_workers=2)
    abc.notice("c", 600)
    abc.look()
    assert abc.crew.spares == {"a": 1, "b": 1}
    alone = in_place("ab", "a", max_workers=1)
    alone.look()
    assert alone.crew.spares == {}


def test_a_start_that_waits_for_machines_says_so_once(monkeypatch):
    made = World(monkeypatch, "", min_workers=2)
    assert [made.look(), made.look(9)] == [[], []] and not made.events
    made.names = "a"
    made.look(1)
    made.look(60)
    (note,) = made.events
    assert note["text"] == "Waiting for machines: there is room for 1 of at least 2 workers; each needs 0.75 CPU."


def test_a_start_that_has_its_machines_says_nothing(monkeypatch):
    made = World(monkeypatch, "ab", min_workers=2)
    made.look()
    made.look(60)
    assert not made.events
