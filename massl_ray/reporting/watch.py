"""What ails a run while it trains, said once: the command's eye on what its workers tell."""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from massl_ray.reporting.summary import read_knn, read_metrics
from massl_ray.training.verdict import WINDOW, Facts, Finding, Verdict, judge


class Watch:
    """Judges a run anew with every event. What it needs of long ago, where k-NN is measured, it reads from the run directory.

    Args:
        settings: the run's own by section, with every 'auto' filled in.
        folder: the run directory, in which an event is written down before `follow` sees it.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path):
        self.facts, self.folder = Facts.of(settings), folder
        self.recent: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self.said: set[Verdict] = {Verdict.HEALTHY}

    def follow(self, event: dict[str, Any]) -> str:
        """A sentence for people where this event shows for the first time that something is wrong; empty otherwise."""
        finding = self._judged(event)
        if finding is None or finding.verdict in self.said:
            return ""
        self.said.add(finding.verdict)
        return finding.text

    def _judged(self, event: dict[str, Any]) -> Finding | None:
        if event["kind"] == "started":
            self.recent.clear()  # steps after the one that it starts from are rolled back
        elif event["kind"] == "metrics":
            self.recent.extend(event["lines"])
            return judge(self.recent, (), self.facts)
        elif event["kind"] == "knn":
            return judge(read_metrics(self.folder), read_knn(self.folder), self.facts)
        return None
