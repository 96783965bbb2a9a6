"""massl-ray compare RUN RUN ...: curves, figures, evaluations and differing settings of runs side by side."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from massl_ray.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a mistake in what was asked for."""
    parser = argparse.ArgumentParser(
        prog="massl-ray compare",
        description="Put runs side by side, finished or not: figures, evaluations, settings that differ, and curves in a page.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write the page with the curves there")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    try:
        return _compare(arguments.runs, arguments.out, arguments.json)
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2


def _compare(folders: Sequence[Path], out: Path | None, as_object: bool) -> int:
    from massl_ray.reporting.comparison import as_json, read_runs

    runs = read_runs(folders)
    if len(runs) < 2:
        raise UserError(f"{folders[0]} is one run: give two or more to compare, or see massl-ray report.")
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a folder: give the name of a file in it.")
    from massl_ray.reporting.side_by_side import console_text, write_comparison  # late: drawing takes a second to import

    print(json.dumps(as_json(runs), indent=2) if as_object else console_text(runs))
    if out is not None:
        try:
            print(write_comparison(runs, out), file=sys.stderr if as_object else sys.stdout)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}.") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
