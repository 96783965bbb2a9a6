"""massl-ray doctor --data.source DIR: look at every image before training does."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from massl_ray.config import load
from massl_ray.errors import UserError

if TYPE_CHECKING:
    from massl_ray.data.examine import Report

HELP = """usage: massl-ray doctor --data.source SOURCE [--json] [--section.key VALUE ...]

Decode every image of a source, and say what is broken, tiny, of one colour or there twice. Takes all settings of massl-ray train.
Exit code 0: training would read it; 1: more than data.max_skipped cannot be read; 2: a mistake in what was asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(HELP)
        return 0
    try:
        return examine([argument for argument in arguments if argument != "--json"], "--json" in arguments)
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def examine(flags: Sequence[str], as_json: bool) -> int:
    config = load(flags, "massl-ray doctor")
    from massl_ray.data.decode import Decoding
    from massl_ray.data.examine import describe, look_at_all, report, to_table
    from massl_ray.data.sources import open_source  # late: a wrong flag is answered at once
    from massl_ray.reporting.progress import counted

    images = open_source(config.data.source, cache_gb=config.data.cache_gb)
    rows = []
    looks = look_at_all(images, os.cpu_count() or 1, Decoding.of(config.data))
    for _ in counted((rows.append(row) or 1 for row in looks), len(images)):
        pass
    found = report(images, to_table(rows))
    fault = why_training_stops(found, config.data.max_skipped)
    if as_json:
        print(json.dumps(asdict(found) | {"fails": fault is not None}, indent=2))
    else:
        print(describe(found))
        if fault:
            print(f"Training would stop: {fault}.")
    return 1 if fault else 0


def why_training_stops(found: "Report", max_skipped: float) -> str | None:
    if found.images < 2:
        return "it needs at least 2 images"
    if len(found.broken) > max_skipped * found.images:
        return f"{len(found.broken):,} of {found.images:,} images cannot be read, and data.max_skipped is {max_skipped:g}"
    return None


if __name__ == "__main__":
    sys.exit(main())
