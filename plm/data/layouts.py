"""Layouts of pairs files: two responses a row, K rated responses a row, and a column that names the winner.

Axes: N rows of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from plm.data.checker import Checker
from plm.data.columns import OPTIONAL, REQUIRED, Column, RawPairs, factorise, factorise_arrow
from plm.data.files import Records, file_format, named_once, parquet_errors, read_records
from plm.data.values import is_number, short
from plm.messages import closest, nearest

_WINNERS = ("winner", "preferred", "preference", "better", "choice", "label")
"""Names that a column has elsewhere whose cells say which response was preferred."""


def read_columns(path: Path, names: dict[str, str]) -> RawPairs:
    """Read the columns of one file of pairs.

    Args:
        path: The file; its ending says the format.
        names: Our column name -> the file's.

    Returns:
        Columns that the file has, the line (Parquet: row) of each row, and lines that could not be parsed.

    Raises:
        ValueError: If the format is unknown or a required column is missing.
    """
    if file_format(path) == "parquet":
        return _read_parquet(path, names)
    records = read_records(path)
    if file_format(path) != "csv" and "responses" in records.names:
        records = _graded_pairs(records, names)
    if records.names:
        _require(path, names, records.names)
        _refuse_unread_winner(path, names, records.names)
    found = {name: file_name for name, file_name in names.items() if file_name in records.names}
    columns = {name: factorise(row.get(file_name) for row in records.rows) for name, file_name in found.items()}
    if file_format(path) == "csv":
        for name in OPTIONAL:  # an empty cell means "not given"
            if name in columns and "" in columns[name].values:
                codes, values = columns[name]
                columns[name] = Column(np.where(codes == values.index(""), -1, codes), values)
    return RawPairs(columns, np.array(records.lines, dtype=np.int64), records.problems)


def _read_parquet(path: Path, names: dict[str, str]) -> RawPairs:
    with parquet_errors(path):
        present = pq.read_schema(path).names
        named_once(path, present)
        _require(path, names, present)
        _refuse_unread_winner(path, names, present)
        found = {name: file_name for name, file_name in names.items() if file_name in present}
        table = pq.read_table(path, columns=list(dict.fromkeys(found.values())))
        columns = {name: factorise_arrow(table.column(file_name)) for name, file_name in found.items()}
    return RawPairs(columns, np.arange(table.num_rows, dtype=np.int64), [])


def _require(path: Path, names: dict[str, str], present: Sequence[str]) -> None:
    missing = [name for name in REQUIRED if names[name] not in present]
    if not missing:
        return
    parts = []
    for name in missing:
        close = closest(names[name], present) or "<its name in the file>"
        hint = nearest(names[name], present) or "."
        parts.append(f"column {names[name]!r} is missing{hint} Set columns: {{{name}: {close}}}.")
    raise ValueError(f"{path}: expected columns {', '.join(REQUIRED)}, got {', '.join(present)}: " + " ".join(parts))


def _refuse_unread_winner(path: Path, names: dict[str, str], present: Sequence[str]) -> None:
    """Refuse two responses under other names whose winner stands in a column that would not be read.

    Read without it, every pair would say that the first response was preferred.
    """
    renamed = names["chosen"] != "chosen" or names["rejected"] != "rejected"
    column = next((name for name in present if name.lower() in _WINNERS), None)
    if renamed and column is not None and "winner" in names and names["winner"] not in present:
        raise ValueError(
            f"{path}: the column {column!r} seems to say which response was preferred, and nothing reads it; set "
            f"columns: {{winner: {column}}}, or {{winner: null}} if it says something else"
        )


def _graded_pairs(records: Records, names: dict[str, str]) -> Records:
    """Rows with K ``responses`` and their ``ratings`` as all K (K - 1) / 2 pairs, of which the higher rating is chosen.

    Equal ratings are a tie. The pairs of a row share its weight, so that it counts once however many responses it has.

    Args:
        records: Rows of a file; those without responses are left as they are.
        names: Our column name -> the file's.
    """
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    problems = list(records.problems)
    for line, row in zip(records.lines, records.rows, strict=True):
        row_pairs = [row]
        is_pair = any(row.get(names[name]) is not None for name in ("chosen", "rejected"))
        if row.get("ratings") is not None or (row.get("responses") is not None and not is_pair):
            problem = _rating_problem(row, names)
            if problem:
                problems.append((line, problem))
                continue
            row_pairs = []
            rated = list(zip(row["ratings"], row["responses"], strict=True))
            weight, share = row.get(names.get("weight", "weight"), 1.0), 2.0 / (len(rated) * (len(rated) - 1))
            for first, second in combinations(rated, 2):
                better, worse = (second, first) if second[0] > first[0] else (first, second)
                pair = {
                    "chosen": better[1],
                    "rejected": worse[1],
                    "chosen_score": better[0],
                    "rejected_score": worse[0],
                    "tie": better[0] == worse[0],
                    "weight": weight * share if is_number(weight) else weight,
                }
                row_pairs.append(row | {names[name]: value for name, value in pair.items() if name in names})
        rows += row_pairs
        lines += [line] * len(row_pairs)
    columns = dict.fromkeys([*(names[name] for name in REQUIRED), *(key for row in rows for key in row)])
    return Records(list(columns), rows, lines, problems)


def _rating_problem(row: dict[str, Any], names: dict[str, str]) -> str | None:
    """What is wrong with the responses and ratings of a row."""
    responses, ratings = row.get("responses"), row.get("ratings")
    if any(row.get(names[name]) is not None for name in ("chosen", "rejected")):
        return "ratings: expected either responses with ratings, or chosen and rejected, got both"
    if not isinstance(responses, list) or len(responses) < 2:
        return f"responses: expected a list of at least two, got {short(responses)}"
    if not isinstance(ratings, list) or len(ratings) != len(responses):
        return f"ratings: expected a number for each of {len(responses)} responses, got {short(ratings)}"
    for rating in ratings:
        if not is_number(rating):
            return f"ratings: expected finite numbers, got {short(rating)}"
    repeated = [text for place, text in enumerate(responses) if text in responses[:place]]
    if repeated:
        return f"responses: expected each once, got {short(repeated[0])} again"
    return None


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
