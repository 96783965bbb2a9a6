"""Run the workers of a cluster, follow them."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from massl_ray.on_ray.knobs import RESIZE_TIMER_S
from massl_ray.on_ray.layout import plan_layout
from massl_ray.on_ray.supervisor import Supervisor
from massl_ray.on_ray.telemetry import start_telemetry, unpack
from massl_ray.on_ray.worker import train_worker
from massl_ray.training.checkpoint import list_checkpoints, write_checkpoint
from massl_ray.training.loop import Outcome
from massl_ray.training.run import Run
from massl_ray.training.wish import Wish

POLL_S = 0.2  # between looks at the news
STOP_S = 60.0  # for the last checkpoint after Ctrl-C or SIGTERM, before workers are ended


class Stopped(Exception):
    """The run was ended by a signal before its workers could say so themselves."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def run_workers(run: Run, follow: Callable[[dict[str, Any]], None], *, stock: bool = False) -> Outcome:
    """Train on the cluster at hand, handing every event to `follow` as it comes. Blocks until the run is over. `stock` leaves
    resizing to Ray Train, to compare with.

    Ctrl-C and SIGTERM ask for a last checkpoint first; a second one, or STOP_S seconds, ends the workers.

    Raises:
        ray.train.TrainingFailedError: Ray Train itself failed; workers that fail are started again.
        Stopped: ended by a signal.
    """
    telemetry = start_telemetry()
    layout = plan_layout(run.config, run.resolved.num_micro_batches)
    supervisor = Supervisor(layout, telemetry, follow)

    def news() -> None:
        events, announced, life, step = ray.get(telemetry.take.remote())
        for event in events:
            supervisor.follow(event)
            follow(event)
        supervisor.progress(life, step)
        follow({"kind": "progress", "life": life, "step": step})
        telemetry.confirm.remote(announced)

    with TemporaryDirectory(prefix="massl-ray-") as scratch, _signals() as received:
        trainer = DataParallelTrainer(
            train_worker,
            train_loop_config={"run": [ray.put(run)], "telemetry": telemetry, "layout": layout},  # in a list it stays packed
            scaling_config=ray.train.ScalingConfig(
                num_workers=layout.max_workers
                if layout.max_workers == layout.min_workers
                else (layout.min_workers, layout.max_workers),
                use_gpu=layout.use_gpu,
                resources_per_worker=dict(layout.per_worker),
                elastic_resize_monitor_interval_s=60.0 if stock else RESIZE_TIMER_S,
            ),
            # Checkpoints are ours, not Ray's, and so is the count of failures: Ray would count resizes, too.
            run_config=ray.train.RunConfig(
                name="train", storage_path=scratch, failure_config=ray.train.FailureConfig(max_failures=-1)
            ),
        )
        training = _InBackground(trainer.fit)  # Ray takes Ctrl-C for itself in a main thread
        asked_at = None
        try:
            while not training.wait(POLL_S):
                news()
                if not stock:
                    supervisor.look()
                if received and asked_at is None:
                    asked_at = 0.0
                    telemetry.ask.remote(Wish.STOP)
                    follow({"kind": "stopping"})
                asked_at = None if asked_at is None else asked_at + POLL_S
                if len(received) > 1 or (asked_at or 0.0) > STOP_S:
                    raise Stopped(received[0])
            news()
            outcome = Outcome(**training.result().return_value)
        finally:
            _save_kept(run, telemetry)
        if outcome.status == "stopped":
            raise Stopped(received[0]) if received else RuntimeError("a run stopped that nobody asked to")
        return outcome


def _save_kept(run: Run, telemetry: Any) -> None:
    """However the workers ended: if the copy of the state is newer than the last checkpoint, write it down."""
    kept = ray.get(telemetry.kept_state.remote())
    written = [int(checkpoint.name.removeprefix("step_")) for checkpoint in list_checkpoints(run.checkpoints)]
    if kept and kept[0] > max(written, default=-1):
        write_checkpoint(run.checkpoints, unpack(ray.get(kept[1][0])), kept[2], run.config.checkpoint.keep)


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
