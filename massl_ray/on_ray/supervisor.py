"""Watches the cluster while workers train: asks them to save, to leave and to grow, and writes down what happened."""

import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ray
from ray._private.state import state as cluster_state

from massl_ray.on_ray.crew import Crew
from massl_ray.on_ray.layout import Layout, fitting, free_seats
from massl_ray.on_ray.place import Seat
from massl_ray.training.loop import Outcome
from massl_ray.training.wish import Wish

LOOK_S = 0.5  # between looks at the machines
SETTLE_S = 1.5  # that a larger cluster has stayed the same before the run grows: machines come in bunches
PATIENT_S = 10.0  # that the start waits for machines before it says so
LEAVE_S = 30.0  # before the deadline of a notice, when there are other machines to go to


class Supervisor:
    """Lives in the command that started the run; `look`, `lead` and `follow` return soon.

    Without a crew (elastic.in_place false) Ray Train itself starts workers anew when they leave or fail.
    """

    def __init__(self, layout: Layout, telemetry: Any, crew: Crew | None, announce: Callable[[dict[str, Any]], None]):
        self.layout, self.telemetry, self.crew, self.announce = layout, telemetry, crew, announce
        self.looked = 0.0
        self.alive: frozenset[str] = frozenset()
        self.changed_at = self.step_at = time.monotonic()
        self.world_size = self.step = self.furthest = 0
        self.life = 0
        self.homes: dict[int, str] = {}  # rank: node
        self.seats: tuple[Seat, ...] = ()  # that Ray Train holds for us, or held before its workers were started anew
        self.found = False  # whether it holds them
        self.promised: tuple[Seat, ...] = ()  # that Ray Train has not found yet, on machines that came since
        self.asked: frozenset[str] | None = None  # machines there were when the run, or Ray Train, was last asked to grow
        self.tried: object = None  # seats that the run last resized to, and the machines there were
        self.saved_for: set[str] = set()
        self.left: set[str] = set()  # machines with a notice that we no longer use
        self.cause: tuple[str, float] | None = ("start", time.monotonic())  # of the transition under way
        self.before = 0  # world size before it
        self.over = self.said_waiting = False
        self.began = time.monotonic()

    def follow(self, event: dict[str, Any]) -> None:
        """What the workers say about themselves."""
        if event["kind"] == "placed":
            self.homes[event["rank"]] = event["node"]
        elif event["kind"] == "failure":
            self._begin("failure", time.monotonic())
        elif event["kind"] == "started":
            self._begin("failure", self.step_at)  # unless something better is known
            self.world_size, self.step = event["world_size"], event["step"]
            self.homes = {rank: node for rank, node in self.homes.items() if rank < self.world_size}

    def progress(self, life: int, step: int) -> None:
        """The workers' last step. The first one of a life ends a transition."""
        if life != self.life and step > self.step and self.cause and self.world_size:
            self.life = life
            (cause, since), self.cause = self.cause, None
            self.announce(
                {
                    "kind": "transition",
                    "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "from": self.before,
                    "to": self.world_size,
                    "cause": cause,
                    "seconds": round(time.monotonic() - since, 2),
                    "pause_s": round(time.monotonic() - self.step_at, 2),
                    "steps_repeated": max(0, self.furthest - self.step),
                    "step": self.step,
                }
            )
            self.before = self.world_size
        if life == self.life and step > self.step:
            self.step, self.step_at = step, time.monotonic()
            self.furthest = max(self.furthest, step)

    def look(self) -> None:
        """At the machines."""
        now = time.monotonic()
        if now - self.looked < LOOK_S:
            return
        self.looked = now
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        leaving = cluster_state.get_draining_nodes()
        if nodes.keys() != self.alive:
            if set(self.homes.values()) & (self.alive - nodes.keys()):
                self._begin("lost", now)
            self.alive, self.changed_at = frozenset(nodes), now
            self.promised = tuple(seat for seat in self.promised if seat.node in nodes)
            _tell_coordinator()
        staying = {node: resources for node, resources in nodes.items() if node not in leaving}
        self._spares(staying)
        if not self.world_size and now - self.began > PATIENT_S:
            self._say_waiting(staying)
        if not self.cause:
            self._notices(staying, leaving, now)
            self._growth(staying, now)

    def _say_waiting(self, nodes: dict[str, dict[str, float]]) -> None:
        """Once: a cluster that begins with no machines looks like one that hangs."""
        room = fitting(self.layout, nodes.values())
        if room < self.layout.min_workers and not self.said_waiting:
            self.said_waiting = True
            needs = " and ".join(f"{amount:g} {name}" for name, amount in self.layout.per_worker.items())
            text = (
                f"Waiting for machines: there is room for {room} of at least {self.layout.min_workers} workers; each needs {needs}."
            )
            self.announce({"kind": "note", "text": text})

    def _spares(self, nodes: dict[str, dict[str, float]]) -> None:
        """An engine for every worker that a machine may hold: at the start, if it is certain that all will be used; later beside
        those that train, except during a transition, which needs the CPUs itself."""
        if self.crew is None:
            return
        room = {node: fitting(self.layout, [resources]) for node, resources in nodes.items()}
        starting = self.world_size == 0 and not self.crew.busy and sum(room.values()) <= self.layout.max_workers
        if starting or (not self.cause and self.layout.max_workers > 1):
            self.crew.keep_spares(room)

    def lead(self, seats: tuple[Seat, ...] | None) -> Outcome | None:
        """Begin a life on the seats there are, and the next one when it ends; returns the Outcome of the run once there is one.

        Args:
            seats: that Ray Train holds now; None while it starts its workers anew, which the life under way does not wait for.
        """
        if seats and (seats != self.seats or not self.found):
            self.seats, self.promised = seats, ()
        self.found = bool(seats)
        if self.crew is None or self.over:
            return None
        ended = self.crew.poll()
        if ended and ended.outcome is None:
            self._begin("failure", time.monotonic())
        elif ended and ended.outcome and ended.outcome.status != "resize":
            self.over = True
            return ended.outcome
        usable = [seat for seat in self.seats + self.promised if seat.node in self.alive and seat.node not in self.left]
        if not self.crew.busy:
            if len(usable) >= self.layout.min_workers:
                self.crew.begin(usable)
        elif (
            not self.cause
            and usable
            and Counter(usable) != Counter(self.crew.seats)
            and self.tried != (self.alive, usable)
            and self.crew.is_ready(usable)
        ):
            self.tried = self.alive, usable
            self._begin("added", self.changed_at)
            self.telemetry.ask.remote(Wish.RESIZE)
        return None

    def _notices(self, staying: dict[str, dict[str, float]], leaving: dict[str, int], now: float) -> None:
        """A machine of ours was given notice: save at once, and leave for the others in time, if they are enough."""
        ours = {node for node in leaving if node in self.homes.values()} - self.left
        if not ours:
            return
        if ours - self.saved_for:
            self.saved_for |= ours
            self.telemetry.ask.remote(Wish.SAVE)
        left_s = min(leaving[node] / 1000 - time.time() if leaving[node] else LEAVE_S for node in ours)
        if left_s <= LEAVE_S and fitting(self.layout, staying.values()) >= self.layout.min_workers:
            self.left |= ours
            self._begin("notice", now)
            self.telemetry.ask.remote(Wish.RESIZE)
            _tell_coordinator()

    def _growth(self, staying: dict[str, dict[str, float]], now: float) -> None:
        """With a crew the run takes free machines at once, and Ray Train is asked to hold them afterwards, since its new start
        takes seconds. Without, or where it is not certain what is free, Ray Train looks first."""
        if now - self.changed_at <= SETTLE_S or self.asked == self.alive:
            return
        if not self.promised and fitting(self.layout, staying.values()) > self.world_size:
            if self.crew:
                taken = [seat for seat in self.seats if seat.node in staying]
                self.promised = free_seats(self.layout, staying, cluster_state.available_resources_per_node(), taken)
            if not self.promised:
                self._ask_for_seats()
        elif self.promised and {seat.node for seat in self.promised} <= set(self.homes.values()):
            self._ask_for_seats()

    def _ask_for_seats(self) -> None:
        self.asked = self.alive
        _tell_coordinator()
        if self.crew:
            self.telemetry.ask_regroup.remote()
        else:
            self._begin("added", self.changed_at)
            self.telemetry.ask.remote(Wish.RESIZE)

    def _begin(self, cause: str, since: float) -> None:
        """The first cause names a transition; but a machine that is gone explains workers that failed a moment earlier."""
        if self.cause is None:
            self.cause = cause, since
        elif self.cause[0] == "failure" and cause == "lost":
            self.cause = cause, self.cause[1]


def _tell_coordinator() -> None:
    """Ray's coordinator of reservations looks at the machines every 20 s; until then it would place workers on dead ones."""
    try:
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    except ValueError:  # nothing asked for a reservation yet
        return
    coordinator.get_reserved_resources.remote("nobody", recompute=True)
