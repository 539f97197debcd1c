"""Files of pairs as factorised columns, whatever their rows look like.

Axes: N rows of a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plm.data.columns import LISTED, OPTIONAL, REQUIRED, RawPairs, factorise, factorise_arrow
from plm.data.files import Records, file_format, named_once, parquet_errors, read_records
from plm.data.pair_rows import pair_rows
from plm.data.winners import refuse_unread_winner
from plm.messages import closest, nearest

_NUM_LOOKED_AT = 256
"""Rows that are looked at for a column that names the winner."""


def read_columns(path: Path, names: Mapping[str, str], no_winner: bool = False) -> RawPairs:
    """Read the columns of one file of pairs.

    Args:
        path: The file; its ending says the format.
        names: Our column name -> the file's; a path into a value is joined by dots.
        no_winner: Whether the options say that no other column names the winner.

    Returns:
        Columns that the file has, the line (Parquet: row) of each row, and lines that could not be parsed.

    Raises:
        ValueError: If the format is unknown, a required column is missing, or one that seems to name the winner would
            not be read.
    """
    records = _read_parquet(path, names, no_winner) if file_format(path) == "parquet" else read_records(path)
    if isinstance(records, RawPairs):
        return records
    found = _found(path, names, records.names)
    if not no_winner:
        unread = [name for name in records.names if name not in _read(found)]
        refuse_unread_winner(path, names, unread, records.rows[:_NUM_LOOKED_AT])
    pairs = pair_rows(records, found)
    empty = (*OPTIONAL, "winner") if file_format(path) == "csv" else ()  # an empty cell means "not given"
    columns = {}
    for name in dict.fromkeys(name for shape in {tuple(row) for row in pairs.rows} for name in shape):
        values = [row.get(name) for row in pairs.rows]
        columns[name] = factorise([None if value == "" else value for value in values] if name in empty else values)
    return RawPairs(columns, np.array(pairs.lines, dtype=np.int64), pairs.problems, pairs.dropped)


def _read_parquet(path: Path, names: Mapping[str, str], no_winner: bool) -> RawPairs | Records:
    """Columns of a file whose rows are pairs as they stand; else the rows, with the columns that are read."""
    with parquet_errors(path):
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        named_once(path, schema.names)
        found = _found(path, names, schema.names)
        if not no_winner:
            unread = [name for name in schema.names if name not in _read(found)]
            first = next(file.iter_batches(_NUM_LOOKED_AT, columns=unread), None) if unread else None
            refuse_unread_winner(path, names, unread, [] if first is None else first.to_pylist())
        table = pq.read_table(path, columns=[name for name in schema.names if name in _read(found)])
        if _needs_rows(schema, found):
            return Records(table.column_names, table.to_pylist(), list(range(table.num_rows)), [])
        columns = {name: factorise_arrow(table.column(column)) for name, column in found.items()}
    return RawPairs(columns, np.arange(table.num_rows, dtype=np.int64), [])


def _found(path: Path, names: Mapping[str, str], present: Sequence[str]) -> dict[str, str]:
    """The columns that a file has: our name -> the file's.

    Raises:
        ValueError: If one that must be there is missing.
    """
    found = {name: column for name, column in names.items() if not {column, _head(column)}.isdisjoint(present)}
    listed = all(name in found for name in LISTED)
    required = [name for name in REQUIRED if not (listed and name in ("chosen", "rejected"))]
    missing = [name for name in (*required, "winner") if name in names and name not in found] if present else []
    if missing:
        parts = []
        for name in missing:
            close = closest(names[name], present) or "<its name in the file>"
            hint = nearest(names[name], present) or "."
            option = f"winner: {{column: {close}}}" if name == "winner" else f"columns: {{{name}: {close}}}"
            parts.append(f"column {names[name]!r} is missing{hint} Set {option}.")
        raise ValueError(
            f"{path}: expected columns {', '.join(REQUIRED)}, got {', '.join(present)}: " + " ".join(parts)
        )
    return found


def _read(found: Mapping[str, str]) -> set[str]:
    """Names of the file's columns that are read, also where only a part of their values is."""
    return {*found.values(), *map(_head, found.values())}


def _head(column: str) -> str:
    """The first name of a path."""
    return column.partition(".")[0]


def _needs_rows(schema: pa.Schema, found: Mapping[str, str]) -> bool:
    """Whether rows of a Parquet file are not pairs as they stand: parts of values, values inside values, or lists."""
    if all(name in found for name in LISTED):
        return True
    kinds = [schema.field(column).type for column in found.values() if column in schema.names]
    plain = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    return len(kinds) < len(found) or any(map(pa.types.is_nested, plain))
