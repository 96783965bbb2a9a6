"""News between the workers and the command that started them."""

from typing import Any

import ray


class Telemetry:
    """Holds what workers announced until the console takes it, and the wish to stop until a worker hears of it."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.stop = False

    def announce(self, event: dict[str, Any]) -> bool:
        """Leave an event; returns whether the run was asked to stop."""
        self.events.append(event)
        return self.stop

    def take(self) -> list[dict[str, Any]]:
        taken, self.events = self.events, []
        return taken

    def request_stop(self) -> None:
        self.stop = True


def start_telemetry() -> Any:
    """Start the actor that holds the news of one run."""
    return ray.remote(num_cpus=0)(Telemetry).remote()


class TelemetryClient:
    """A worker's side: announces without waiting, and remembers the answers that came."""

    def __init__(self, actor: Any):
        self.actor = actor
        self.replies: list[Any] = []
        self.stopped = False

    def announce(self, event: dict[str, Any]) -> None:
        self.replies.append(self.actor.announce.remote(event))

    def stop_asked(self) -> bool:
        """Whether any answer so far said stop. Asks again, so the answer is at most one look old."""
        self.announce({"kind": "alive"})
        done, self.replies = ray.wait(self.replies, num_returns=len(self.replies), timeout=0.0)
        self.stopped = self.stopped or any(ray.get(done))
        return self.stopped
