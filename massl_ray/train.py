"""massl-ray train: pretrain a backbone on a folder of images. `python -m massl_ray.train --help` lists every setting."""

import signal
import sys
import time
from collections.abc import Sequence

from massl_ray.config import load
from massl_ray.errors import UserError


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
    from massl_ray.training.run import claim_directory, prepare_run  # late: a wrong flag is answered at once

    run = prepare_run(config)
    claim_directory(run)

    from massl_ray.on_ray.launch import Stopped, cluster, run_workers
    from massl_ray.reporting.console import Console
    from massl_ray.reporting.html import write_report
    from massl_ray.reporting.skipped import SkippedImages
    from massl_ray.reporting.summary import write_summary

    console = Console(run, SkippedImages(run.dir))
    console.plan()
    try:
        with cluster():
            outcome = run_workers(run, console.follow)
    except Stopped as stopped:
        console.close()
        console.say(f"Stopped. Run the same command again to continue from the last checkpoint in {run.checkpoints}.")
        return 128 + stopped.signum
    finally:
        console.close()
    if outcome.status != "finished":
        print(f"massl-ray: {outcome.message}", file=sys.stderr)
        return 1
    console.finished(write_summary(run.dir, wall_s=time.monotonic() - started), write_report(run.dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
