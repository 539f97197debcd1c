"""Fill the tables of ``docs/results.md`` from the leaderboards in ``docs/results/``: ``python docs/tables.py``.

A new table: copy the ``leaderboard.json`` of a run to ``docs/results/NAME.json``, write the two lines
``<!-- table: NAME -->`` and ``<!-- end -->`` into the page, and run the command.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plm.evaluation import difference, interval, points

PAGE = Path(__file__).with_name("results.md")
BOARDS = Path(__file__).with_name("results")
HEADS = (
    *("", "unseen users %", "seen users %", "personal − global", "personal − other", "vs BradleyTerry", "p"),
    *("shuffled users %", "another user %", "log-loss", "ECE", "worst decile %", "helped/harmed", "parameters"),
    *("fit s", "adapt ms/user"),
)
"""Columns; all but the second number are about unseen users."""
FACTS = {"parameters": ",.0f", "fit_seconds": ".1f", "adapt_ms": ".2f"}
"""What a row costs -> format of the number."""


def fill(page: str) -> str:
    """The page with every marked block made anew."""

    def block(match: re.Match[str]) -> str:
        board = json.loads((BOARDS / f"{match[1]}.json").read_text(encoding="utf-8"))
        return f"<!-- table: {match[1]} -->\n{tables(board)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def tables(board: Mapping[str, Any]) -> str:
    """Provenance, a table of methods and baselines, and the accuracy of unseen users by the number of their pairs."""
    rows = {row["name"]: row for row in board["rows"]}
    shown = [row for row in board["rows"] if row["kind"] != "control" and row["numbers"]]
    metadata, data = board["metadata"], board["data"]
    lines = [
        "```",
        metadata["command"],
        "```",
        "",
        f"{metadata['date']}, commit {metadata['commit']}, seeds: {metadata['seeds']}. "
        f"Split {data['split_hash'][:12]} by {data['group_by']}; {data['users_seen']:,} seen users with "
        f"{data['pairs_train']:,} training, {data['pairs_val']:,} validation and {data['pairs_test']:,} test pairs; "
        f"{data['users_unseen']:,} unseen users with {data['pairs_support']:,} support and {data['pairs_query']:,} "
        "query pairs.",
        "",
        *markdown_table(HEADS, [_cells(board, row, rows) for row in shown]),
    ]
    curves = [row for row in shown if row.get("few_shot")]
    shots = curves[0]["few_shot"]["shots"]
    heads = ["pairs per unseen user", *map(str, shots)]
    cells = [[row["name"], *(f"{100 * value:.1f}" for value in row["few_shot"]["accuracy"])] for row in curves]
    return "\n".join([*lines, "", *markdown_table(heads, cells)])


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _cells(board: Mapping[str, Any], row: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
    """Cells of a row; the accuracies of its two controls stand beside its own."""
    numbers, facts = row["numbers"]["unseen"], row["facts"]
    is_personal = row["kind"] == "method" and "users_helped" in numbers and facts.get("parameters_per_user") != 0
    versus, p_value = "–", "–"
    for test in board["versus_reference"]:
        if (test["group"], test["first"]) == ("unseen", row["name"]):
            versus = f"{points(test['difference'])} [{points(test['low'], '')}, {points(test['high'], '')}]"
            p_value = _p_value(test.get("p_holm"))
    controls = [rows.get(f"{row['name']}, {name}") for name in ("shuffled users", "another user")]
    return [
        row["name"],
        *(points(group["accuracy"], "") + interval(group, "accuracy") for group in (numbers, row["numbers"]["seen"])),
        *(difference(numbers, f"personal_minus_{name}") if is_personal else "–" for name in ("global", "other")),
        versus,
        p_value,
        *(points(control["numbers"]["unseen"]["accuracy"], "") if control else "–" for control in controls),
        *(f"{numbers[name]:.3f}" for name in ("log_loss", "ece")),
        points(numbers["accuracy_p10"], ""),
        f"{numbers['users_helped']:.0f}/{numbers['users_harmed']:.0f}" if is_personal else "–",
        *("–" if facts.get(name) is None else format(facts[name], form) for name, form in FACTS.items()),
    ]


def _p_value(value: float | str | None) -> str:
    """A p-value, or the bound that was printed in its place."""
    if value is None or isinstance(value, str):
        return value or "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
