"""massl-ray bench NAME: measure ours beside a reference on this machine."""

import argparse
import contextlib
import importlib
import inspect
import json
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from massl_ray.errors import UserError

NAMES = ("readout", "views", "step", "resize", "exact", "cost", "ingest", "embed", "learn")
LONG = 600  # letters of a value that nobody reads in a terminal
SHARED: dict[str, dict[str, Any]] = {
    "rounds": {"type": int, "help": "timed rounds; the figures are medians [7; of resize 1]"},
    "photos": {"help": "a folder of photographs to cut up [those of the system]"},
}
"""Flags of the benches whose `run` takes them. A bench with more has a function `options(parser)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a mistake in what was asked for."""
    asked = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="massl-ray bench",
        description="Measure ours beside a reference, in one invocation.",
        epilog="massl-ray bench NAME --help lists the flags of that one.",
    )
    parser.add_argument("name", choices=NAMES, help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default cuda where there is one")
    name = next((argument for argument in asked if argument in NAMES), None)
    bench = importlib.import_module(f"massl_ray.benches.{name}") if name else None  # late: --help answers at once
    if bench:
        _add_flags(parser, bench)
    given = vars(parser.parse_args(asked))
    assert bench is not None

    import torch

    device, as_json = given.pop("device"), given.pop("json")
    flags = {flag: value for flag, value in given.items() if flag != "name" and value is not None}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what Ray says about machines that are ended on purpose
            result = bench.run(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), **flags)
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if as_json else getattr(bench, "written", _written)(result))
    return 0


def _add_flags(parser: argparse.ArgumentParser, bench: ModuleType) -> None:
    for flag in SHARED.keys() & inspect.signature(bench.run).parameters.keys():
        parser.add_argument(f"--{flag}", **SHARED[flag])
    if hasattr(bench, "options"):
        bench.options(parser)


def _written(result: dict[str, Any]) -> str:
    """A line for each figure."""
    return "\n".join(f"{key:<24}{_short(value)}" for key, value in result.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return text if len(text := str(value)) < LONG else "(long; --json has it)"


if __name__ == "__main__":
    sys.exit(main())
