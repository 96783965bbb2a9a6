"""Evaluations on the console: a table a data set."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from massl_ray.evaluation.records import tables
from massl_ray.shown import in_a_line


def print_tables(records: Sequence[Mapping[str, Any]]) -> None:
    """A line a figure, a column a subject; as wide as it has to be where there is no terminal."""
    terminal = Console(highlight=False)
    for name, lines in tables(records).items():
        needed = sum(max(len(line[column]) for line in lines) + 2 for column in range(len(lines[0])))
        console = terminal if terminal.is_terminal else Console(highlight=False, width=max(terminal.width, needed))
        table = Table(title=Text(in_a_line(name)), title_justify="left", box=None, pad_edge=False)
        for column, head in enumerate(lines[0]):
            table.add_column(Text(in_a_line(head)), no_wrap=column < 2)
        for above, line in zip(lines, lines[1:], strict=False):
            first = line[0] if line[0] != above[0] else ""
            table.add_row(*(Text(in_a_line(cell)) for cell in (first, *line[1:])))  # no markup: names may have brackets
        console.print(table)
