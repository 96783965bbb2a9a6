"""The engines on the machines, and the life that some of them lead together."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from massl_ray.config import Config
from massl_ray.on_ray.engine import start_engine
from massl_ray.on_ray.layout import Layout
from massl_ray.on_ray.place import Place, Seat
from massl_ray.on_ray.telemetry import failure_event
from massl_ray.training.loop import Outcome
from massl_ray.training.run import Run

WARM_S, COLD_S = 2.0, 60.0
"""How long a life waits for an engine that has been there before, and for one that has just been started."""
FAIL_S = 1.0  # that the others have to notice that one of them has failed


@dataclass
class Candidate:
    """For a seat in the life to come."""

    seat: Seat
    engine: Any
    reply: Any  # reference to its report
    until: float  # by time.monotonic


@dataclass(frozen=True)
class Ended:
    """A life is over: with this Outcome, or with None where a worker failed."""

    outcome: Outcome | None


class Crew:
    """Lives in the command; nothing here waits.

    Attributes:
        members: seat and engine by rank, of the life under way or of the last one that ended in good order.
        spares: engines that wait, by machine, each with a reference to its first report.
    """

    def __init__(self, run: Run, telemetry: Any, layout: Layout, announce: Callable[[dict[str, Any]], None]):
        self.config, self.run = run.config, ray.put(run)
        self.telemetry, self.layout, self.announce = telemetry, layout, announce
        self.members: list[tuple[Seat, Any]] = []
        self.spares: dict[str, list[tuple[Any, Any]]] = {}
        self.candidates: list[Candidate] = []
        self.calls: dict[Any, int] = {}  # reference to what a member will return: its rank
        self.results: dict[int, Any] = {}  # by rank: the Outcome as a dict, or an exception
        self.fails_at: float | None = None  # by time.monotonic, once a member has failed
        self.failures = 0  # lives before this one that failed in a row
        self.stillborn = 0  # engines that died in a row before any life began

    @property
    def busy(self) -> bool:
        """Whether a life is under way or about to begin."""
        return bool(self.calls or self.candidates)

    @property
    def seats(self) -> list[Seat]:
        return [seat for seat, _ in self.members]

    def keep_spares(self, wanted: Mapping[str, int]) -> None:
        """So many engines wait on each machine; those of machines that are gone are forgotten."""
        self.spares = {node: engines for node, engines in self.spares.items() if node in wanted}
        for node, number in wanted.items():
            while len(self.spares.setdefault(node, [])) < number:
                self.spares[node].append(_start(node))

    def close(self) -> None:
        """End every engine."""
        waiting = [engine for spares in self.spares.values() for engine, _ in spares]
        for engine in [*waiting, *(engine for _, engine in self.members), *(each.engine for each in self.candidates)]:
            ray.kill(engine)

    def is_ready(self, seats: Sequence[Seat]) -> bool:
        """Whether a life on these seats could begin at once."""
        new = Counter(seat.node for seat in (Counter(seats) - Counter(self.seats)).elements())
        return all(sum(map(_is_warm, self.spares.get(node, []))) >= number for node, number in new.items())

    def begin(self, seats: Sequence[Seat]) -> None:
        """Call together an engine a seat: who held it, who waits on that machine, or a new one. Members of the life before come
        first and in their order: any of them has the newest state. Those without a seat are ended, which may cut short a
        checkpoint being written, but nobody else begins to write one before."""
        free, staying = Counter(seats), []
        for seat, engine in self.members:
            if free[seat]:
                free[seat] -= 1
                staying.append((seat, engine))
            else:
                ray.kill(engine)
        self.members = []
        for seat, engine in staying:
            self._call(seat, engine, WARM_S)
        for seat in free.elements():
            waiting = self.spares.get(seat.node)
            spare = waiting.pop(0) if waiting else _start(seat.node)
            self._call(seat, spare[0], WARM_S if _is_warm(spare) else COLD_S)

    def poll(self) -> Ended | None:
        """Look how things go; the end of a life is reported once."""
        if self.candidates:
            return self._gather()
        if not self.calls:
            return None
        done, _ = ray.wait(list(self.calls), num_returns=len(self.calls), timeout=0)
        for call in done:
            rank = self.calls.pop(call)
            try:
                self.results[rank] = ray.get(call)
            except Exception as error:  # of whatever kind: the others cannot go on without it
                self.results[rank] = error
                if self.fails_at is None:
                    self.fails_at = time.monotonic() + FAIL_S
                    self.announce(failure_event(rank, error))
        if self.fails_at is not None:
            return self._fail() if not self.calls or time.monotonic() > self.fails_at else None
        return None if self.calls else Ended(Outcome(**self.results[0]))

    def _call(self, seat: Seat, engine: Any, patience_s: float) -> None:
        self.candidates.append(Candidate(seat, engine, engine.report.remote(), time.monotonic() + patience_s))

    def _gather(self) -> Ended | None:
        """Begin the life once everybody has answered or had time to; who is late may wait for the next one."""
        replies = [candidate.reply for candidate in self.candidates]
        answered, _ = ray.wait(replies, num_returns=len(replies), timeout=0)
        now = time.monotonic()
        if any(candidate.reply not in answered and now < candidate.until for candidate in self.candidates):
            return None
        candidates, self.candidates = self.candidates, []
        ready, error = [], None
        for candidate in candidates:
            if candidate.reply not in answered:
                self.spares.setdefault(candidate.seat.node, []).append((candidate.engine, candidate.reply))
                continue
            try:
                ready.append((candidate, ray.get(candidate.reply)))
            except Exception as died:  # its machine is gone, or it could not even import
                error = died
        if len(ready) >= self.layout.min_workers:
            self._set_out(ready)
        else:
            self.members = [(candidate.seat, candidate.engine) for candidate, _ in ready]
            self.stillborn += error is not None
        if self.stillborn > self.config.elastic.max_failures:
            return Ended(Outcome("failed", 0, f"No worker could be started, {self.stillborn} times in a row: {error}"))
        return None

    def _set_out(self, ready: Sequence[tuple[Candidate, tuple[int, str]]]) -> None:
        self.stillborn, self.results = 0, {}
        life, self.failures = ray.get(self.telemetry.begin.remote())
        (_, (_, meeting)), *_ = ready
        for rank, (candidate, (pid, _)) in enumerate(ready):
            self.announce({"kind": "placed", "rank": rank, "node": candidate.seat.node, "pid": pid})
            place = Place(rank, len(ready), meeting, candidate.seat.gpu)
            call = candidate.engine.live.remote(self.run, self.telemetry, self.layout, life, self.failures, place)
            self.members.append((candidate.seat, candidate.engine))
            self.calls[call] = rank

    def _fail(self) -> Ended:
        """Who noticed the failure and came back keeps its process; others might wait for the lost one until their time is up. The
        models are of no use: some were in the middle of a step."""
        results, self.calls, self.fails_at = self.results, {}, None
        came_back = [rank for rank in results if not isinstance(results[rank], RayActorError)]
        for rank, (_, engine) in enumerate(self.members):
            if rank not in came_back:
                ray.kill(engine)
        self.members = [self.members[rank] for rank in sorted(came_back)]
        short = [rank for rank in sorted(results) if _is_short_of_memory(results[rank])]
        if short and self.failures:  # twice in a row, and would be again
            return Ended(Outcome("out_of_memory", 0, _out_of_memory(short[0], results[short[0]], self.config)))
        return Ended(None)


def _start(node: str) -> tuple[Any, Any]:
    engine = start_engine(node)
    return engine, engine.report.remote()


def _is_short_of_memory(result: Any) -> bool:
    """By the words of CUDA, of torch's allocator on CPUs and of Ray's watch over a machine's memory."""
    said = str(result).lower() if isinstance(result, Exception) else ""
    return any(words in said for words in ("out of memory", "can't allocate memory", "running low on memory"))


def _out_of_memory(rank: int, error: Exception, config: Config) -> str:
    said = failure_event(rank, error)["text"].splitlines()[0].rstrip(".")
    return (
        f"Out of memory, twice in a row. {said}. Choose another --run.dir and a train.micro_batch_size below "
        f"{config.train.micro_batch_size}."
    )


def _is_warm(spare: tuple[Any, Any]) -> bool:
    answered, _ = ray.wait([spare[1]], timeout=0)
    return bool(answered)
