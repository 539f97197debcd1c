"""Columns of pairs under our names, factorised: each distinct value is stored once.

Axes: N rows of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from plm.arrays import IntArray

REQUIRED = ("user_id", "prompt", "chosen", "rejected")
OPTIONAL = (
    "weight",
    "chosen_score",
    "rejected_score",
    "tie",
    "dialogue_id",
    "turn",
    "timestamp",
    "row_split",
    "user_split",
)


class Column(NamedTuple):
    """A factorised column: distinct values stored once."""

    codes: IntArray  # (N,) row of values, -1 = null
    values: list[Any]


class RawPairs(NamedTuple):
    """Columns of one file under our names, unvalidated."""

    columns: dict[str, Column]
    lines: IntArray
    problems: list[tuple[int, str]]
    dropped: Mapping[str, int] = {}


def factorise_arrow(column: Any) -> Column:
    """Number the distinct values of a column of an Arrow table; null is null."""
    kind = column.type
    if pa.types.is_nested(kind):
        return factorise(column.to_pylist())
    encoded = column.unify_dictionaries() if pa.types.is_dictionary(kind) else column.dictionary_encode()
    if encoded.num_chunks == 0:
        return Column(np.zeros(0, dtype=np.int64), [])
    array = encoded.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    codes = array.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    values = array.dictionary.to_pylist()
    nulls = [code for code, value in enumerate(values) if value is None]
    return Column(np.where(np.isin(codes, nulls), -1, codes) if nulls else codes, values)


def factorise(values: Iterable[Any]) -> Column:
    """Number distinct values by first occurrence; None is null."""
    rows: dict[Any, int] = {}
    distinct: list[Any] = []
    codes = []
    for value in values:
        if value is None:
            codes.append(-1)
            continue
        key = value if type(value) is str else (type(value), value if isinstance(value, int | float) else repr(value))
        code = rows.get(key)
        if code is None:
            code = rows[key] = len(distinct)
            distinct.append(value)
        codes.append(code)
    return Column(np.array(codes, dtype=np.int64), distinct)


def stack(name: str, raws: Sequence[RawPairs]) -> Column | None:
    """Concatenate one column over the files; None where no file has it."""
    if not any(name in raw.columns for raw in raws):
        return None
    if len(raws) == 1:
        return raws[0].columns[name]
    codes: list[IntArray] = []
    values: list[Any] = []
    for raw in raws:
        column = raw.columns.get(name, Column(np.full(len(raw.lines), -1, dtype=np.int64), []))
        codes.append(np.where(column.codes >= 0, column.codes + len(values), -1))
        values += column.values
    return Column(np.concatenate(codes), values)


def joined(codes: Sequence[IntArray]) -> IntArray:
    """One number ``(N,)`` for N rows of non-negative codes, the same for equal rows alone."""
    joined, size = codes[0], int(codes[0].max(initial=0)) + 1
    for column in codes[1:]:
        count = int(column.max(initial=0)) + 1
        if size * count >= 2**63:
            joined = np.unique(joined, return_inverse=True)[1]
            size = int(joined.max()) + 1
        joined, size = joined * count + column, size * count
    return joined


def merged(codes: IntArray, values: list[Any]) -> tuple[list[Any], IntArray]:
    """Distinct converted values, and their codes for codes of raw ones; -1 = null or failed."""
    numbers: dict[Any, int] = {}
    lookup = [-1 if value is None else numbers.setdefault(value, len(numbers)) for value in values]
    if len(numbers) == len(values):  # as they are numbered already
        return list(numbers), codes
    return list(numbers), np.array([*lookup, -1], dtype=np.int64)[codes]
