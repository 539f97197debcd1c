"""Checks of columns that name every row they refuse, and pairs whose winner has a column of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plm.arrays import IntArray
from plm.data.files import REQUIRED, Column, position
from plm.data.values import short
from plm.messages import first_of


class Checker:
    """Collects what is wrong, row by row."""

    def __init__(self, where: IntArray, problems: list[tuple[int, int, str]]) -> None:
        self.where = where
        self.problems = problems

    def add(self, rows: IntArray, text: Callable[[int], str]) -> None:
        """Note what is wrong with rows ``(n,)``, given their numbers."""
        for row in rows.tolist():
            file, line = self.where[row].tolist()
            self.problems.append((file, line, text(row)))

    def convert(self, name: str, column: Column, convert: Callable[[Any], Any], *, nullable: bool) -> list[Any]:
        """Convert the distinct values; None stands for one that failed, whose rows are reported."""
        converted: list[Any] = []
        errors: dict[int, str] = {}
        for code, value in enumerate(column.values):
            try:
                converted.append(convert(value))
            except ValueError as error:
                errors[code] = f"{name}: {error}, got {short(value)}"
                converted.append(None)
        if errors:
            self.add(np.flatnonzero(np.isin(column.codes, list(errors))), lambda row: errors[int(column.codes[row])])
        if not nullable:
            self.add(np.flatnonzero(column.codes < 0), lambda row: f"{name}: missing or null")
        return converted


def sorted_by_winner(
    columns: dict[str, Column | None], sides: dict[str, str], checker: Checker
) -> dict[str, Column | None]:
    """Columns whose chosen response is the one that the column ``winner`` names; as they are where there is none.

    Args:
        columns: Raw columns, of which ``winner`` tells the side.
        sides: Value of that column -> left, right or tie.
        checker: Takes rows with any other value.
    """
    winner = columns.pop("winner", None)
    if winner is None or not all(columns[name] for name in REQUIRED):
        return columns
    expected = ", ".join(sides)
    words = checker.convert("winner", winner, lambda value: _side_of(value, sides, expected), nullable=False)
    side = np.array([*("left" if word is None else word for word in words), "left"])[winner.codes]
    for left, right in (("chosen", "rejected"), ("chosen_score", "rejected_score")):
        first, second = columns[left], columns[right]
        if first is None or second is None:
            continue
        second_codes = np.where(second.codes >= 0, second.codes + len(first.values), -1)
        values = [*first.values, *second.values]
        columns[left] = Column(np.where(side == "right", second_codes, first.codes), values)
        columns[right] = Column(np.where(side == "right", first.codes, second_codes), values)
    tie = columns["tie"] or Column(np.full(len(side), -1, dtype=np.int64), [])
    columns["tie"] = Column(np.where(side == "tie", len(tie.values), tie.codes), [*tie.values, True])
    return columns


def _side_of(value: Any, sides: dict[str, str], expected: str) -> str:
    """The side that a cell of the column ``winner`` names."""
    if str(value) not in sides:
        raise ValueError(f"expected one of {expected} (set winner: {{left: ..., right: ..., tie: ...}})")
    return sides[str(value)]


def report(files: list[str], problems: Sequence[tuple[int, int, str]]) -> str:
    """One line for each of the first problems (row of ``files``, line, text), and how many more there are."""
    lines = [f"{position(files[file], line)}: {text}" for file, line, text in problems]
    return "\n".join([f"{len(problems)} malformed rows; correct or remove them:", *first_of(lines, indent="  ")])
