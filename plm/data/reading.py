"""Files of pairs as factorised columns, whatever their rows look like.

Axes: N rows of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from plm.data.columns import OPTIONAL, Column, RawPairs, factorise, factorise_arrow
from plm.data.conversations import WRITTEN
from plm.data.files import (
    TABLES,
    Records,
    check_exists,
    file_format,
    read_head,
    read_records,
    read_table,
    table_errors,
    table_records,
)
from plm.data.layouts import GRADED, NAMED, Layout
from plm.data.pair_rows import pair_rows
from plm.data.text_tables import TextTable, read_csv_table, read_jsonl_table
from plm.data.values import EVERYONE
from plm.data.winners import refuse_unread_winner
from plm.messages import closest, nearest, setting

NUM_LOOKED_AT = 256
"""Rows that are looked at to tell what a column means."""
_TEXTS = ("prompt", "chosen", "rejected")
_NOT_GIVEN = (*OPTIONAL, "winner")
"""Columns of CSV in which an empty cell means "not given"."""
_PRINTED = ("winner", "status")
"""What may be a list of several people's, with the user, also where a text prints it."""


def read_columns(path: Path, layout: Layout) -> RawPairs:
    """Read the columns of one file of pairs.

    Args:
        path: The file; its ending says the format.
        layout: What the columns of files are.

    Returns:
        Columns that the file has, the line (of tables: row) of each pair, and lines that are none.

    Raises:
        ValueError: If there is no such file, the format is unknown, a required column is missing, or one that
            seems to name the winner would not be read.
    """
    check_exists(path)
    if path.name.endswith(TABLES):
        records = _read_table(path, layout)
    else:
        records = _read_text(path, layout) or read_records(path)
    if isinstance(records, RawPairs):
        pa.default_memory_pool().release_unused()  # Arrow keeps the memory of a table that is gone
        return records
    found = found_columns(path, layout, records.names) if records.names else layout
    if records.names:
        _refuse_unread_winner(path, found, records)
    pairs = pair_rows(records, found)
    empty = _NOT_GIVEN if file_format(path) == "csv" else ()
    columns = {}
    for name in dict.fromkeys(name for shape in {tuple(row) for row in pairs.rows} for name in shape):
        values = [row.get(name) for row in pairs.rows]
        columns[name] = factorise([None if value == "" else value for value in values] if name in empty else values)
    return RawPairs(columns, np.array(pairs.lines, dtype=np.int64), pairs.problems, pairs.dropped)


def _read_table(path: Path, layout: Layout) -> RawPairs | Records:
    """Columns of a file whose rows are pairs as they stand; else the rows, with the columns that are read."""
    names = read_table(path, num_rows=0).column_names
    found = found_columns(path, layout, names)
    unread = [name for name in names if name not in _read(found)]
    _refuse_unread_winner(path, found, table_records(path, read_table(path, unread, NUM_LOOKED_AT)))
    table = read_table(path, [name for name in names if name in _read(found)])
    with table_errors(path):
        return table_records(path, table) if _needs_rows(table, found) else _of_table(table, found)


def _of_table(table: pa.Table, found: Layout) -> RawPairs:
    """Columns of a table whose rows are pairs as they stand."""
    columns = {name: factorise_arrow(table.column(column)) for name, column in found.columns.items()}
    if "user_id" not in columns:
        columns["user_id"] = Column(np.zeros(table.num_rows, dtype=np.int64), [EVERYONE])
    return RawPairs(columns, np.arange(table.num_rows, dtype=np.int64), [])


def _read_text(path: Path, layout: Layout) -> RawPairs | None:
    """Columns of a JSONL or CSV file whose rows are evidently pairs as they stand, in one pass; None of any other.

    What is wrong with a file is said by reading its rows.
    """
    dotted = any("." in column for column in layout.columns.values())
    if not path.name.endswith((".jsonl", ".csv")) or layout.attributes or dotted:
        return None
    try:
        head = read_head(path, NUM_LOOKED_AT)
        found = found_columns(path, layout, head.names)
        _refuse_unread_winner(path, found, head)
    except ValueError:
        return None
    if head.problems or found.is_listed or found.is_long:
        return None
    read = _read_csv if file_format(path) == "csv" else _read_jsonl
    text = read(path, found, head)
    try:
        if text is None or _needs_rows(text.table, found):
            return None
        return _of_table(text.table, found)._replace(lines=text.lines)
    except pa.ArrowException:  # a column of more than 2 GiB of distinct text
        return None


def _read_csv(path: Path, found: Layout, head: Records) -> TextTable | None:
    """The columns of a CSV file that are read; an empty cell of one that need not be there means "not given"."""
    nullable = {column for name, column in found.columns.items() if name in _NOT_GIVEN}
    return read_csv_table(path, head.names, list(dict.fromkeys(found.columns.values())), nullable)


