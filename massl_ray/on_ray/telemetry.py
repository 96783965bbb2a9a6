"""News between the workers and the command that started them, and the copy of the state that outlives a worker's machine.

The actor runs on the command's own machine: where that goes, the whole cluster goes.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from massl_ray.training.wish import Wish

if TYPE_CHECKING:  # torch is imported where tensors come or go: the actor itself starts without
    from torch import Tensor

CONFIRM_S = 60.0  # that a checkpoint waits for the metrics of its steps to be on disk


class News(NamedTuple):
    """What the command has not heard yet."""

    events: list[dict[str, Any]]
    announced: int  # events that there ever were
    life: int
    step: int  # the last one of this life
    seats: tuple[Any, ...] | None  # that Ray Train holds now; None while its workers start


class Telemetry:
    """Holds what workers announced until the command takes it, its wish until a worker hears of it, and the newest state.

    Every start of the workers is a life; what reaches the actor from an earlier life than the current one no longer counts.
    """

    def __init__(self) -> None:
        self.life = 0
        self.events: list[dict[str, Any]] = []
        self.announced = self.confirmed = 0
        self.wish = Wish.NONE
        self.step = self.furthest = 0
        self.failures = 0
        self.planned = True  # the next life begins because somebody wished it
        self.kept: tuple[int, Any, dict[str, Any]] | None = None
        self.group, self.room, self.seats = 0, 0, []  # the present start of Ray Train's workers, how many there are, who came
        self.regroup = False
        self.outcome: dict[str, Any] | None = None

    def begin(self) -> tuple[int, int]:
        """A new life: returns its number, and how many lives ended in failure since a step was reached for the first time."""
        self.life += 1
        self.failures += not self.planned
        self.planned = False
        self.step = 0
        self.wish = Wish.STOP if self.wish == Wish.STOP else Wish.NONE
        return self.life, self.failures

    def begin_group(self, world_size: int) -> int:
        """Ray Train has started its workers; returns the number of this start."""
        self.group, self.room, self.seats, self.regroup = self.group + 1, world_size, [], False
        return self.group

    def sit(self, group: int, seat: Any) -> None:
        if group == self.group:
            self.seats.append(seat)

    def order(self, group: int) -> Any:
        """What a seat of Ray Train's should do: "hold", "leave", or return the Outcome."""
        return self.outcome or ("leave" if self.regroup or group != self.group else "hold")

    def ask_regroup(self) -> None:
        self.regroup, self.seats = True, []

    def finish(self, outcome: dict[str, Any]) -> None:
        self.outcome = outcome

    def announce(self, life: int, event: dict[str, Any]) -> None:
        if life == self.life:
            self.events.append(event)
            self.announced += 1

    def progress(self, life: int, step: int) -> Wish:
        """A step is done; returns the wish. One to save is fulfilled once it was heard; the others stay until they are."""
        wish = self.wish
        if life == self.life:
            self.step = step
            if step > self.furthest:
                self.furthest, self.failures = step, 0
            if wish == Wish.SAVE:
                self.wish = Wish.NONE
        return wish

    def ask(self, wish: Wish) -> None:
        """From the command to the workers. What was asked for as a resize is no failure when it comes."""
        self.wish = max(self.wish, wish) if wish else wish
        self.planned = self.planned or wish == Wish.RESIZE

    def take(self) -> "News":
        taken, self.events = self.events, []
        seats = tuple(self.seats) if self.seats and len(self.seats) == self.room else None
        return News(taken, self.announced, self.life, self.step, seats)

    def confirm(self, announced: int) -> None:
        self.confirmed = announced

    def counts(self) -> tuple[int, int]:
        return self.announced, self.confirmed

    def keep(self, life: int, step: int, state: np.ndarray, facts: dict[str, Any]) -> None:
        """Take over a copy of the state; it is this actor's own, since an object dies with the worker that made it."""
        if life == self.life:
            self.kept = step, ray.put(state), facts

    def kept_state(self) -> tuple[int, list[Any], dict[str, Any]] | None:
        """Step, reference (in a list, so that it travels as one) and facts."""
        return self.kept and (self.kept[0], [self.kept[1]], self.kept[2])


def start_telemetry() -> Any:
    """Start the actor that holds the news of one run, on this machine."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Telemetry).options(scheduling_strategy=here).remote()


class TelemetryClient:
    """A worker's side."""

    def __init__(self, actor: Any, life: int):
        self.actor, self.life = actor, life
        self.replies: list[Any] = []
        self.wished = Wish.NONE
        self.sender = ThreadPoolExecutor(1)

    def announce(self, event: dict[str, Any]) -> None:
        self.actor.announce.remote(self.life, event)

    def progress(self, step: int) -> None:
        self.replies.append(self.actor.progress.remote(self.life, step))

    def wish(self) -> Wish:
        """The last wish that came back; at most a step or two old."""
        if self.replies:
            done, self.replies = ray.wait(self.replies, num_returns=len(self.replies), timeout=0.0)
            if done:
                self.wished = max(map(Wish, ray.get(done)))
        return self.wished

    def keep(self, tensors: "dict[str, Tensor]", facts: dict[str, Any]) -> None:
        self.sender.submit(self._send, tensors, facts)

    def _send(self, tensors: "dict[str, Tensor]", facts: dict[str, Any]) -> None:
        import safetensors.torch

        state = np.frombuffer(safetensors.torch.save(tensors), dtype=np.uint8)
        ray.get(self.actor.keep.remote(self.life, int(tensors["step"]), state, facts))

    def kept(self) -> tuple[int, list[Any], dict[str, Any]] | None:
        return ray.get(self.actor.kept_state.remote())

    def wait_recorded(self, step: int) -> None:
        """Until all that was announced so far is on disk. Raises TimeoutError after CONFIRM_S."""
        announced, confirmed = ray.get(self.actor.counts.remote())
        deadline = time.monotonic() + CONFIRM_S
        while confirmed < announced:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the metrics up to step {step} were not written within {CONFIRM_S:.0f} s")
            time.sleep(0.05)
            confirmed = ray.get(self.actor.counts.remote())[1]

    def close(self) -> None:
        """Wait until all that was said and handed to `keep` has arrived: what comes after the next life has begun is not heard."""
        self.sender.shutdown()
        ray.get(self.actor.counts.remote())


def unpack(state: np.ndarray) -> "dict[str, Tensor]":
    """The tensors of a kept state."""
    import safetensors.torch

    return safetensors.torch.load(state.tobytes())


def failure_event(rank: int, error: BaseException) -> dict[str, Any]:
    """What befell a worker, in a line."""
    cause = getattr(error, "cause", None) or error
    return {"kind": "failure", "text": f"Worker {rank}: {type(cause).__name__}: {cause}"}
