"""A leaderboard as terminal table, Markdown, CSV, JSON and one HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from plm.atomic import write_json, write_text
from plm.evaluation import (
    Section,
    TableRow,
    difference,
    interval,
    markdown_table,
    p_value,
    plain_table,
    points,
    shot_units,
    write_figures,
    write_report,
)
from plm.leaderboard.results import GROUPS, BoardRow, Versus, all_pairs, ranked, verdicts, versus
from plm.messages import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUMBERS = (
    "num_users num_pairs accuracy accuracy_low accuracy_high accuracy_seed_sd accuracy_micro accuracy_p10 log_loss ece "
    "global_accuracy personal_minus_global personal_minus_global_low personal_minus_global_high personal_minus_other "
    "personal_minus_other_low personal_minus_other_high users_helped users_harmed"
).split()
_HEADS = (
    "kind|accuracy %|sd|micro %|log-loss|ECE|personal − global|personal − other|vs {reference}|p|worst decile %|"
    "helped/harmed|parameters|fit s|adapt ms/user"
).split("|")
_GAINS = ("personal_minus_global", "personal_minus_other")
_FACTS = ("shared_parameters", "parameters_per_user", "parameters", "fit_seconds", "adapt_ms")

NOTES = (
    "Accuracy is the mean over users of each user's share of right pairs, in per cent; a margin of zero counts one "
    "half. Brackets are 95 % intervals from resampling users. Seeds, and splits, are averaged per user before anything "
    "else, so intervals cover the choice of users; the spread of seeds or splits is the column sd.",
    "personal − global compares a user's own state with the population's state of the same method, personal − other "
    "with the state of a random other user, both in points. A method must win both to claim personalisation.",
    "vs is the paired difference to that row over the same users, in points; p is corrected by Holm over the "
    "methods of a table. Worst decile is the accuracy that a tenth of users stay at or below. Helped and harmed count "
    "users above and below their global control. Parameters count shared ones and those of all seen users.",
)
"""How to read the tables."""

_NOT_IN_TERMINAL = ("kind", "micro %", "sd")
"""Columns for which a terminal has no room."""


@dataclass(frozen=True)
class Leaderboard:
    """All rows on one split."""

    title: str
    all_rows: Sequence[BoardRow]
    reference: str
    """Name of the row that all others are compared with."""
    data: Mapping[str, Any]
    """Counts of the data and the hash of the split."""
    metadata: Mapping[str, Any]
    """Date, commit, version, command, seeds, candidates."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Row that is not there -> why."""

    @cached_property
    def rows(self) -> list[BoardRow]:
        """Rows in the order of the tables."""
        return ranked(self.all_rows)

    @cached_property
    def versus(self) -> list[Versus]:
        """Every row against the reference row."""
        return versus(self.rows, self.reference)

    @cached_property
    def pairs(self) -> list[Versus]:
        """Every method against every other."""
        return all_pairs(self.rows)

    @property
    def groups(self) -> list[str]:
        """Groups of users that some row has."""
        return [group for group in GROUPS if any(group in row.numbers for row in self.rows)]

    @property
    def verdicts(self) -> list[str]:
        """A sentence per method and group."""
        return [sentence for row in self.rows for sentence in verdicts(row)]

    @property
    def failures(self) -> list[str]:
        """A line per failed run."""
        return [f"{row.name}, seed {seed}: {error}" for row in self.rows for seed, error in row.errors.items()]

    @property
    def absences(self) -> list[str]:
        """A line per row that is left out."""
        return [f"{name}: {why}" for name, why in self.left_out.items()]

    def heads(self) -> list[str]:
        """Heads of the columns after the name."""
        return [head.format(reference=self.reference) for head in _HEADS]

    def cells(self, row: BoardRow, group: str) -> list[str]:
        """Text of the columns after the name."""
        numbers = row.numbers.get(group)
        if numbers is None:
            error = next(iter(row.errors.values()), f"no {group} users")
            return [row.kind, f"failed: {error}" if row.errors else f"– {error}", *["–"] * (len(self.heads()) - 2)]
        test = next((v for v in self.versus if v.group == group and v.first == row.name), None)
        is_compared = row.kind != "baseline" and row.is_personal
        return [
            row.kind,
            _points(numbers, "accuracy") + interval(numbers, "accuracy"),
            _points(numbers, "accuracy_seed_sd"),
            _points(numbers, "accuracy_micro"),
            _number(numbers.get("log_loss"), ".3f"),
            _number(numbers.get("ece"), ".3f"),
            *(difference(numbers, name) if is_compared and name in numbers else "–" for name in _GAINS),
            _gain(test) if test and not math.isnan(test.low) else "–",
            p_value(test.p_holm) if test else "–",
            _points(numbers, "accuracy_p10"),
            f"{numbers['users_helped']:.0f}/{numbers['users_harmed']:.0f}" if is_compared else "–",
            _number(row.facts.get("parameters"), ",.0f"),
            _number(row.facts.get("fit_seconds"), ".1f"),
            _number(row.facts.get("adapt_ms"), ".2f") if row.is_personal else "–",
        ]

    def caption(self, group: str) -> str:
        """What a table is about."""
        numbers = next(row.numbers[group] for row in self.rows if group in row.numbers)
        return (
            f"{self.title}: {counted(numbers['num_users'], f'{group} user')}, {counted(numbers['num_pairs'], 'pair')}"
        )

    def provenance(self) -> list[str]:
        """Where the numbers come from, a line each."""
        split = ", ".join(f"{key} {value}" for key, value in self.data.items() if key.startswith(("users", "pairs")))
        lines = [f"{key}: {value}" for key, value in self.metadata.items()]
        first = "first split" if int(str(self.metadata.get("splits", 1))) > 1 else "split"
        return [*lines, f"{first}: {str(self.data['split_hash'])[:12]} by {self.data['group_by']}; {split}"]


