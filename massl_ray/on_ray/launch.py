"""Run the workers of a cluster, follow them."""

import dataclasses
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
from ray.data._internal.stats import get_or_create_stats_actor
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from massl_ray.on_ray.crew import Crew
from massl_ray.on_ray.knobs import RESIZE_TIMER_S
from massl_ray.on_ray.layout import Layout, plan_layout
from massl_ray.on_ray.seat import hold_seat, train_here
from massl_ray.on_ray.supervisor import Supervisor
from massl_ray.on_ray.telemetry import start_telemetry, unpack
from massl_ray.reporting.patience import Patient
from massl_ray.storage import Folder
from massl_ray.training.checkpoint import CheckpointWriter, NotSaved, list_checkpoints
from massl_ray.training.loop import Outcome
from massl_ray.training.run import Run
from massl_ray.training.wish import Wish

POLL_S = 0.1  # between looks at the news
STOP_S = 60.0  # for the last checkpoint after Ctrl-C or SIGTERM, before workers are ended
_MAKE_ROOM = "The state is saved; make room, and run the same command again."


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
    get_or_create_stats_actor()  # here: where the first worker made it, it would keep that machine from ever being idle
    layout = plan_layout(run.config, run.resolved.num_micro_batches)

    record = Patient(follow, note=lambda text: follow({"kind": "note", "text": text}))

    def tell(event: dict[str, Any]) -> None:
        supervisor.follow(event)
        record(event)

    in_place = run.config.elastic.in_place and not stock
    crew = Crew(run, telemetry, layout, tell) if in_place else None
    supervisor = Supervisor(layout, telemetry, crew, record)

    def look() -> Outcome | None:
        news: Any = ray.get(telemetry.take.remote())
        for event in news.events:
            tell(event)
        supervisor.progress(news.life, news.step)
        record({"kind": "progress", "life": news.life, "step": news.step})
        if record.flush():
            telemetry.confirm.remote(news.announced)
        if not stock:
            supervisor.look()
        return supervisor.lead(news.seats)

    with TemporaryDirectory(prefix="massl-ray-") as scratch, _signals() as received:
        trainer = _trainer(run, telemetry, layout, hold_seat if in_place else train_here, scratch, stock)
        training = _InBackground(trainer.fit)  # Ray takes Ctrl-C for itself in a main thread
        patience_s = STOP_S
        try:
            while not training.wait(POLL_S):
                if outcome := look():
                    telemetry.finish.remote(dataclasses.asdict(outcome))
                if received and patience_s == STOP_S:
                    telemetry.ask.remote(Wish.STOP)
                    record({"kind": "stopping"})
                patience_s -= POLL_S if received else 0.0
                if len(received) > 1 or patience_s < 0:
                    raise Stopped(received[0])
            look()
            outcome = Outcome(**training.result().return_value)
        finally:
            if crew:
                crew.close()
            _save_kept(run, telemetry, record.note)
            ray.kill(telemetry)
        if outcome.status == "stopped":
            raise Stopped(received[0]) if received else RuntimeError("a run stopped that nobody asked to")
        if not record.flush():
            return Outcome("not_saved", outcome.step, f"{run.dir} cannot be written to: {record.error}. {_MAKE_ROOM}")
        return outcome


def _trainer(
    run: Run, telemetry: Any, layout: Layout, worker: Callable[[dict[str, Any]], Any], scratch: str, stock: bool
) -> DataParallelTrainer:
    workers = layout.max_workers if layout.max_workers == layout.min_workers else (layout.min_workers, layout.max_workers)
    return DataParallelTrainer(
        worker,
        train_loop_config={"run": [ray.put(run)], "telemetry": telemetry, "layout": layout},  # in a list it stays packed
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=layout.use_gpu,
            resources_per_worker=dict(layout.per_worker),
            elastic_resize_monitor_interval_s=60.0 if stock else RESIZE_TIMER_S,
        ),
        # Checkpoints are ours, not Ray's, and so is the count of failures: Ray would count resizes, too.
        run_config=ray.train.RunConfig(
            name=name_on_dashboard(run), storage_path=scratch, failure_config=ray.train.FailureConfig(max_failures=-1)
        ),
    )


def name_on_dashboard(run: Run) -> str:
    """The run directory's, in letters that Ray makes a folder of."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", Folder(str(run.folder)).name).lstrip(".") or "train"


def _save_kept(run: Run, telemetry: Any, note: Callable[[str], None]) -> None:
    """However the workers ended: if the copy of the state is newer than the last checkpoint, write it down."""
    kept = ray.get(telemetry.kept_state.remote())
    try:
        written = [int(checkpoint.name.removeprefix("step_")) for checkpoint in list_checkpoints(run.checkpoints)]
    except OSError:  # the writer says so, and where the state is instead
        written = []
    if kept and kept[0] > max(written, default=-1):
        writer = CheckpointWriter(run.checkpoints, run.config.checkpoint.keep, note)
        writer.save(unpack(ray.get(kept[1][0])), kept[2])
        try:
            writer.close(STOP_S)
        except NotSaved as error:
            note(str(error))


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
