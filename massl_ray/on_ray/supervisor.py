"""Watches the cluster while workers train: asks them to save, to leave and to grow, and writes down what happened."""

import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ray
from ray._private.state import state as cluster_state

from massl_ray.on_ray.engine import start_engine
from massl_ray.on_ray.layout import Layout, fitting
from massl_ray.training.wish import Wish

LOOK_S = 0.5  # between looks at the machines
SETTLE_S = 1.5  # that a larger cluster has stayed the same before the run grows: machines come in bunches
LEAVE_S = 30.0  # before the deadline of a notice, when there are other machines to go to


class Supervisor:
    """Lives in the command that started the run; `look` and `follow` return soon."""

    def __init__(self, layout: Layout, telemetry: Any, announce: Callable[[dict[str, Any]], None]):
        self.layout, self.telemetry, self.announce = layout, telemetry, announce
        self.looked = 0.0
        self.alive: frozenset[str] = frozenset()
        self.changed_at = self.step_at = time.monotonic()
        self.world_size = self.step = self.furthest = 0
        self.life = 0
        self.homes: dict[int, str] = {}  # rank: node
        self.asked: frozenset[str] | None = None  # machines there were when the run was last asked to resize
        self.saved_for: set[str] = set()
        self.spares: Counter[str] = Counter()  # engines that wait, by node
        self.cause: tuple[str, float] | None = ("start", time.monotonic())  # of the transition under way
        self.before = 0  # world size before it

    def follow(self, event: dict[str, Any]) -> None:
        """What the workers say about themselves."""
        if event["kind"] == "placed":
            self.homes[event["rank"]] = event["node"]
            self.spares[event["node"]] -= 1
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
            _tell_coordinator()
        if not self.homes or (not self.cause and self.layout.max_workers > 1):  # a transition needs the CPUs itself
            self._spares({node: resources for node, resources in nodes.items() if node not in leaving})
        if not self.cause:
            self._notices(nodes, leaving, now)
            self._growth(nodes, leaving, now)

    def _spares(self, nodes: dict[str, dict[str, float]]) -> None:
        """As many engines wait on a machine as it may hold workers."""
        for node, resources in nodes.items():
            for _ in range(fitting(self.layout, [resources]) - max(0, self.spares[node])):
                self.telemetry.offer_engine.remote(node, start_engine(node))
                self.spares[node] += 1

    def _notices(self, nodes: dict[str, dict[str, float]], leaving: dict[str, int], now: float) -> None:
        """A machine of ours was given notice: save at once, and leave for the others in time, if they are enough."""
        ours = {node for node in leaving if node in self.homes.values()}
        if not ours:
            return
        if ours - self.saved_for:
            self.saved_for |= ours
            self.telemetry.ask.remote(Wish.SAVE)
        left_s = min(leaving[node] / 1000 - time.time() if leaving[node] else LEAVE_S for node in ours)
        staying = [resources for node, resources in nodes.items() if node not in leaving]
        if left_s <= LEAVE_S and fitting(self.layout, staying) >= self.layout.min_workers:
            self._begin("notice", now)
            self._resize()

    def _growth(self, nodes: dict[str, dict[str, float]], leaving: dict[str, int], now: float) -> None:
        staying = [resources for node, resources in nodes.items() if node not in leaving]
        grown = fitting(self.layout, staying) > self.world_size
        if grown and now - self.changed_at > SETTLE_S and self.asked != self.alive:
            self._begin("added", self.changed_at)
            self._resize()

    def _resize(self) -> None:
        self.asked = self.alive
        _tell_coordinator()
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
