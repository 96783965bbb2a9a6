"""massl-ray embed WHAT SOURCE DEST: the embeddings of any number of images, as Parquet."""

import argparse
import signal
import sys
from collections.abc import Sequence

from massl_ray.config import DataSection, read_flags
from massl_ray.errors import UserError
from massl_ray.shown import redacted

KEYS = ("cache_gb", "max_pixels", "max_skipped", "white", "channels")
"""Of section data: the others are the backbone's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a mistake in what was asked for, 130 ended by Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="massl-ray embed",
        description="Write what a backbone makes of images into files of Parquet: path, label if there are any, and vector, in the "
        "order of the source. Run the same command again to continue after it was ended.",
        epilog=f"And of the settings of training: {', '.join(f'--data.{key}' for key in KEYS)}.",
        allow_abbrev=False,
    )
    parser.add_argument("what", help="a run, a checkpoint, an exported file or folder, a timm model, untrained:NAME, pixels")
    parser.add_argument("source", help="what --data.source takes")
    parser.add_argument("dest", help="folder of the Parquet files, a path or URI")
    parser.add_argument("--tokens", choices=("pooled", "class", "patch"), default="pooled", help="what of the backbone [pooled]")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the vectors [float32]")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images that go through the backbone together [64]")
    parser.add_argument("--backbone", metavar="NAME", help="timm name, for weights files that do not say theirs")
    parser.add_argument("--size", type=int, metavar="PX", help="side of the view, instead of what the backbone was made for")
    arguments, rest = parser.parse_known_args(argv)
    if not 1 <= arguments.batch <= 4096 or (arguments.size or 8) < 8:
        parser.error("--batch must be from 1 to 4096, --size at least 8")
    try:
        return embed(arguments, read_data(rest))
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Run the same command again to continue.", file=sys.stderr)
        return 128 + signal.SIGINT


def read_data(flags: Sequence[str]) -> DataSection:
    """Raises UserError for settings that are none, or that are the backbone's."""
    from massl_ray.config import validate

    values = read_flags(flags)
    wrong = [f"{section}.{key}" for section, given in values.items() for key in given if section != "data" or key not in KEYS]
    if wrong:
        raise UserError(f"embed takes no --{wrong[0]}: of the settings of training it takes data.{', data.'.join(KEYS)}.")
    return validate(values).data


def embed(arguments: argparse.Namespace, data: DataSection) -> int:
    from massl_ray.config import validate
    from massl_ray.data.decode import Decoding
    from massl_ray.data.sources import open_source, probe  # late: --help is answered at once
    from massl_ray.evaluation.embedding import SKIPPED, begin, finish, plan_embedding
    from massl_ray.evaluation.subjects import open_subject
    from massl_ray.reporting.progress import counted
    from massl_ray.storage import Folder, reason
    from massl_ray.training.lock import hold

    config = validate({"data": {"channels": data.channels}})
    subject = open_subject(arguments.what, backbone=arguments.backbone, size=arguments.size, config=config)
    images = open_source(arguments.source, cache_gb=data.cache_gb)
    how = Decoding(data.max_pixels, subject.channels, data.white)
    probe(images, data.max_skipped, how)
    plan = plan_embedding(subject, images, how, arguments.tokens, arguments.dtype, arguments.batch)
    folder = Folder(arguments.dest)
    try:
        if not begin(folder, plan) and folder.kind(SKIPPED):
            print(f"All embeddings of {images.root} are in {folder} already.")
            return 0
        from massl_ray.on_ray.cluster import cluster
        from massl_ray.on_ray.embed import embed_parts

        with hold(folder), cluster():
            for _ in counted(embed_parts(subject, images, folder, plan, begin(folder, plan)), plan.count):
                pass
            skipped = finish(folder, plan)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({reason(error)}). Mend it, then run the same command again, or choose another folder."
        ) from None
    shape = " x ".join(map(str, plan.shape))
    print(f"Vectors   {plan.count - len(skipped):,} of {shape} {plan.dtype}, {plan.tokens}, by {subject.name}")
    if skipped:
        print(f"Skipped   {len(skipped):,}, listed in {redacted(str(folder / SKIPPED))}")
    print(f"Written   {plan.parts:,} parts in {folder}; read them with pandas.read_parquet({redacted(arguments.dest)!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
