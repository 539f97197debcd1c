"""A report as sections, which become Markdown, LaTeX or one HTML page that needs nothing else, and its files."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from plm.atomic import whole_file, write_csv, write_text
from plm.messages import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LATEX = {
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"},
    **{"−": "$-$", "–": "--", "…": r"\ldots{}", "×": r"$\times$", "±": r"$\pm$", "|": r"\textbar{}"},
    **{"[": "{[}", "*": "{*}"},  # options of the command that ends a line
}
_FIGURE_KINDS = ("png", "pdf", "svg")


class TableRow(NamedTuple):
    """Cells of a row, the first of which names it, and what sort of row it is: a CSS class of the page."""

    cells: Sequence[str]
    kind: str = ""


class Link(str):
    """A text that leads somewhere on the HTML page, and is a plain text elsewhere.

    Args:
        text: What is shown.
        href: Where it leads, in the characters of a URL.
    """

    href: str

    def __new__(cls, text: str, href: str) -> Link:
        """A string with a target."""
        link = super().__new__(cls, text)
        link.href = href
        return link


@dataclass(frozen=True)
class Section:
    """A heading with a table, a list of sentences or pictures below it."""

    title: str
    heads: Sequence[str] = ()
    rows: Sequence[TableRow] = ()
    is_text: bool = False
    """Whether the cells are sentences rather than numbers."""
    lines: Sequence[str] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """What a picture shows -> its PNG."""
    is_sortable: bool = False
    """Whether a click on a head of the HTML page sorts the table by that column."""
    is_folded: bool = False
    """Whether the HTML page shows the heading alone until it is clicked."""


def html_page(title: str, sections: Iterable[Section]) -> str:
    """The report as one HTML page; whatever it shows is escaped."""
    return _html(title=title, sections=list(sections), is_part=False)


def html_part(sections: Iterable[Section]) -> str:
    """The sections as a part of somebody else's page, such as a notebook; whatever they show is escaped."""
    return _html(sections=list(sections), is_part=True)


def _html(**shown: Any) -> str:
    """The template, filled in."""
    from jinja2 import Environment, StrictUndefined  # only when a page is written

    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    template = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(**shown).lstrip()


def markdown_table(heads: Sequence[str], rows: Iterable[TableRow]) -> list[str]:
    """Lines of a Markdown table; bars and line ends in its cells do not end them."""
    lines = [heads, ["---"] * len(heads), *(row.cells for row in rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |" for cells in lines]


def latex_tables(sections: Iterable[Section]) -> str:
    """The tables of the sections in the style of booktabs; whatever they show is escaped."""
    blocks = ["% \\usepackage{booktabs}\n"]
    for section in sections:
        if section.rows:
            rows = [section.heads, *(row.cells for row in section.rows)]
            lines = [" & ".join(map(latex_text, cells)) + r" \\" for cells in rows]
            body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
            shape = ("l" if section.is_text else "r") * (len(section.heads) - 1)
            caption = f"\\caption{{{latex_text(section.title)}}}\n" if section.title else ""
            tabular = f"\\begin{{tabular}}{{l{shape}}}\n{body}\n\\end{{tabular}}\n"
            blocks.append(f"\\begin{{table}}\n\\centering\n{caption}{tabular}\\end{{table}}\n")
    return "\n".join(blocks)


def latex_text(text: str) -> str:
    r"""Text as LaTeX shows it; nothing in it is a command.

    >>> print(latex_text(r"50 % of a_b: -1.5 [\x]"))
    50 \% of a\_b: $-$1.5 {[}\textbackslash{}x]
    """
    escaped = "".join(_LATEX.get(mark, mark) for mark in plain(" ".join(text.split())))
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)


def png(figure: Figure) -> bytes:
    """A picture's bytes."""
    return _drawn(figure, "png")


def _drawn(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def write_figures(folder: Path, figures: Mapping[str, Figure]) -> tuple[dict[str, bytes], list[Path]]:
    """Write every figure as PNG, PDF and SVG; returns title -> PNG, as a `Section` shows it, and the paths."""
    drawn = {title: {kind: _drawn(figure, kind) for kind in _FIGURE_KINDS} for title, figure in figures.items()}
    files = []
    for title, contents in drawn.items():
        name = "_".join(re.sub(r"[^\w.-]+", " ", title.lower()).split())
        for kind, content in contents.items():
            files.append(folder / f"{name}.{kind}")
            with whole_file(files[-1]) as file:
                file.write(content)
    return {title: contents["png"] for title, contents in drawn.items()}, files


def write_report(
    folder: Path,
    name: str,
    title: str,
    sections: Sequence[Section],
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
) -> list[Path]:
    """Write a report as ``name.html``, its tables as ``name.tex`` and its numbers as ``name.csv``; returns the paths.

    Args:
        folder: Where to.
        name: Name of the files.
        title: Head of the page.
        sections: What the page shows.
        columns: Names of the numbers.
        rows: Numbers and texts; no text becomes a formula where a spreadsheet opens the file.
    """
    write_text(folder / f"{name}.html", html_page(title, sections))
    write_text(folder / f"{name}.tex", latex_tables(sections))
    write_csv(folder / f"{name}.csv", columns, [[_no_formula(value) for value in row] for row in rows])
    return [folder / f"{name}.{kind}" for kind in ("html", "tex", "csv")]


def _no_formula(value: Any) -> Any:
    """A cell; a text that a spreadsheet would compute gets an apostrophe, which it reads as the mark of a text."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@")) else value
