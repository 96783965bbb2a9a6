"""Ray Tune over the trainer: a trial is the command `massl-ray train` in a process of its own, on the cluster of the sweep."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from massl_ray.config import Config, resolve
from massl_ray.config.space import at
from massl_ray.on_ray.child import ends_with_its_parent
from massl_ray.sweeping.rounds import Rounds
from massl_ray.sweeping.trials import (
    HIGHER,
    Outcome,
    Trial,
    hand_over,
    micro_batch_of,
    read_outcome,
    row_of,
    settings_of,
    shrink,
    write_outcome,
)

LOOK_S = 0.5  # between looks at what a trial has written
STOP_S = 60.0  # for a trial's last checkpoint
RUNGS, RUNG = 3, 3  # of successive halving: looks at a trial before its end, and how many times more images each next one asks for


class _InRounds(Searcher):
    """Hands the trials of a sweep to Tune, which knows of no order between them."""

    def __init__(self, rounds: Rounds, begin: Callable[[Trial], None], ended: Callable[[], None]):
        super().__init__(metric="score", mode="max")
        self.rounds, self.begin, self.ended = rounds, begin, ended
        self.trials: dict[str, Trial] = {}  # by Tune's names

    def suggest(self, trial_id: str) -> Any:
        trial = self.rounds.take()
        if trial is None:
            return Searcher.FINISHED if self.rounds.over else None
        self.begin(trial)
        self.trials[trial_id] = trial
        asked = resolve(at(self.rounds.base, trial.point), self.rounds.dataset_size).micro_batch_size
        return {"trial": asdict(trial), "micro_batch_size": asked}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.trials[trial_id]
        if read_outcome(self.rounds.root, trial) is None:
            seconds = (result or {}).get("time_total_s", 0.0)
            cause = f"Ray Tune lost it; what it said stands in {self.rounds.root}/logs/{trial.name}.log" if error else ""
            write_outcome(self.rounds.root, trial, Outcome("failed" if error else "stopped early", seconds, cause))
        self.rounds.done(trial)
        self.ended()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: all there is to keep stands in the sweep's directory."""
        Path(checkpoint_path).touch()


def run_trials(rounds: Rounds, begin: Callable[[Trial], None], ended: Callable[[], None], at_once: int, images: int) -> None:
    """Run the trials of all rounds to their ends, `at_once` at a time. Each leaves its outcome in its directory, also where it
    fails.

    Args:
        begin: called with every trial before it runs.
        ended: called whenever one has ended.
        images: that a whole trial sees.
    """
    metric, scheduler = rounds.sweep.sweep.metric, rounds.sweep.sweep.scheduler
    here = ray.util.get_node_ip_address()
    run = tune.with_parameters(_run_trial, root=rounds.root, metric=metric, images=images)
    tuner = tune.Tuner(
        tune.with_resources(run, {"CPU": 0, f"node:{here}": 1e-3}),  # trials write here; what trains them may run anywhere
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            search_alg=_InRounds(rounds, begin, ended),
            scheduler=_asha(images) if scheduler == "asha" else FIFOScheduler(),
            num_samples=-1,  # until there are no more
            max_concurrent_trials=at_once,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(rounds.root / ".tune"), verbose=0),
    )
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would return as if all trials were over
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its tables, also where it is to be silent
    tuner.fit()


def room(config: Config, workers: int) -> int:
    """How many trials of so many workers the cluster holds, at least one. Without GPUs half of the CPUs is left to their views."""
    held = ray.cluster_resources()
    if config.train.device != "cpu" and held.get("GPU", 0):
        return max(1, int(held["GPU"] // workers))
    return max(1, int(held.get("CPU", 1) // (2 * config.train.threads * workers)))


def _asha(images: int) -> ASHAScheduler:
    return ASHAScheduler(
        time_attr="images_seen", max_t=images, grace_period=max(1, images // RUNG ** (RUNGS - 1)), reduction_factor=RUNG
    )


def _run_trial(config: dict[str, Any], *, root: Path, metric: str, images: int) -> None:
    """Called by Tune; a report does not return when Tune ends the trial."""
    trial = Trial(**config["trial"])
    sign = 1.0 if HIGHER[metric] else -1.0

    def look(seen: int) -> int:
        row = row_of(root, trial)
        measured, score = row.measured_at(metric), row.metric(metric)
        # A trial that has seen all its images is at its end: it may not be stopped any more, and ends by itself.
        if not seen < measured < images or math.isnan(score):
            return seen
        tune.report({"images_seen": measured, "score": sign * score})
        return measured

    started = time.monotonic()
    while True:
        hand_over(root, trial)
        outcome = _train(root, trial, look)
        if outcome.status != "out of memory" or not shrink(root, trial):
            break
    micro = micro_batch_of(root, trial)
    smaller = None if micro in ("auto", config["micro_batch_size"]) else micro
    write_outcome(root, trial, replace(outcome, seconds=time.monotonic() - started, micro_batch_size=smaller))
    score = row_of(root, trial).metric(metric)
    tune.report({"images_seen": images, "score": -math.inf if math.isnan(score) else sign * score})


def _train(root: Path, trial: Trial, look: Callable[[int], int]) -> Outcome:
    """The command itself, in a process of its own on the sweep's cluster; `look` is called with what it returned last."""
    log = root / "logs" / f"{trial.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "massl_ray.train", "--config", str(settings_of(root, trial))]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=ends_with_its_parent
        )
        try:
            seen = -1
            while process.poll() is None:
                seen = look(seen)
                time.sleep(LOOK_S)
        finally:
            process.terminate()
            process.wait(STOP_S)
    if process.returncode == 0:
        return Outcome("finished", 0.0)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    cause = next((line for line in reversed(lines) if line.startswith("massl-ray:")), lines[-1] if lines else "no word")
    return Outcome("out of memory" if cause.startswith("massl-ray: Out of memory") else "failed", 0.0, cause)
