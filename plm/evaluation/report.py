"""The tables and rows of files at the end of a test, and those rows read again."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from plm.arrays import Float64Array
from plm.evaluation.page import Section
from plm.evaluation.wording import difference, interval, points, shot_units
from plm.metrics import UserTable


def plain_table(title: str) -> Table:
    """Make an empty table with a ruled head."""
    return Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )


def section_table(section: Section) -> Table:
    """A section's table for the terminal: the first column bold, numbers at the right."""
    table = plain_table(section.title)
    for column, head in enumerate(section.heads):
        justify: Literal["left", "right"] = "right" if column and not section.is_text else "left"
        table.add_column(head, style=None if column else "bold", justify=justify)
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row.cells))
    return table


ROWS = {
    "accuracy %": "accuracy",
    "global %": "global_accuracy",
    "personal − global": "personal_minus_global",
    "personal − other": "personal_minus_other",
    "personal − Bradley–Terry": "personal_minus_bradley_terry",
    "accuracy − majority": "personal_minus_majority",
    "log-loss": "log_loss",
    "ECE": "ece",
    "term reversed %": "flip_reversed",
    "served population": "users_served_population",
}
"""Row of the table of a test -> the number it shows."""

CONTROLS = {
    "flip_reversed": "term reversed: pairs whose personal term turns when the user's labels do",
    "users_served_population": "served population: users whose every margin is that of the population",
}
"""What the last rows mean, said below the table where they are not 0; ``docs/results.md`` says it in full."""


def summary_table(groups: Mapping[str, Mapping[str, float]]) -> Table:
    """Tabulate the results of a test: a column per group of users, accuracies in per cent, differences in points."""
    table = plain_table("Test, 95% intervals over users")
    table.add_column("", no_wrap=True)
    for name in groups:
        table.add_column(name, justify="right", no_wrap=True)
    for head in ("users", "pairs"):
        table.add_row(head, *(f"{numbers[f'num_{head}']:,.0f}" for numbers in groups.values()))
    for head, name in ROWS.items():
        if any(name in numbers for numbers in groups.values()):
            table.add_row(head, *(_cell(numbers, name) for numbers in groups.values()))
    return table


def _cell(numbers: Mapping[str, float], name: str) -> str:
    """A number of one group as the table shows it."""
    if name not in numbers:
        return "–"
    if name.startswith("personal_minus"):
        return difference(numbers, name)
    if name in ("log_loss", "ece"):
        return f"{numbers[name]:.3f}"
    if name.startswith("users"):
        return f"{numbers[name]:,.0f}"
    return points(numbers[name], "") + (interval(numbers, name) if name == "accuracy" else "")


def control_notes(groups: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Sentences about those rows of the table that need one, and about the majority where it says nothing."""
    notes = [text for name, text in CONTROLS.items() if any(numbers.get(name) for numbers in groups.values())]
    if not any("majority_accuracy" in numbers for numbers in groups.values()):
        notes.append("accuracy − majority: not measured: test pairs share no response with training pairs")
    return notes


def few_shot_table(curve: Mapping[str, Any]) -> Table:
    """Tabulate the few-shot curve: one row per shot count."""
    title = f"Few-shot curve, {curve['num_users']:,} unseen users, {curve['num_repeats']} repeats"
    if shot_units(curve) != "pairs":
        title += f", shots are {shot_units(curve)}"
    table = plain_table(title)
    for head in ("shots", "accuracy %", "sd", "gain over 0 shots", "harmed %", "log-loss", "ECE"):
        table.add_column(head, justify="right")
    for index, shots in enumerate(curve["shots"]):
        row = {name: values[index] for name, values in curve.items() if isinstance(values, list)}
        spread = "–" if math.isnan(row["accuracy_sd"]) else points(row["accuracy_sd"], "")
        has_gain = shots and "gain" in row
        table.add_row(
            str(shots),
            points(row["accuracy"], "") + interval(row, "accuracy"),
            spread,
            difference(row, "gain") if has_gain else "–",
            points(row["harmed"], "") if has_gain else "–",
            f"{row['log_loss']:.3f}",
            f"{row['ece']:.3f}",
        )
    return table


USER_COLUMNS = ["user_id", "split", "num_pairs", "accuracy", "global_accuracy", "gain", "other_accuracy", "log_loss"]
"""Columns of ``per_user.csv``; gain = accuracy - global accuracy."""
_VALUES = tuple(name for name in USER_COLUMNS if name not in ("user_id", "split"))


def user_rows(groups: Mapping[str, UserTable], user_ids: Sequence[str]) -> list[list[Any]]:
    """List the values of `USER_COLUMNS` for every user of each group; ``user_ids`` is indexed by user row."""
    rows: list[list[Any]] = []
    for split, table in groups.items():
        columns = (
            table.user_row,
            table.num_pairs,
            table.accuracy,
            table.global_accuracy,
            table.personal_minus_global,
            table.other_accuracy,
            table.log_loss,
        )
        for row, num_pairs, *values in zip(*(column.tolist() for column in columns), strict=True):
            rows.append([user_ids[row], split, int(num_pairs), *(None if math.isnan(v) else v for v in values)])
    return rows


class UserRows(NamedTuple):
    """What a run got right for each user of a group, as ``per_user.csv`` says."""

    ids: list[str]
    """U ids, sorted."""
    values: dict[str, Float64Array]
    """Column -> ``(U,)``; nan = an empty cell."""


def read_user_rows(file: str | Path) -> dict[str, UserRows]:
    """Read ``per_user.csv``: group of users -> its rows.

    Raises:
        ValueError: If it is no such file, or a user occurs twice in a group.
    """
    rows: dict[str, dict[str, dict[str, str]]] = {}
    groups = {}
    try:
        with Path(file).open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                if rows.setdefault(row["split"], {}).setdefault(row["user_id"], row) is not row:
                    raise ValueError(f"user {row['user_id']!r} is there twice")
        for group, members in rows.items():
            ids = sorted(members)
            values = {name: np.array([float(members[user][name] or "nan") for user in ids]) for name in _VALUES}
            groups[group] = UserRows(ids, values)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        expected = f"expected the columns {', '.join(USER_COLUMNS)}, as plm test writes them"
        raise ValueError(f"{file} is damaged: {expected}, got {type(error).__name__}: {error}") from error
    return groups
