"""massl-ray export CHECKPOINT DEST: the backbone of a checkpoint in a form that other programs load in one line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from massl_ray.errors import UserError
from massl_ray.shown import in_a_line, redacted

FORMATS = ("timm", "safetensors", "onnx", "huggingface")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 what was written computes something else, 2 a mistake in what was asked for."""
    parser = argparse.ArgumentParser(
        prog="massl-ray export",
        description="Write the backbone of a checkpoint in a form that other programs load in one line, with a model card. "
        "It is loaded back and compared before it gets its name.",
    )
    parser.add_argument("checkpoint", help="a step_N folder, or a run directory, whose latest is taken; a path or a URI")
    parser.add_argument("dest", help="a folder for timm and huggingface, else a file; on this disk, not there yet")
    parser.add_argument("--format", required=True, choices=FORMATS, help="timm and huggingface: folders that both read")
    parser.add_argument("--branch", choices=("teacher", "student"), default="teacher", help="of the two networks [teacher]")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="load it back and compare [yes]")
    arguments = parser.parse_args(argv)
    from massl_ray.exporting.formats import Differs  # late: torch takes seconds to import

    try:
        return export(arguments)
    except Differs as error:
        print(f"massl-ray: {error} Nothing was written.", file=sys.stderr)
        return 1
    except OSError as error:
        print(in_a_line(redacted(f"massl-ray: {arguments.checkpoint} cannot be read: {error}.")), file=sys.stderr)
        return 2
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2


def export(arguments: argparse.Namespace) -> int:
    from massl_ray.exporting.backbone import read_backbone
    from massl_ray.exporting.card import evaluations
    from massl_ray.exporting.formats import card_path, check_dest, loading, write
    from massl_ray.inspect import find_checkpoint

    if "://" in arguments.dest:
        raise UserError(f"DEST {redacted(arguments.dest)} must be on this machine's disk. Export there, then copy it.")
    dest = Path(arguments.dest).expanduser()
    check_dest(dest, arguments.format)
    checkpoint = find_checkpoint(arguments.checkpoint)
    exported = read_backbone(checkpoint, arguments.branch)
    difference = write(exported, dest, arguments.format, evaluations(checkpoint, exported.manifest), arguments.check)
    print(f"Backbone  {arguments.branch} of {checkpoint}: {exported.name}, {exported.features} features")
    print(f"Written   {dest}, card {card_path(dest, arguments.format)}")
    if difference is not None:
        print(f"Checked   loaded back; features of two images differ by at most {difference:.1g}")
    print(f"Load      {loading(exported, str(dest), arguments.format)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
