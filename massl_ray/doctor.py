"""massl-ray doctor: look at everything a run needs before it starts, and before money is spent."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from massl_ray.config import Config, OwnFlags, load
from massl_ray.errors import UserError

if TYPE_CHECKING:
    from massl_ray.checkup.everything import Checkup

HELP = """usage: massl-ray doctor [--cluster FILE] [--measure] [--json] [--section.key VALUE ...]

Look at what a run needs: this machine, run.dir, every image, the model, the settings; and with --cluster at the machines that a
file of Ray's launcher or of KubeRay asks for. Takes all settings of massl-ray train. Starts nothing, and leaves nothing behind.

  --cluster FILE  the cluster that the run is for; without one this machine
  --measure       build the model here and take one micro-batch: seconds a step, memory
  --json          for programs

Exit code 0: training would run; 1: something would fail; 2: a mistake in what was asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(HELP)
        return 0
    try:
        return examine(*read_arguments(arguments))
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def read_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The command's own flags, and the configuration. Raises UserError."""
    own = OwnFlags("massl-ray doctor")
    own.add_argument("--cluster", type=Path)
    own.add_argument("--measure", action="store_true")
    own.add_argument("--json", action="store_true")
    given, settings = own.read(arguments)
    return given, load(settings, "massl-ray doctor")


def examine(given: argparse.Namespace, config: Config) -> int:
    from massl_ray.checkup.everything import check_everything  # late: a wrong flag is answered at once
    from massl_ray.planning.cluster_file import read_cluster
    from massl_ray.planning.here import this_machine

    cluster = read_cluster(given.cluster) if given.cluster else this_machine()
    found = check_everything(config, cluster, date.today(), given.measure)
    print(json.dumps(to_json(found), indent=2) if given.json else describe(found))
    return 1 if found.fails else 0


def to_json(found: "Checkup") -> dict[str, Any]:
    return {
        "findings": [asdict(finding) for finding in found.findings],
        "images": asdict(found.images) if found.images else None,
        "fails": found.fails,
    }


def describe(found: "Checkup") -> str:
    """What the images are, then a line a finding, the worst last."""
    from massl_ray.data.examine import describe as describe_images

    width = max(len(finding.check) for finding in found.findings)
    lines = [describe_images(found.images), ""] if found.images else []
    for finding in found.findings:
        remedy = f" {finding.remedy}" if finding.remedy else ""
        lines.append(f"{finding.severity:<8} {finding.check:<{width}}  {finding.sentence}{remedy}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
