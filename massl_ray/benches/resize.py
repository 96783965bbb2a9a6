"""`bench resize`: machines come, vanish and are given notice while a run trains; ours beside Ray Train's own settings.

Machines are pretended ones of one CPU on this one. Each side is one run of the demo preset in a fresh process that meets, one
after the other: a machine more, the sudden end of one, another one more, a notice of NOTICE_S seconds followed by the end.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from massl_ray.benches.measure import machine

EVENTS = ("add", "kill", "notice")  # a machine more happens twice, and its figures are means
NOTICE_S = 20.0
SETTLED_STEPS = 30  # done at one world size before the next thing happens: processes that wait have been started, too


def run(device: torch.device, rounds: int = 1) -> dict[str, Any]:
    """Seconds from each event to the next step at the new number of workers, and steps that had to be repeated: medians over
    `rounds` runs of ours [1] beside one run of stock."""
    ours, stock = _median([_side(stock=False) for _ in range(rounds)]), _side(stock=True)
    result: dict[str, Any] = {"name": "resize", "work": "demo preset, 1 -> 2 -> 1 -> 2 -> 1 machines of 1 CPU", **machine(device)}
    for name in EVENTS:
        for figure in ("seconds", "pause_s", "repeated_steps"):
            result |= {f"{figure}_{name}": ours[name][figure], f"{figure}_{name}_stock": stock[name][figure]}
        result[f"ratio_{name}"] = stock[name]["seconds"] / ours[name]["seconds"]
    timelines = {"ours": ours["timeline"], "stock": stock["timeline"]}
    return result | {"ratio": min(result["ratio_add"], result["ratio_kill"]), "timelines": timelines}


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: {figure: sorted(each[name][figure] for each in rounds)[len(rounds) // 2] for figure in rounds[0][name]}
        for name in EVENTS
    } | {"timeline": rounds[-1]["timeline"]}


def _side(stock: bool) -> dict[str, Any]:
    """In a fresh process: Ray reads its settings once."""
    command = [sys.executable, "-m", __spec__.name, json.dumps(stock)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the {'stock' if stock else 'own'} side of bench resize failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Account:
    """What happened when on one side, in seconds since the first step."""

    def __init__(self) -> None:
        self.measured: dict[str, list[dict[str, Any]]] = {name: [] for name in EVENTS}
        self.happenings: list[tuple[float, str]] = []
        self.steps: list[tuple[float, int]] = []  # (when, step), a roll-back going down again
        self.sizes: list[tuple[float, int]] = []  # (when, workers)
        self.since: float | None = None

    def follow(self, event: dict[str, Any]) -> None:
        if event["kind"] == "transition":
            self.since = self.since or event["seen"]
            self.sizes.append((event["seen"] - self.since, event["to"]))
        elif event["kind"] == "progress" and self.since and event["step"] not in (0, self.steps[-1][1] if self.steps else None):
            self.steps.append((event["seen"] - self.since, event["step"]))

    def figures(self) -> dict[str, dict[str, float]]:
        """Means by event."""
        return {
            name: {figure: statistics.mean(each[figure] for each in measured) for figure in measured[0]}
            for name, measured in self.measured.items()
        }

    def script(self, cluster: Any) -> Callable[[Any], Any]:
        """For `practice.Scenario`."""

        def timed(scenario: Any, name: str, happened_at: float, world_size: int) -> Any:
            self.happenings.append((happened_at - (self.since or 0.0), name))
            transition = yield from scenario.transition(world_size)
            figures = {
                "seconds": transition["seen"] - happened_at,
                "pause_s": transition["pause_s"],
                "repeated_steps": transition["steps_repeated"],
            }
            self.measured[name].append(figures)
            yield from scenario.steps(SETTLED_STEPS)

        def script(scenario: Any) -> Any:
            yield from scenario.transition(1)
            yield from scenario.steps(SETTLED_STEPS)
            cluster.add()
            yield from timed(scenario, "add", time.monotonic(), 2)  # since it has joined
            killed_at = time.monotonic()
            cluster.kill(1)
            yield from timed(scenario, "kill", killed_at, 1)
            cluster.add()
            yield from timed(scenario, "add", time.monotonic(), 2)
            cluster.give_notice(1, NOTICE_S, then_kill=True)
            yield from timed(scenario, "notice", time.monotonic(), 1)
            os.kill(os.getpid(), signal.SIGINT)

        return script


def _run_side(stock: bool) -> dict[str, Any]:
    from massl_ray.config import load
    from massl_ray.on_ray.launch import Stopped
    from massl_ray.on_ray.practice import Scenario, practice_cluster, run_through
    from massl_ray.training.run import claim_directory, prepare_run

    flags = "--train.steps 100000 --train.micro_batch_size 16 --train.checkpoint_every 10 --eval.knn_every 0".split()
    flags += ["--elastic.max_workers", "2"]
    account = Account()
    with TemporaryDirectory() as folder, practice_cluster(1, fast=not stock) as cluster:
        run = claim_directory(prepare_run(load([*flags, "--run.dir", str(Path(folder) / "run")])))
        scenario = Scenario(account.script(cluster))

        def meet(event: dict[str, Any]) -> None:
            account.follow(event)
            scenario.meet(event)

        try:
            outcome, _ = run_through(run, cluster, meet, stock=stock)
        except Stopped:
            timeline = {"happenings": account.happenings, "steps": account.steps, "sizes": account.sizes}
            return account.figures() | {"timeline": timeline}
    raise RuntimeError(f"the run ended too early: {outcome}")


if __name__ == "__main__":
    print(json.dumps(_run_side(json.loads(sys.argv[1]))))
