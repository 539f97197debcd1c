"""Reports in the terminal."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.measure import Measurement

_ROOM = 1000  # columns, more than any table asks for


def print_parts(*parts: RenderableType, console: Console | None = None) -> None:
    """Print the parts of a report, none of whose numbers is cut.

    A table is as wide as its cells ask where the output is no terminal. In a terminal its cells are broken at spaces to
    fit, and where that does not help its lines run on. Sentences are left to the terminal to break.

    Args:
        *parts: Tables and strings, printed as they are: brackets in them are no markup.
        console: Where to; default: standard output.
    """
    console = console or Console()
    width = console.width
    for part in parts:
        if not isinstance(part, str):
            asked = Measurement.get(console, console.options.update(max_width=_ROOM), part)
            console.width = max(width, asked.minimum if console.is_terminal else asked.maximum)
        console.print(part, highlight=False, soft_wrap=isinstance(part, str), markup=False)
        console.width = width
