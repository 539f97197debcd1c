"""Print reports in the terminal."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.measure import Measurement

_ROOM = 1000  # columns, more than any table needs


def print_parts(*parts: RenderableType, console: Console | None = None) -> None:
    """Print the parts of a report without cutting a number.

    Where the output is no terminal, a table is as wide as its cells need. In a terminal its cells are broken at spaces
    to fit, and where that does not help, its lines run on. Sentences are left to the terminal to break.

    Args:
        *parts: Tables and strings, printed as they are: brackets in them are no markup.
        console: Where to; default: standard output.
    """
    console = console or Console(force_jupyter=False)  # a notebook shows every part of HTML by itself
    width = console.width
    for part in parts:
        if not isinstance(part, str):
            measured = Measurement.get(console, console.options.update(max_width=_ROOM), part)
            console.width = max(width, measured.minimum if console.is_terminal else measured.maximum)
        console.print(part, highlight=False, soft_wrap=isinstance(part, str), markup=False)
        console.width = width
