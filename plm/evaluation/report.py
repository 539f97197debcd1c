"""The tables and rows of files at the end of a test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from plm.evaluation.page import Section
from plm.evaluation.wording import difference, interval, points
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


def summary_table(groups: Mapping[str, Mapping[str, float]]) -> Table:
    """Tabulate the results of a test: a row per group of users, accuracies in per cent, differences in points."""
    table = plain_table("Test, 95% intervals over users")
    table.add_column("", style="bold", no_wrap=True)
    for head in (
        "users",
        "pairs",
        "accuracy %",
        "global %",
        "personal − global",
        "personal − other",
        "personal − Bradley–Terry",
        "log-loss",
        "ECE",
    ):
        table.add_column(head, justify="right", no_wrap=head in ("users", "pairs", "log-loss", "ECE"))
    for name, numbers in groups.items():
        cells = [f"{numbers['num_users']:,.0f}", f"{numbers['num_pairs']:,.0f}"]
        if "accuracy" in numbers:
            cells.append(points(numbers["accuracy"], "") + interval(numbers, "accuracy"))
            cells.append(points(numbers["global_accuracy"], "") if "global_accuracy" in numbers else "–")
            for key in ("personal_minus_global", "personal_minus_other", "personal_minus_bradley_terry"):
                cells.append(difference(numbers, key) if key in numbers else "–")
            cells += [f"{numbers['log_loss']:.3f}", f"{numbers['ece']:.3f}"]
        table.add_row(name, *cells)
    return table


def few_shot_table(curve: Mapping[str, Any]) -> Table:
    """Tabulate the few-shot curve: one row per shot count."""
    title = f"Few-shot curve, {curve['num_users']:,} unseen users, {curve['num_repeats']} repeats"
    table = plain_table(title)
    for head in ("shots", "accuracy %", "sd over repeats", "gain over 0 shots"):
        table.add_column(head, justify="right")
    for index, shots in enumerate(curve["shots"]):
        row = {name: values[index] for name, values in curve.items() if isinstance(values, list)}
        spread = "–" if math.isnan(row["accuracy_sd"]) else points(row["accuracy_sd"], "")
        gain = difference(row, "gain") if shots and "gain" in row else "–"
        table.add_row(str(shots), points(row["accuracy"], "") + interval(row, "accuracy"), spread, gain)
    return table


USER_COLUMNS = ["user_id", "split", "num_pairs", "accuracy", "global_accuracy", "gain", "other_accuracy", "log_loss"]
"""Columns of ``per_user.csv``; gain = accuracy - global accuracy."""


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
