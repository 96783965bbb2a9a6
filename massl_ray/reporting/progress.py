"""A progress bar for work that is counted in images; lines where there is no terminal."""

import sys
import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

PLAIN_S = 10.0  # between lines where there is no terminal


def counted(amounts: Iterable[int], total: int) -> Iterator[int]:
    """Hand on amounts of images that are done as they come, and show on standard error how many of `total` that makes."""
    console = Console(file=sys.stderr)
    done, printed = 0, time.monotonic()
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        for amount in amounts:
            done += amount
            progress.update(task, completed=done)
            if not console.is_terminal and time.monotonic() - printed > PLAIN_S:
                printed = time.monotonic()
                print(f"{done:,} of {total:,} images", file=sys.stderr)
            yield amount