# ---------------------------------------------------------------------- formats
def tables(board: Leaderboard) -> list[Section]:
    """A table per group of users, then the few-shot curves: what every format shows."""
    heads = ["", *board.heads()]
    sections = [
        Section(
            board.caption(group),
            heads,
            [TableRow([row.name, *board.cells(row, group)], row.kind) for row in board.rows],
            is_sortable=True,
        )
        for group in board.groups
    ]
    curves = {row.name: row.few_shot for row in board.rows if row.few_shot}
    if curves:
        first = next(iter(curves.values()))
        units = shot_units(first)
        lines = [TableRow([name, *map(_per_cent, curve["accuracy"])]) for name, curve in curves.items()]
        title = f"Accuracy of unseen users in per cent, by how many of their {units} a method was given"
        sections.append(Section(title, [f"{units} per unseen user", *map(str, first["shots"])], lines))
    return sections


def lists(board: Leaderboard) -> list[Section]:
    """The sentences below the tables; those without any are left out."""
    tested = {group: [v for v in board.pairs if v.group == group and not math.isnan(v.low)] for group in board.groups}
    sections = {
        "Verdicts": board.verdicts,
        "Methods against each other, Holm-corrected over the pairs of a group": [
            f"{group} users: {'; '.join(map(_versus, tests))}" for group, tests in tested.items() if tests
        ],
        "Failed runs": board.failures,
        "Left out": board.absences,
        "Candidates of each method, selected on validation rows": _selected(board),
    }
    return [Section(title, lines=lines) for title, lines in sections.items() if lines]


def terminal(board: Leaderboard) -> list[Table | str]:
    """Tables and sentences for the terminal."""
    parts: list[Table | str] = []
    for section in tables(board):
        table = plain_table(section.title)
        table.add_column(section.heads[0], style="bold", no_wrap=True)
        columns = [column for column, head in enumerate(section.heads) if column and head not in _NOT_IN_TERMINAL]
        for column in columns:
            head = section.heads[column]
            table.add_column(head, justify="left" if head == "accuracy %" else "right")
        for row, following in zip_longest(section.rows, section.rows[1:]):
            texts = (_short(row.cells[column]) for column in columns)
            table.add_row(row.cells[0], *texts, end_section=bool(following and following.kind != row.kind))
        parts += [table, ""]
    return [*parts, *board.verdicts, *board.failures, *(f"left out: {line}" for line in board.absences)]


