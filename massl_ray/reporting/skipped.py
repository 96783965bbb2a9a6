"""skipped.jsonl: the images that could not be read, each named once."""

import json
from collections.abc import Iterable
from pathlib import Path


class SkippedImages:
    """The list in a run directory; what an earlier start of the run wrote is kept."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / "skipped.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known = {json.loads(line)["image"] for line in lines}

    def __len__(self) -> int:
        return len(self.known)

    def add(self, images: Iterable[str]) -> list[str]:
        """Append those not yet listed ("path: reason"), and return them."""
        new = sorted(set(images) - self.known)
        self.known.update(new)
        if new:
            with self.path.open("a") as file:
                file.writelines(json.dumps({"image": image}) + "\n" for image in new)
        return new
