"""The small files of a run whose directory is at a URI: kept in a folder of this machine, copied there and back."""

import math
import time
from pathlib import Path

from massl_ray.storage import Folder, Place


class Mirror:
    """Keeps `remote` like `local`, but for checkpoints/ and names with a leading dot, which are never copied.

    Args:
        local: folder of this machine.
        remote: folder anywhere.
    """

    def __init__(self, local: Path, remote: Place):
        self.local, self.remote = Folder(local), Folder(remote)
        self.pushed_at = -math.inf
        self.pushed: dict[str, tuple[int, int]] = {}  # name: size in bytes and time of change in ns, as they were copied

    def pull(self) -> None:
        """Copy what is missing here. Raises OSError where the storage fails."""
        for name in filter(_is_mirrored, self.remote.files()):
            path = self.local.path / name
            if not path.exists():
                self.remote.download(name, path)
                self.pushed[name] = _stamp(path)

    def push(self, at_most_every_s: float = 0.0) -> bool:
        """Copy every file that changed since it was last copied. False where the storage fails; the rest is for the next time."""
        if time.monotonic() - self.pushed_at < at_most_every_s:
            return True
        self.pushed_at = time.monotonic()
        for name in filter(_is_mirrored, self.local.files()):
            path = self.local.path / name
            try:
                stamp = _stamp(path)  # before the copy: what is added meanwhile makes another change
                if self.pushed.get(name) != stamp:
                    self.remote.upload(path, name)
                    self.pushed[name] = stamp
            except OSError:
                if path.exists():  # else it was renamed or deleted since it was listed
                    return False
        return True


def _is_mirrored(name: str) -> bool:
    first, *_ = parts = name.split("/")
    return first != "checkpoints" and not any(part.startswith(".") for part in parts)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
