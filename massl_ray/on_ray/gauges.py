"""A run's figures for those who look after clusters: Prometheus reads them, beside Ray's own, from the agent of Ray on a machine.

Ray puts "ray_" before every name. The command that started the run sets them; what they say stands in metrics.jsonl and
elastic.jsonl, too, so nothing is lost where nobody reads them.
"""

import time
from collections.abc import Callable
from typing import Any

from ray.util.metrics import Counter, Gauge

from massl_ray.shown import in_a_line
from massl_ray.storage import Folder
from massl_ray.training.run import Run

GAUGES = {
    "massl_ray_step": "Last step of the run.",
    "massl_ray_planned_steps": "Step that the run ends after.",
    "massl_ray_last_step_timestamp_seconds": "When that step was reported, in seconds since 1970.",
    "massl_ray_images_per_second": "Throughput of the training loop.",
    "massl_ray_data_wait_ratio": "Share of a step that is spent waiting for images, 0 to 1.",
    "massl_ray_workers": "Workers that train.",
    "massl_ray_loss_nats": "Loss.",
    "massl_ray_embedding_spread_ratio": "Spread of the teacher's embeddings; 1: evenly over the sphere.",
    "massl_ray_effective_rank_dimensions": "Directions that the teacher's embeddings of a batch use.",
    "massl_ray_alignment_square_distance": "Mean square of the distance of two views of an image, 0 to 4; lower is better aligned.",
    "massl_ray_uniformity_nats": "Log of how near different images are; 0: one point, about -4: evenly over the sphere.",
    "massl_ray_memory_evenness_ratio": "Evenness of which rows of the memory are nearest to a batch; 1: all alike, 0: one.",
    "massl_ray_knn_top1_ratio": "k-NN accuracy of the teacher's features, 0 to 1.",
}
COUNTERS = {
    "massl_ray_steps_repeated_total": "Steps that were done again after machines or workers were lost.",
    "massl_ray_transitions_total": "Starts and changes of the number of workers, by cause.",
    "massl_ray_pause_seconds_total": "Time without any step, because of transitions.",
    "massl_ray_failures_total": "Workers that failed.",
}
OF_A_LINE = {
    "step": "massl_ray_step",
    "images_per_s": "massl_ray_images_per_second",
    "data_wait": "massl_ray_data_wait_ratio",
    "world_size": "massl_ray_workers",
    "loss": "massl_ray_loss_nats",
    "embedding_std": "massl_ray_embedding_spread_ratio",
    "effective_rank": "massl_ray_effective_rank_dimensions",
    "alignment": "massl_ray_alignment_square_distance",
    "uniformity": "massl_ray_uniformity_nats",
    "memory_usage": "massl_ray_memory_evenness_ratio",
}
"""Keys of metrics.jsonl, and what they are called here."""
AGAIN_S = 1.0  # Ray forgets a gauge that is not set again for twice its interval of reports, which is 10 s or what you make it


class RunGauges:
    """Follows the events of a run."""

    def __init__(self, run: Run, clock: Callable[[], float] = time.time):
        self.end, self.clock = run.resolved.end, clock
        self.tags = {"run": in_a_line(Folder(str(run.folder)).name)}  # of a bucket the name, without a key
        self.gauges = {name: Gauge(name, words, ("run",)) for name, words in GAUGES.items()}
        self.counters = {
            name: Counter(name, words, ("run", "cause") if name == "massl_ray_transitions_total" else ("run",))
            for name, words in COUNTERS.items()
        }
        self.values: dict[str, float] = {}  # of the gauges
        self.set_at = clock()

    def follow(self, event: dict[str, Any]) -> None:
        """One event of `on_ray.telemetry`."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler:
            handler(event)

    def refresh(self) -> None:
        """Call as often as you like: what has not changed stays known."""
        if self.clock() - self.set_at > AGAIN_S:
            self._set({})

    def _on_started(self, event: dict[str, Any]) -> None:
        known = {"massl_ray_planned_steps": self.end, "massl_ray_step": event["step"], "massl_ray_workers": event["world_size"]}
        self._set(known)

    def _on_metrics(self, event: dict[str, Any]) -> None:
        line = event["lines"][-1]
        now = {"massl_ray_last_step_timestamp_seconds": self.clock()}
        self._set({name: line[key] for key, name in OF_A_LINE.items()} | now)

    def _on_knn(self, event: dict[str, Any]) -> None:
        if event["features"] != "pixels":
            self._set({"massl_ray_knn_top1_ratio": event["top1"]})

    def _on_transition(self, event: dict[str, Any]) -> None:
        self._add("massl_ray_transitions_total", 1, cause=event["cause"])
        self._add("massl_ray_steps_repeated_total", event["steps_repeated"])
        self._add("massl_ray_pause_seconds_total", event["pause_s"])

    def _on_failure(self, event: dict[str, Any]) -> None:
        self._add("massl_ray_failures_total", 1)

    def _set(self, values: dict[str, float]) -> None:
        self.values |= values
        self.set_at = self.clock()
        for name, value in self.values.items():
            self.gauges[name].set(value, self.tags)

    def _add(self, name: str, value: float, **tags: str) -> None:
        if value > 0:  # Ray refuses to add nothing
            self.counters[name].inc(value, self.tags | tags)
