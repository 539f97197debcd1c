"""The findings of ``plm judge`` as terminal tables, Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from plm.atomic import write_json, write_text
from plm.evaluation import plain_table, print_parts

_TITLE = "Value of each policy's texts less that of the unaligned policy's, 95% intervals over prompts"
_NOTE = (
    "Own values are bold. Own − others: the difference by the user's own values less the mean of the differences by "
    "everybody else's. Own − population: by the user's own values, over the policy of an unknown user."
)


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print both tables and the samples."""
    for title, names, rows in tables(result):
        table = plain_table(title)
        for name in names:
            table.add_column(name, justify="left" if name == names[0] else "right")
        for row in rows:
            table.add_row(*(Text(cell[2:-2], style="bold") if cell.startswith("**") else cell for cell in row))
        print_parts(table, console=console)
    for entry in result["samples"]:
        console.print(f"[bold]{escape(entry['prompt'])}[/]", highlight=False)
        for name, text in entry.items():
            if name != "prompt":
                console.print(f"  [dim]{escape(name)}[/] {escape(' '.join(text.split()))}", highlight=False)


def write(result: Mapping[str, Any], folder: Path) -> None:
    """Write ``judge.md`` and ``judge.json``."""
    write_json(folder / "judge.json", result)
    write_text(folder / "judge.md", markdown(result))


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Lay out both tables as (heading, column names, rows); own values are between ``**``."""
    people = list(result["unaligned"])
    columns = {"own_minus_others": "own − others", "own_minus_population": "own − population"}
    columns = {name: head for name, head in columns.items() if any(name in entry for entry in result["users"].values())}
    rows = []
    for user, entry in {"population": result["population"], **result["users"]}.items():
        cells = [_difference(entry["people"][person], "difference") for person in people]
        cells = [f"**{cell}**" if person == user else cell for person, cell in zip(people, cells, strict=True)]
        cells += [_difference(entry, name) if name in entry else "–" for name in columns]
        rows.append([user, *cells])
    heads = ["policy of", *(f"to {person}" for person in people), *columns.values()]
    rewards = list(next(iter(result["texts"].values()))["rewards"])
    text_rows = [
        [name, *(f"{facts['rewards'][reward]:.3f}" for reward in rewards)]
        + ["–" if math.isnan(facts["perplexity"]) else f"{facts['perplexity']:.1f}", f"{facts['words']:.1f}"]
        + ["–" if math.isnan(facts[key]) else f"{facts[key]:.3f}" for key in ("distinct_1", "distinct_2")]
        for name, facts in result["texts"].items()
    ]
    names = ["policy of", *rewards, "perplexity", "words", "distinct 1", "distinct 2"]
    return [
        (_TITLE, heads, rows),
        ("Texts: mean rewards as they come, perplexity by the unaligned policy", names, text_rows),
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """Write the report as Markdown."""

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    drawn = ", ".join(f"{name} {value}" for name, value in result["settings"].items() if value is not None)
    lines = [
        f"{result['num_prompts']} held-out prompts, {result['num_samples']} texts of each policy on each ({drawn}).",
        _NOTE,
    ]
    for heading, names, rows in tables(result):
        lines += ["", f"## {heading}", "", f"| {' | '.join(map(cell, names))} |"]
        lines += ["|---" + "|---:" * (len(names) - 1) + "|", *(f"| {' | '.join(map(cell, row))} |" for row in rows)]
    lines += ["", "## Samples"]
    for entry in result["samples"]:
        lines += ["", f"**{cell(entry['prompt'])}**", ""]
        lines += [f"- {name}: {cell(text)}" for name, text in entry.items() if name != "prompt"]
    return "\n".join(["# Judged policies", "", *lines, ""])


def _difference(numbers: Mapping[str, float], name: str) -> str:
    """``+0.53 [0.41, 0.66]``."""
    low, high = numbers[f"{name}_low"], numbers[f"{name}_high"]
    ends = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
    return f"{numbers[name]:+.2f}{ends}"
