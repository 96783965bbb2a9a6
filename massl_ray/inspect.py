"""massl-ray inspect CHECKPOINT: say what a checkpoint holds, and whether it is whole."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from massl_ray.errors import UserError
from massl_ray.shown import in_a_line, redacted
from massl_ray.storage import Folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="massl-ray inspect", description="Say what a checkpoint holds, and whether it is whole.")
    parser.add_argument("checkpoint", help="a step_N folder, or a run directory, whose latest is taken; a path or a URI")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    arguments = parser.parse_args(argv)
    from massl_ray.training.checkpoint import Damaged, read_checkpoint  # late: torch takes seconds to import

    try:
        checkpoint = find_checkpoint(arguments.checkpoint)
        tensors, manifest = read_checkpoint(checkpoint)
    except Damaged as error:
        print(in_a_line(f"massl-ray: The checkpoint is damaged: {error}."), file=sys.stderr)
        return 1
    except OSError as error:
        print(in_a_line(redacted(f"massl-ray: {arguments.checkpoint} cannot be read: {error}.")), file=sys.stderr)
        return 2
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2
    print(json.dumps(manifest | {"verified": True}, indent=2) if arguments.json else describe(str(checkpoint), tensors, manifest))
    return 0


def find_checkpoint(where: str) -> Folder:
    """The folder itself, or the latest checkpoint in it or in its checkpoints/. Raises UserError where there is none."""
    from massl_ray.training.checkpoint import MANIFEST, STATE, list_checkpoints

    folder = Folder(where)
    if {MANIFEST, STATE} & set(folder.entries()):
        return folder
    found = list_checkpoints(folder) or list_checkpoints(folder / "checkpoints")
    if not found:
        raise UserError(f"There is no checkpoint at {folder}. Give a step_N folder, or a run directory that has one.")
    return found[-1]


def describe(name: str, tensors: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The manifest and the tensors in aligned lines: first what is one value, then what is several."""
    single = {key.replace("_", " "): value for key, value in manifest.items() if not isinstance(value, Mapping)}
    sections = {key: value for key, value in manifest.items() if isinstance(value, Mapping)}
    lines = [name, *_aligned({key: f"{value:,}" if type(value) is int else value for key, value in single.items()})]
    for key, values in (sections | {"tensors": _sizes(tensors)}).items():
        lines += ["", in_a_line(key), *_aligned(values)]
    return "\n".join([*lines, "", "The checkpoint is whole: its tensors have the state_sha256 of its manifest."])


def _aligned(values: Mapping[str, object]) -> list[str]:
    width = max(map(len, values), default=0)
    return [in_a_line(f"  {key:<{width}}  {value}") for key, value in values.items()]


def _sizes(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Number and size of the tensors of each part of the state, and of all."""
    parts: dict[str, list[int]] = defaultdict(list)
    for name, tensor in tensors.items():
        for part in (name.split("/")[0], "all"):
            parts[part].append(tensor.numel() * tensor.element_size())
    ordered = sorted(parts, key=lambda part: (part == "all", part))
    return {part: f"{len(parts[part]):>5}, {sum(parts[part]) / 1e6:,.2f} MB" for part in ordered}


if __name__ == "__main__":
    sys.exit(main())
