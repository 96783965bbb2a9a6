"""What a full disk does to the files of a run: they are written later."""

from collections import deque
from collections.abc import Callable
from typing import Any

from massl_ray.storage import reason


class Patient:
    """Hands events on in order. Those that cannot be written down wait until they can, but for mere progress.

    Args:
        follow: takes an event; raises OSError, having written nothing, where the disk takes no more.
        note: takes a sentence for the user.
    """

    def __init__(self, follow: Callable[[dict[str, Any]], None], note: Callable[[str], None]):
        self.follow, self.note = follow, note
        self.waiting: deque[dict[str, Any]] = deque()
        self.error = ""  # that keeps them waiting

    def __call__(self, event: dict[str, Any]) -> None:
        if not (self.waiting and event["kind"] == "progress"):
            self.waiting.append(event)
        self.flush()

    def flush(self) -> bool:
        """Try again. Returns whether everything is written."""
        while self.waiting:
            try:
                self.follow(self.waiting[0])
            except BrokenPipeError:  # nobody reads our output: no disk
                raise
            except OSError as error:
                if not self.error:
                    self.error = reason(error)
                    self.note(f"The files of the run cannot be written: {self.error}. Training goes on; they come later.")
                return False
            self.waiting.popleft()
        if self.error:
            self.error = ""
            self.note("The files of the run can be written again; nothing is missing.")
        return True
