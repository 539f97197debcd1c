"""Print reports in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from itertools import chain

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

_ROOM = 1000  # columns, more than any table needs


def print_parts(*parts: RenderableType, console: Console | None = None) -> None:
    """Print the parts of a report without cutting a number.

    Where the output is no terminal, a table is as wide as its cells need. In a terminal its cells are broken at spaces
    to fit, and where that does not help, its columns follow in several tables with the first column in each. Sentences
    are left to the terminal to break.

    Args:
        *parts: Tables and strings, printed as they are: brackets in them are no markup.
        console: Where to; default: standard output.
    """
    console = console or Console(force_jupyter=False)  # a notebook shows every part of HTML by itself
    width = console.width
    for part in chain.from_iterable(_fitting(part, console) for part in parts):
        if not isinstance(part, str):
            measured = _measured(part, console)
            console.width = max(width, measured.minimum if console.is_terminal else measured.maximum)
        console.print(part, highlight=False, soft_wrap=isinstance(part, str), markup=False)
        console.width = width


def _measured(part: RenderableType, console: Console) -> Measurement:
    """The fewest and most characters that lines of a part need."""
    return Measurement.get(console, console.options.update(max_width=_ROOM), part)


def _fitting(part: RenderableType, console: Console) -> Iterator[RenderableType]:
    """A part itself, or the tables that a table has to be in a terminal that is too narrow for it."""
    if not (
        console.is_terminal
        and isinstance(part, Table)
        and len(part.columns) > 1
        and _measured(part, console).minimum > console.width
    ):
        yield part
        return
    start, title = 1, part.title
    while start < len(part.columns):
        stop = start + 1
        while stop < len(part.columns) and _measured(_of(part, start, stop + 1), console).maximum <= console.width:
            stop += 1
        narrow = _of(part, start, stop)
        narrow.title, title = title, None
        narrow.caption = part.caption if stop == len(part.columns) else None
        yield narrow
        start = stop


def _of(table: Table, start: int, stop: int) -> Table:
    """The first column of a table and some of the others."""
    part = copy(table)
    columns = [table.columns[0], *table.columns[start:stop]]
    part.columns = [replace(column, _index=index) for index, column in enumerate(columns)]
    return part
