"""Start or join a cluster, run the workers, follow them."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch

from massl_ray.config import Config
from massl_ray.on_ray.telemetry import start_telemetry
from massl_ray.on_ray.worker import train_worker
from massl_ray.training.loop import Outcome
from massl_ray.training.run import Run

POLL_S = 0.2  # between looks at the news
STOP_S = 60.0  # for the last checkpoint after Ctrl-C or SIGTERM, before workers are ended

QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


class Stopped(Exception):
    """The run was ended by a signal before its workers could say so themselves."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names (a Ray job sets it), or one of our own on this machine for as long as this lasts."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        # A private cluster on loopback needs no token, and writing one would lock `ray job` out of a later `ray start`.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(address="local", include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def run_workers(run: Run, follow: Callable[[dict[str, Any]], None]) -> Outcome:
    """Train on the cluster at hand, handing every event to `follow` as it comes. Blocks until the run is over.

    Ctrl-C and SIGTERM ask for a last checkpoint first; a second one, or STOP_S seconds, ends the workers.

    Raises:
        ray.train.TrainingFailedError: workers failed more often than elastic.max_failures allows.
        Stopped: ended by a signal without a last checkpoint.
    """
    telemetry = start_telemetry()
    layout = worker_layout(run.config, run.resolved.num_micro_batches)
    arguments = {"run": run, "telemetry": telemetry, "use_gpu": layout["use_gpu"], "data_cpus": layout["data_cpus"]}
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config=arguments,
        scaling_config=ray.train.ScalingConfig(
            num_workers=layout["num_workers"],
            use_gpu=layout["use_gpu"],
            resources_per_worker=layout["resources_per_worker"],
        ),
        run_config=ray.train.RunConfig(
            name=".ray",
            storage_path=str(run.dir),
            failure_config=ray.train.FailureConfig(max_failures=run.config.elastic.max_failures),
        ),
    )
    training = _InBackground(trainer.fit)  # Ray takes Ctrl-C for itself in a main thread
    with _signals() as received:
        asked_at = None
        while not training.wait(POLL_S):
            for event in ray.get(telemetry.take.remote()):
                follow(event)
            if received and asked_at is None:
                asked_at = 0.0
                telemetry.request_stop.remote()
                follow({"kind": "stopping"})
            asked_at = None if asked_at is None else asked_at + POLL_S
            if len(received) > 1 or (asked_at or 0.0) > STOP_S:
                raise Stopped(received[0])
        for event in ray.get(telemetry.take.remote()):
            follow(event)
        outcome = Outcome(**training.result().return_value)
        if outcome.status == "stopped":
            raise Stopped(received[0]) if received else RuntimeError("a run stopped that nobody asked to")
        return outcome


def worker_layout(config: Config, num_micro_batches: int) -> dict[str, Any]:
    """How many workers, what each reserves, and the CPUs that remain for Ray Data.

    With GPUs: one worker and one CPU a GPU, all other CPUs for Ray Data. Without: one worker a node (a worker computes with
    train.threads threads), and at least half of the CPUs stay with Ray Data.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1.0)
    use_gpu = config.train.device == "cuda" or (config.train.device == "auto" and gpus > 0)
    nodes = sum(node["Alive"] for node in ray.nodes())
    threads = config.train.threads
    default = gpus if use_gpu else min(nodes, int(cpus // (2 * threads)))
    most = max(1, default) if config.elastic.max_workers == "auto" else config.elastic.max_workers
    most = max(config.elastic.min_workers, min(most, num_micro_batches))
    reserved = 1.0 if use_gpu else float(min(threads, max(1, cpus // 2)))
    return {
        "num_workers": most if most == config.elastic.min_workers else (config.elastic.min_workers, most),
        "use_gpu": use_gpu,
        "resources_per_worker": {"CPU": reserved} | ({"GPU": 1.0} if use_gpu else {}),
        "data_cpus": max(1.0, cpus - most * reserved),
    }


class _InBackground:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]):
        self.value: Any = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        threading.Thread(target=self._run, args=(call,), daemon=True).start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.value = call()
        except BaseException as error:  # handed to whoever asks for the result
            self.error = error
        finally:
            self.done.set()

    def wait(self, seconds: float) -> bool:
        return self.done.wait(seconds)

    def result(self) -> Any:
        if self.error:
            raise self.error
        return self.value


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying of them."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
