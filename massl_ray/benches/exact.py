"""`bench exact`: the demo preset cut to STEPS steps, with drop path, led to its end in several ways; all must end in the same bits.

Machines are pretended ones of one CPU on this one. Not a measurement of time: `rounds` and the device do not matter.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from massl_ray.benches.measure import machine
from massl_ray.config import load
from massl_ray.reporting.summary import read_metrics
from massl_ray.training.checkpoint import list_checkpoints, read_manifest
from massl_ray.training.run import Run, claim_directory, prepare_run

STEPS, LOSS_STEPS = 60, 30
FLAGS = {
    "train.steps": STEPS,
    "train.micro_batch_size": 16,  # four to share out
    "model.drop_path": 0.1,
    "train.checkpoint_every": 10,
    "train.log_every": 1,
    "eval.knn_every": 0,
}


def run(device: torch.device, rounds: int = 1) -> dict[str, Any]:
    """state_sha256 at the last step by how the run went, and by how much the losses of elastic.exact = false differ."""
    from massl_ray.on_ray.practice import practice_cluster

    hashes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with practice_cluster(3) as cluster:
            for workers in (1, 2, 3):
                hashes[f"{workers} workers"] = _undisturbed(root / f"of_{workers}", cluster, workers)
            hashes["killed at step 23, resumed with 2"] = _killed_and_resumed(root / "killed", cluster)
            difference = _loss_difference(root, cluster)
        with practice_cluster(1) as cluster:
            hashes["grown from 1 to 2, then one machine lost"] = _grown_and_shrunk(root / "grown", cluster)
    return {
        "name": "exact",
        "work": f"demo preset, {STEPS} steps, drop path {FLAGS['model.drop_path']}",
        **machine(device),
        "hashes": hashes,
        "equal": len(set(hashes.values())) == 1,
        "inexact_loss_difference": difference,
    }


def flags(folder: Path, workers: tuple[int, int], **others: Any) -> list[str]:
    """For a run with so many workers at least and at most."""
    settings = {**FLAGS, "run.dir": folder, "elastic.min_workers": workers[0], "elastic.max_workers": workers[1], **others}
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def final_hash(run: Run) -> str:
    """Of the last checkpoint, which must be that of the last step."""
    checkpoint = list_checkpoints(run.checkpoints)[-1]
    if checkpoint.name != f"step_{run.resolved.steps}":
        raise RuntimeError(f"the run in {run.dir} ended with {checkpoint.name}, not after {run.resolved.steps} steps")
    return read_manifest(checkpoint)["state_sha256"]


def _say(text: str) -> None:
    print(f"bench exact: {text}", file=sys.stderr, flush=True)  # it takes minutes


def _train(cluster: Any, arguments: list[str], meet: Callable[[dict[str, Any]], None] = lambda event: None) -> Run:
    from massl_ray.on_ray.practice import run_through

    run = claim_directory(prepare_run(load(arguments)))
    _say(f"training in {run.dir.name}")
    outcome, _ = run_through(run, cluster, meet)
    _say(f"{outcome.status} after step {outcome.step}, state {final_hash(run)}")
    return run


def _undisturbed(folder: Path, cluster: Any, workers: int, **others: Any) -> str:
    return final_hash(_train(cluster, flags(folder, (workers, workers), **others)))


def _killed_and_resumed(folder: Path, cluster: Any) -> str:
    """The command itself is killed, so that nothing can be saved any more."""
    with _command(flags(folder, (1, 1)), cluster.address) as command:
        for line in command.stdout or ():
            if _step(line) >= 23:
                break
    return _undisturbed(folder, cluster, 2)


@contextmanager
def _command(arguments: list[str], address: str) -> Iterator[subprocess.Popen]:
    """massl-ray train on a cluster, in a terminal's stead reporting each step; killed in the end."""
    program = "import sys; from massl_ray import train; from massl_ray.reporting import console; console.PLAIN_S = 0.0; "
    command = [sys.executable, "-c", program + "train.main(sys.argv[1:])", *arguments]
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            os.kill(process.pid, signal.SIGKILL)


def _step(line: str) -> int:
    """N of 'step N/60 ...', else 0."""
    return int(line.split()[1].split("/")[0]) if line.startswith("step ") else 0


def _grown_and_shrunk(folder: Path, cluster: Any) -> str:
    from massl_ray.on_ray.practice import Scenario

    def script(scenario: Any) -> Any:
        yield from scenario.steps(10)
        cluster.add()
        yield from scenario.transition(2)
        yield from scenario.steps(5)
        cluster.kill(1)
        yield from scenario.transition(1)

    scenario = Scenario(script)
    run = _train(cluster, flags(folder, (1, 2)), scenario.meet)
    if not scenario.over:
        raise RuntimeError("the run was over before it had grown and shrunk")
    return final_hash(run)


def _loss_difference(root: Path, cluster: Any) -> float:
    """Largest relative difference of the losses of 1 and 2 workers over the first steps, summed as DistributedDataParallel does."""
    losses = []
    for workers in (1, 2):
        others = {"elastic.exact": "false", "train.steps": LOSS_STEPS, "train.precision": "fp32"}
        run = _train(cluster, flags(root / f"inexact_{workers}", (workers, workers), **others))
        losses.append([line["loss"] for line in read_metrics(run.dir)])
    return max(abs(two - one) / abs(one) for one, two in zip(*losses, strict=True))


if __name__ == "__main__":
    print(json.dumps(run(torch.device("cpu")), indent=2))
