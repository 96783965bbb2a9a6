"""massl-ray COMMAND ...: every command is also `python -m massl_ray.COMMAND`."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "pretrain a backbone on a folder of images",
    "sweep": "train at many settings, and say which to choose",
    "plan": "say what a run takes and costs on a cluster, before there is one",
    "doctor": "look at everything a run needs before it starts",
    "prepare": "write any source of images into shards that are read fast",
    "report": "write report.html anew from a run directory",
    "inspect": "say what a checkpoint holds, and whether it is whole",
    "evaluate": "measure what features are worth, beside others",
    "embed": "write the embeddings of any number of images",
    "export": "write a checkpoint's backbone for other programs",
    "visualize": "draw what features see: attention, patches, neighbours, a map",
    "compare": "put runs side by side",
    "bench": "measure ours beside a reference on this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("massl-ray COMMAND ...\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<10}{purpose}")
        print("\nmassl-ray COMMAND --help says more.")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"massl-ray: there is no command '{arguments[0]}'. Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return importlib.import_module(f"massl_ray.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
