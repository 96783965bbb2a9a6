"""Ray Tune over the trainer: a trial is the command `massl-ray train` in a process of its own, on the cluster of the sweep."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from massl_ray.config import Config
from massl_ray.on_ray.child import ends_with_its_parent
from massl_ray.sweeping.trials import HIGHER, Outcome, Trial, forget_outcome, read_outcome, row_of, write_outcome

LOOK_S = 0.5  # between looks at what a trial has written
STOP_S = 60.0  # for a trial's last checkpoint
RUNGS, RUNG = 3, 3  # of successive halving: looks at a trial before its end, and how many times more images each next one asks for


def run_trials(
    trials: Sequence[Trial],
    root: Path,
    settings: Callable[[Trial], Path],
    metric: str,
    scheduler: str,
    at_once: int,
    images: int,
) -> None:
    """Run these trials to their ends, `at_once` at a time. Each leaves its outcome in its directory, also where it fails.

    Args:
        settings: writes a trial's settings; returns the file.
        images: that a whole trial sees.
    """
    by_name = {trial.name: trial for trial in trials}
    files = {trial.name: str(settings(trial)) for trial in trials}
    for trial in trials:
        forget_outcome(root, trial)
    here = ray.util.get_node_ip_address()
    run = tune.with_parameters(_run_trial, root=root, trials=by_name, files=files, metric=metric, images=images)
    tuner = tune.Tuner(
        tune.with_resources(run, {"CPU": 0, f"node:{here}": 1e-3}),  # trials write here; what trains them may run anywhere
        param_space={"trial": tune.grid_search([trial.name for trial in trials])},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            scheduler=_asha(images) if scheduler == "asha" else FIFOScheduler(),
            max_concurrent_trials=at_once,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(root / ".tune"), verbose=0),
    )
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would return as if all trials were over
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its tables, also where it is to be silent
    for result in tuner.fit():
        trial = by_name[result.config["trial"]]  # type: ignore[index]
        if read_outcome(root, trial) is None:
            seconds = (result.metrics or {}).get("time_total_s", 0.0)
            status = Outcome("failed", seconds, str(result.error)) if result.error else Outcome("stopped early", seconds)
            write_outcome(root, trial, status)


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


def _run_trial(
    config: dict[str, Any], *, root: Path, trials: dict[str, Trial], files: dict[str, str], metric: str, images: int
) -> None:
    trial = trials[config["trial"]]
    started, seen = time.monotonic(), -1
    log = root / "logs" / f"{trial.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "massl_ray.train", "--config", files[trial.name]]
    sign = 1.0 if HIGHER[metric] else -1.0
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=ends_with_its_parent
        )
        try:
            while process.poll() is None:
                row = row_of(root, trial)
                measured, score = row.measured_at(metric), row.metric(metric)
                # A trial that has seen all its images is at its end: it may not be stopped any more, and ends by itself.
                if seen < measured < images and not math.isnan(score):
                    seen = measured
                    tune.report({"images_seen": seen, "score": sign * score})
                time.sleep(LOOK_S)
        finally:  # a report does not return when Tune ends a trial
            process.terminate()
            process.wait(STOP_S)
    seconds = time.monotonic() - started
    if process.returncode == 0:
        write_outcome(root, trial, Outcome("finished", seconds))
    else:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        cause = next((line for line in reversed(lines) if line.startswith("massl-ray:")), lines[-1] if lines else "no word")
        status = "out of memory" if any("out of memory" in line for line in lines) else "failed"
        write_outcome(root, trial, Outcome(status, seconds, cause))
    score = row_of(root, trial).metric(metric)
    tune.report({"images_seen": images, "score": -math.inf if math.isnan(score) else sign * score})
