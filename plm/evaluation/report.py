"""The tables and files a test ends with."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from plm.evaluation.wording import difference, interval, points
from plm.metrics import UserTable


def plain_table(title: str) -> Table:
    """An empty table with a ruled head."""
    return Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )


def summary_table(groups: Mapping[str, Mapping[str, float]]) -> Table:
    """The table a test ends with: one row per group of users, accuracies in per cent, differences in points."""
    table = plain_table("Test, 95% intervals over users")
    table.add_column("", style="bold", no_wrap=True)
    for head in (
        "users",
        "pairs",
        "accuracy %",
        "global %",
        "personal − global",
        "personal − other",
        "log-loss",
        "ECE",
    ):
        table.add_column(head, justify="right", no_wrap=head in ("users", "pairs", "log-loss", "ECE"))
    for name, numbers in groups.items():
        cells = [f"{numbers['num_users']:,.0f}", f"{numbers['num_pairs']:,.0f}"]
        if "accuracy" in numbers:
            cells.append(points(numbers["accuracy"], "") + interval(numbers, "accuracy"))
            cells.append(points(numbers["global_accuracy"], "") if "global_accuracy" in numbers else "–")
            for key in ("personal_minus_global", "personal_minus_other"):
                cells.append(difference(numbers, key) if key in numbers else "–")
            cells += [f"{numbers['log_loss']:.3f}", f"{numbers['ece']:.3f}"]
        table.add_row(name, *cells)
    return table


def few_shot_table(curve: Mapping[str, Any]) -> Table:
    """The few-shot curve in the terminal: one row per shot count."""
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


def write_json(path: str | Path, entries: Mapping[str, Any], merge: bool = False) -> None:
    """Write ``entries`` as JSON in one step; nan becomes null.

    Args:
        path: The file; its folder is made.
        entries: What to write.
        merge: Keep the file's other top-level entries.
    """
    path = Path(path)
    kept = json.loads(path.read_text(encoding="utf-8")) if merge and path.is_file() else {}
    text = json.dumps(_finite({**kept, **entries}), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def _finite(value: Any) -> Any:
    """Replace nan and infinities, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


USER_COLUMNS = ["user_id", "split", "num_pairs", "accuracy", "global_accuracy", "gain", "other_accuracy", "log_loss"]
"""Columns of ``per_user.csv``; gain = accuracy - global accuracy."""


def user_rows(groups: Mapping[str, UserTable], user_ids: Sequence[str]) -> list[list[Any]]:
    """One row of `USER_COLUMNS` per user of each group; ``user_ids`` by user row."""
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


def write_csv(path: str | Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file in one step; None becomes an empty cell."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    write_text(path, text.getvalue())


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as it is in one step, so that a reader sees all of it or the file before; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_bytes(text.encode())
    os.replace(temporary, path)
