"""massl-ray plan: how long a run takes on a cluster, what it costs, and whether it fits, before there is a cluster."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from massl_ray.config import Config, OwnFlags, load
from massl_ray.errors import UserError

HELP = """usage: massl-ray plan [--cluster FILE] [--images N] [--rate IMAGES_PER_S] [--json] [--section.key VALUE ...]

Say for each number of workers how fast a run is, how long it takes, what it costs and whether it fits. Nothing starts.

  --cluster FILE       cluster file of Ray's launcher or of KubeRay (cluster/ has some); without one this machine is planned for
  --images N           size of the data set; data.source is not looked at then
  --rate IMAGES_PER_S  of one worker, where you have measured it; otherwise it is estimated
  --json               for programs

Takes all settings of massl-ray train. Exit code 0: there is a plan; 1: the model fits on none of the machines; 2: a mistake."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(HELP)
        return 0
    try:
        return show(*read_arguments(arguments))
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def read_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The command's own flags, and the configuration. Raises UserError."""
    own = OwnFlags("massl-ray plan")
    own.add_argument("--cluster", type=Path)
    own.add_argument("--images", type=int)
    own.add_argument("--rate", type=float)
    own.add_argument("--json", action="store_true")
    given, settings = own.read(arguments)
    if given.images is not None and given.images < 2:
        raise UserError(f"--images is {given.images}; training needs at least 2.")
    if given.rate is not None and not 0 < given.rate < float("inf"):
        raise UserError(f"--rate is {given.rate:g}; give the images that one worker takes in a second, more than 0.")
    return given, load(settings, "massl-ray plan")


def show(given: argparse.Namespace, config: Config) -> int:
    from massl_ray.method.network import check_backbone
    from massl_ray.planning.cluster_file import read_cluster
    from massl_ray.planning.here import this_machine
    from massl_ray.planning.plan import plan
    from massl_ray.planning.words import describe, to_json  # late: a wrong flag is answered at once

    cluster = read_cluster(given.cluster) if given.cluster else this_machine()
    check_backbone(config)
    images = given.images or _count(config)
    made = plan(config, images, cluster, given.rate)
    if given.json:
        print(json.dumps(to_json(made), indent=2))
    else:
        print(describe(made, config))
        if not given.images:
            print(f"Planned on the {images:,} images of data.source '{config.data.source}'; --images N plans for another number.")
    return 0 if made.cheapest else 1


def _count(config: Config) -> int:
    from massl_ray.data.sources import open_source

    return len(open_source(config.data.source, cache_gb=config.data.cache_gb))


if __name__ == "__main__":
    sys.exit(main())