def markdown(board: Leaderboard) -> str:
    """The leaderboard as Markdown."""
    lines = [f"## {board.title}", "", *(f"- {line}" for line in board.provenance()), ""]
    for table in tables(board):
        lines += [f"**{table.title}**", "", *markdown_table(table.heads, table.rows), ""]
    commands = [f"{row.name}: {row.description}. `{row.command}`" for row in board.rows if row.command]
    for section in [*lists(board), Section("Rows", lines=commands)]:
        lines += [f"**{section.title}**", "", *(f"- {line}" for line in section.lines), ""] if section.lines else []
    return "\n".join([*lines, *(f"*{note}*\n" for note in NOTES)])


def records(board: Leaderboard) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of numbers, one row per row and group, for CSV and W&B."""
    tests = {(v.group, v.first): v for v in board.versus}
    columns = ["row", "kind", "group", "seeds", "error", *_NUMBERS]
    columns += ["vs_reference", "vs_reference_low", "vs_reference_high", "vs_reference_p_holm", *_FACTS]
    rows: list[list[Any]] = []
    for row in board.rows:
        for group in board.groups:
            numbers, test = row.numbers.get(group, {}), tests.get((group, row.name))
            against = [test.difference, test.low, test.high, test.p_holm] if test else [None] * 4
            values = [numbers.get(name) for name in _NUMBERS] + against + [row.facts.get(name) for name in _FACTS]
            error = "; ".join(row.errors.values())
            clean = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
            rows.append([row.name, row.kind, group, row.num_seeds, error, *clean])
    return columns, rows


def as_json(board: Leaderboard) -> dict[str, Any]:
    """Everything but per-user values."""
    rows = []
    for row in board.rows:
        fields = {key: value for key, value in vars(row).items() if key != "users"}
        rows.append({**fields, "errors": {str(seed): text for seed, text in row.errors.items()}})
    return {
        "title": board.title,
        "metadata": dict(board.metadata),
        "data": dict(board.data),
        "reference": board.reference,
        "left_out": dict(board.left_out),
        "rows": rows,
        "versus_reference": [test._asdict() for test in board.versus],
        "all_pairs": [test._asdict() for test in board.pairs],
        "verdicts": board.verdicts,
    }


def page(board: Leaderboard, pictures: Mapping[str, bytes]) -> list[Section]:
    """The sections of the HTML page; ``pictures`` are PNGs by title."""
    commands = [f"{row.name}: {row.description}. {row.command}" for row in board.rows]
    return [
        Section("", lines=board.provenance()),
        *tables(board),
        *lists(board),
        *(Section(title, pictures={title: content}) for title, content in pictures.items()),
        Section("Rows", lines=commands),
        Section("How to read this", lines=NOTES),
    ]


def write(board: Leaderboard, figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write all formats into a folder; returns their paths."""
    pictures, drawn = write_figures(folder, figures)
    write_text(folder / "leaderboard.md", markdown(board) + "\n")
    write_json(folder / "leaderboard.json", as_json(board))
    files = [folder / "leaderboard.md", folder / "leaderboard.json"]
    files += write_report(folder, "leaderboard", board.title, page(board, pictures), *records(board))
    return files + drawn


# ---------------------------------------------------------------------- words
def _number(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def _per_cent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _points(numbers: Mapping[str, float], name: str) -> str:
    value = numbers.get(name, math.nan)
    return "–" if math.isnan(value) else points(value, "")


def _gain(test: Versus) -> str:
    return f"{points(test.difference)} [{points(test.low, '')}, {points(test.high, '')}]"


def _versus(test: Versus) -> str:
    return f"{test.first} − {test.second} {_gain(test)}, p {p_value(test.p_holm)}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _selected(board: Leaderboard) -> list[str]:
    return [
        f"{row.name}: {json.dumps(row.arguments) if row.arguments else 'as given'}, "
        + (f"of {row.num_candidates} candidates" if row.num_candidates > 1 else "not searched (1 candidate)")
        for row in board.rows
        if row.kind == "method" and any(other.num_candidates > 1 for other in board.rows)
    ]
