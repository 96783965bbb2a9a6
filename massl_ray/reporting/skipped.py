"""skipped.jsonl: the images that could not be read, each named once."""

import json
from collections.abc import Iterable
from pathlib import Path

from massl_ray.training.run import append_lines, write_atomically


class SkippedImages:
    """The list in a run directory; what an earlier start of the run wrote is kept."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / "skipped.jsonl"
        text = self.path.read_text() if self.path.exists() else ""
        whole, newline, cut_short = text.rpartition("\n")
        if cut_short:  # by a crash; what is added next begins a line of its own
            write_atomically(self.path, whole + newline)
        self.known = {json.loads(line)["image"] for line in whole.splitlines()}

    def __len__(self) -> int:
        return len(self.known)

    def add(self, images: Iterable[str]) -> list[str]:
        """Append those not yet listed ("path: reason"), and return them."""
        new = sorted(set(images) - self.known)
        if new:
            append_lines(self.path, [{"image": image} for image in new])
        self.known.update(new)
        return new
