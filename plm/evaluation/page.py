"""A report as sections, which become Markdown or one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TableRow(NamedTuple):
    """Cells of a row, the first of which names it, and what sort of row it is: a CSS class of the page."""

    cells: Sequence[str]
    kind: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with a table, a list of sentences or a picture below it."""

    title: str
    heads: Sequence[str] = ()
    rows: Sequence[TableRow] = ()
    is_text: bool = False
    """Whether the cells are sentences rather than numbers."""
    lines: Sequence[str] = ()
    picture: bytes = b""
    """A PNG."""


def html_page(title: str, sections: Iterable[Section]) -> str:
    """The report as one HTML page; whatever it shows is escaped."""
    from jinja2 import Environment, StrictUndefined  # only when a page is written

    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    template = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(title=title, sections=list(sections))


def markdown_table(heads: Sequence[str], rows: Iterable[TableRow]) -> list[str]:
    """Lines of a Markdown table; bars and line ends in its cells do not end them."""
    lines = [heads, ["---"] * len(heads), *(row.cells for row in rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |" for cells in lines]


def png(figure: Figure) -> bytes:
    """A picture's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
