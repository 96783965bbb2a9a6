"""massl-ray prepare SOURCE DEST: any source of images into shards that are read fast, from disk or object storage."""

import argparse
import signal
import sys
from collections.abc import Sequence

from massl_ray.config import DataSection
from massl_ray.errors import UserError
from massl_ray.shown import redacted


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a mistake in what was asked for, 130 ended by Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="massl-ray prepare",
        description="Write any source of images into shards that are read fast, from disk or object storage. "
        "Run the same command again to continue after it was ended.",
    )
    parser.add_argument("source", help="what --data.source takes, at a path or URI")
    parser.add_argument("dest", help="folder of the shards, a path or URI; then a --data.source itself")
    parser.add_argument("--max-side", type=int, metavar="PX", help="shrink images with a longer side, and encode them anew")
    usual = DataSection()
    for flag, default, letter, words in (
        ("--shard-mb", 64, "MB", "size of a shard, about"),
        ("--max-pixels", usual.max_pixels, "N", "images of more count as unreadable"),
        ("--channels", usual.channels, "C", "as data.channels: 1 gray, 3 colour, others as they are"),
        ("--white", usual.white, "LEVEL", "as data.white: of more than 8 bits, what becomes 255"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar=letter, help=f"{words} [{default}]")
    parser.add_argument("--max-skipped", type=float, default=0.05, metavar="SHARE", help="share that may be unreadable [0.05]")
    arguments = parser.parse_args(argv)
    positive = (arguments.max_side or 1, arguments.max_pixels, arguments.channels, arguments.white)
    if min(positive) < 1 or not 1 <= arguments.shard_mb <= 4096:
        parser.error("--max-side, --max-pixels, --channels and --white must be positive, --shard-mb from 1 to 4096")
    try:
        return prepare(arguments)
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Run the same command again to continue.", file=sys.stderr)
        return 128 + signal.SIGINT


def prepare(arguments: argparse.Namespace) -> int:
    from massl_ray.data.decode import Decoding
    from massl_ray.data.examine import describe
    from massl_ray.data.preparing import begin, finish
    from massl_ray.data.sources import open_source, probe  # late: --help is answered at once
    from massl_ray.reporting.progress import counted
    from massl_ray.storage import Folder, reason
    from massl_ray.training.lock import hold

    images = open_source(arguments.source)
    how = Decoding(arguments.max_pixels, arguments.channels, arguments.white)
    probe(images, arguments.max_skipped, how)
    folder = Folder(arguments.dest)
    try:
        plan = begin(images, folder, arguments.max_side, arguments.shard_mb, how)
        if plan is None:
            print(f"All images of {images.root} are in {folder} already.")
            return 0
        from massl_ray.on_ray.cluster import cluster
        from massl_ray.on_ray.prepare import do_parts

        with hold(folder), cluster():
            for _ in counted(do_parts(images, folder, plan), plan.count):
                pass
            found = finish(images, folder, plan)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({reason(error)}). Mend it, then run the same command again, or choose another folder."
        ) from None
    print(describe(found))
    flags = f"--data.source {redacted(arguments.dest)}"
    for key in ("channels", "white"):
        value = getattr(how, key)
        flags += f" --data.{key} {value}" if value != getattr(Decoding(), key) else ""
    print(f"Shards    {plan.parts:,} in {folder}; train on them with {flags}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
