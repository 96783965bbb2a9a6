"""massl-ray bench NAME: measure ours beside a reference on this machine."""

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

NAMES = ("readout", "views", "step", "resize", "exact", "cost", "ingest", "embed")
LONG = 600  # letters of a value that nobody reads in a terminal


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="massl-ray bench", description="Measure ours beside a reference, in one invocation.")
    parser.add_argument("name", choices=NAMES, help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--rounds", type=int, help="timed rounds; the figures are medians [7; of resize 1]")
    parser.add_argument("--photos", help="views, ingest, embed: a folder of photographs to cut up [those of the system]")
    arguments = parser.parse_args(argv)

    import torch  # late: --help answers at once

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = {"rounds": arguments.rounds, "photos": arguments.photos}
    given = {name: value for name, value in options.items() if value is not None}
    with contextlib.redirect_stdout(sys.stderr):  # what Ray says about machines that are ended on purpose
        result = importlib.import_module(f"massl_ray.benches.{arguments.name}").run(device, **given)
    if arguments.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:<24}{_written(value)}")
    return 0


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return text if len(text := str(value)) < LONG else "(long; --json has it)"


if __name__ == "__main__":
    sys.exit(main())
