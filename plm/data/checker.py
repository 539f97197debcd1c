"""Checks of columns that name every row they refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plm.arrays import BoolArray, IntArray
from plm.data.columns import Column
from plm.data.files import position
from plm.data.values import short
from plm.messages import counted, listed, setting


class Checker:
    """Collects what is wrong, row by row."""

    def __init__(self, where: IntArray, problems: list[tuple[int, int, str]]) -> None:
        self.where = where
        self.problems = problems

    @property
    def clean(self) -> BoolArray:
        """``(N,)`` whether nothing was found on the line of a row, so far."""
        lines = {(file, line) for file, line, _ in self.problems}
        if not lines:
            return np.ones(len(self.where), dtype=np.bool_)
        return np.array([(file, line) not in lines for file, line in self.where.tolist()], dtype=np.bool_)

    @property
    def advice(self) -> str:
        """What to do about what was found: most rows are not left out."""
        num_malformed = len({(file, line) for file, line, _ in self.problems})
        is_few = num_malformed < np.count_nonzero(self.clean)
        return " to correct or remove" + (f", or to leave out by {setting('on_error', 'skip')}" if is_few else "")

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


def report(files: list[str], problems: Sequence[tuple[int, int, str]], advice: str) -> str:
    """One line for each of the first problems (row of ``files``, line, text), and how many more there are.

    Args:
        files: Names of the files.
        problems: What is wrong.
        advice: What follows the number of malformed rows in the first line.
    """
    lines = [f"{position(files[file], line)}: {text}" for file, line, text in problems]
    number = counted(len({(file, line) for file, line, _ in problems}), "malformed row")
    return listed(f"{number}{advice}:", lines)