def _read_jsonl(path: Path, found: Layout, head: Records) -> TextTable | None:
    """All columns of a JSONL file, if those of the first rows are of one kind each that Arrow reads as Python does."""
    kinds = {name: _kind([row.get(name) for row in head.rows]) for name in head.names}
    read = {name: kinds[column] for name, column in found.columns.items()}
    if None in kinds.values() or pa.null() in read.values() or read.get("tie", pa.bool_()) != pa.bool_():
        return None
    if pa.float64() in (read.get("user_id"), read.get("dialogue_id")):
        return None  # long integers would lose digits
    return read_jsonl_table(path, kinds)


def _kind(values: Sequence[Any]) -> pa.DataType | None:
    """The type of values that have one of four, or are all null; None of others."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.float64()
    found = {str: pa.string(), int: pa.int64(), bool: pa.bool_(), float: pa.float64()}
    return found.get(kinds.pop()) if len(kinds) == 1 else None if kinds else pa.null()


def found_columns(path: Path, layout: Layout, present: Sequence[str]) -> Layout:
    """The layout with the columns that a file has and that are read of it.

    Raises:
        ValueError: If one that must be there is missing.
    """
    columns = {
        name: column for name, column in layout.columns.items() if not {column, _head(column)}.isdisjoint(present)
    }
    found = replace(layout, columns=columns)
    graded = found.is_listed or found.is_long
    needed = ["user_id", "prompt", "winner", *(() if graded else ("chosen", "rejected"))]
    if "chosen" not in layout.columns:
        needed += [name for name in (*GRADED, *NAMED) if name != "status"]
    missing = [name for name in needed if name in layout.columns and name not in columns]
    absent = [column for column in layout.attributes if {column, _head(column)}.isdisjoint(present)]
    if absent:
        near = nearest(absent[0], present)
        raise ValueError(f"{path}: expected the columns {absent} of attributes, got {', '.join(present)}{near}")
    if missing:
        expected = ", ".join(layout.columns[name] for name in needed if name in layout.columns)
        parts = [_how_to_name(name, layout.columns[name], present) for name in missing]
        parts.append(f"For usual layouts: {setting('layout', 'NAME')} of docs/data.md; for a guess: plm data convert.")
        raise ValueError(f"{path}: expected columns {expected}, got {', '.join(present)}: " + " ".join(parts))
    unused = {*(() if found.is_listed else ("responses", "ratings", "ranking", "best_first"))}
    unused |= {*(() if found.is_long else ("response", "rating", "rank"))}
    return replace(layout, columns={name: column for name, column in columns.items() if name not in unused})


def _how_to_name(name: str, column: str, present: Sequence[str]) -> str:
    """What to say of a column that is missing."""
    close = closest(column, present) or "<its name in the file>"
    hint = nearest(column, present) or "."
    option = setting("winner", {"column": close}) if name == "winner" else setting("columns", {name: close})
    without = {"user_id": "no users are told apart", "prompt": "the prompt is what both conversations share"}.get(name)
    instead = f", or {setting('columns', {name: None})} if {without}" if without else ""
    return f"column {column!r} is missing{hint} Set {option}{instead}."


def _refuse_unread_winner(path: Path, found: Layout, records: Records) -> None:
    """Refuse a file of two responses a row with a column that names the winner and is not read."""
    if not found.no_winner and {"chosen", "rejected"} <= found.columns.keys():
        unread = [name for name in records.names if name not in _read(found)]
        refuse_unread_winner(path, found.columns, unread, records.rows[:NUM_LOOKED_AT])


def _read(layout: Layout) -> set[str]:
    """Names of the file's columns that are read, also where only a part of their values is."""
    columns = [*layout.columns.values(), *layout.attributes]
    return {*columns, *map(_head, columns)}


def _head(column: str) -> str:
    """The first name of a path."""
    return column.partition(".")[0]


def _needs_rows(table: pa.Table, found: Layout) -> bool:
    """Whether rows of a table are not pairs as they stand: lists, parts of values, or conversations."""
    if found.is_listed or found.is_long or not {*_TEXTS} <= found.columns.keys():
        return True
    if any(column not in table.column_names for column in found.columns.values()):
        return True
    kinds = {name: table.schema.field(column).type for name, column in found.columns.items()}
    plain = {name: kind.value_type if pa.types.is_dictionary(kind) else kind for name, kind in kinds.items()}
    if any(map(pa.types.is_nested, plain.values())):
        return True
    for name, marks in {**dict.fromkeys(_TEXTS, WRITTEN), **dict.fromkeys(_PRINTED, "[")}.items():
        if _is_text(plain.get(name)) and table.num_rows:
            texts = _distinct(table.column(found.columns[name])).cast(pa.string())
            if any(pc.any(pc.starts_with(texts, mark)).as_py() for mark in marks):
                return True
    return False


def _distinct(column: pa.ChunkedArray) -> Any:
    """Its distinct values, and perhaps others of its dictionary."""
    if pa.types.is_dictionary(column.type):
        return column.unify_dictionaries().chunk(0).dictionary
    return column.unique()


def _is_text(kind: pa.DataType | None) -> bool:
    return kind is not None and bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
