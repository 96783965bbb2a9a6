"""massl-ray train: pretrain a backbone on a folder of images. `python -m massl_ray.train --help` lists every setting."""

import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from massl_ray.config import load
from massl_ray.errors import UserError
from massl_ray.shown import in_a_line, redacted

if TYPE_CHECKING:
    from massl_ray.training.run import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 the run failed, 2 a mistake in what was asked
    for, 128 + n ended by signal n."""
    started = time.monotonic()
    try:
        return train(sys.argv[1:] if argv is None else argv, started)
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def train(argv: Sequence[str], started: float) -> int:
    config = load(argv)
    from massl_ray.training.lock import hold
    from massl_ray.training.run import claim_directory, prepare_run  # late: a wrong flag is answered at once

    run = prepare_run(config)
    with hold(run.folder) as lost:
        return _train(claim_directory(run), started, lost)


def _train(run: "Run", started: float, lost: threading.Event) -> int:
    from massl_ray.on_ray.cluster import cluster
    from massl_ray.on_ray.gauges import RunGauges
    from massl_ray.on_ray.launch import Stopped, run_workers
    from massl_ray.reporting.console import Console
    from massl_ray.reporting.html import write_report
    from massl_ray.reporting.recorder import RunRecorder
    from massl_ray.reporting.skipped import SkippedImages
    from massl_ray.reporting.summary import FINISHED, write_summary
    from massl_ray.reporting.watch import Watch
    from massl_ray.training.mirror import Mirror

    console, recorder = Console(run, SkippedImages(run.dir)), RunRecorder(run)
    mirror, gauges = None if run.folder.is_local else Mirror(run.dir, run.folder), RunGauges(run)
    watch = Watch(run.config.model_dump(), run.dir)
    console.plan()

    def follow(event: dict[str, Any]) -> None:
        gauges.refresh()  # also while the disk takes no more
        recorder.follow(event)
        console.follow(event)
        gauges.follow(event)
        if said := watch.follow(event):
            console.note(said)
        if mirror:
            mirror.push(at_most_every_s=30.0)
        if lost.is_set():
            raise UserError(f"run.dir: another run took over {run.folder}. This one is stopped.")

    def summarize(status: str) -> dict[str, Any] | None:
        return write_summary(run.dir, run.checkpoints, time.monotonic() - started, status)

    try:
        with cluster():
            outcome = run_workers(run, follow)
        summary = summarize(outcome.status)
        if summary and outcome.status == FINISHED:
            console.close()
            console.finished(summary, write_report(run.dir))
            return 0
        print("\n".join(map(in_a_line, f"massl-ray: {redacted(outcome.message)}".split("\n"))), file=sys.stderr)
        return 1
    except Stopped as stopped:
        console.close()
        summarize("stopped")
        console.say(f"Stopped. Run the same command again to continue from the last checkpoint in {run.checkpoints}.")
        return 128 + stopped.signum
    finally:
        recorder.close()
        console.close()
        if mirror and not mirror.push():
            print(f"massl-ray: {run.folder} cannot be written to; the newest small files are in {run.dir}.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
