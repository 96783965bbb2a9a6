"""massl-ray bench NAME: measure ours beside a reference on this machine."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

NAMES = ("readout", "views", "step", "resize", "exact", "cost")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="massl-ray bench", description="Measure ours beside a reference, in one invocation.")
    parser.add_argument("name", choices=NAMES, help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--rounds", type=int, help="timed rounds; the figures are medians [7; of resize 1]")
    parser.add_argument("--photos", help="views: a folder of photographs to cut up [those of the system]")
    arguments = parser.parse_args(argv)

    import torch  # late: --help answers at once

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = {"rounds": arguments.rounds, "photos": arguments.photos}
    given = {name: value for name, value in options.items() if value is not None}
    result = importlib.import_module(f"massl_ray.benches.{arguments.name}").run(device, **given)
    if arguments.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:<24}{value:.4g}" if isinstance(value, float) else f"{key:<24}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
