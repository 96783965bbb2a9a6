"""massl-ray report RUN: write report.html anew from a run directory, also while the run goes on."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from massl_ray.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="massl-ray report", description="Write report.html anew from a run directory.")
    parser.add_argument("run", type=Path, help="run directory")
    try:
        run_dir: Path = parser.parse_args(argv).run
        if not (run_dir / "config.toml").is_file():
            raise UserError(f"{run_dir} is no run directory: it has no config.toml. Give the directory of --run.dir.")
        print(write(run_dir.absolute()))
        return 0
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2


def write(run_dir: Path) -> Path:
    """report.html of a run directory; returns its path. Raises UserError."""
    from massl_ray.reporting.html import write_report  # late: drawing takes a second to import

    try:
        return write_report(run_dir)
    except OSError as error:
        raise UserError(f"{run_dir / 'report.html'} cannot be made ({error.strerror or error}). Mend its permissions.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{run_dir} holds files that are not those of a run ({type(error).__name__}: {error}).") from None


if __name__ == "__main__":
    sys.exit(main())
