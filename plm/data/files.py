"""Files to rows: JSONL, JSON, CSV (all also .gz), Parquet and Arrow, unvalidated."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from plm.data.values import short
from plm.messages import counted, listed

csv.field_size_limit(sys.maxsize)  # texts may be longer than the 131,072 characters that are usual
FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet", ".arrow")
_SPREADSHEETS = (".tsv", ".xlsx", ".xls", ".ods")
TABLES = (".parquet", ".arrow")
"""Formats that hold typed columns."""


class Records(NamedTuple):
    """Rows of one file as they are; CSV cells are texts."""

    names: list[str]
    """All columns."""
    rows: list[dict[str, Any]]
    lines: list[int]
    """Line of every row; of tables and JSON: its number from 0."""
    problems: list[tuple[int, str]]
    """Lines that could not be parsed."""


def position(file: str | Path, line: int) -> str:
    """Where a row stands, for messages."""
    return f"{file}:row {line}" if str(file).endswith((*TABLES, ".json", ".json.gz")) else f"{file}:{line}"


def check_exists(path: Path) -> None:
    """Raise where there is no file."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "which does not exist"
        raise ValueError(f"expected a file, got {str(path)!r}, {what}")


def or_empty(path: str | Path) -> str:
    """The name of a file that gave no row; it says so where the file is empty."""
    return f"{path}, which is empty" if os.path.getsize(path) == 0 else str(path)


def opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where its ending says gzip."""
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def read_records(path: Path) -> Records:
    """Read all rows and columns of one file.

    Args:
        path: The file; its ending says the format.

    Raises:
        ValueError: If there is no such file, the format is unknown or the file is not of that format.
    """
    check_exists(path)
    if path.name.endswith(TABLES):
        return table_records(path, read_table(path))
    try:
        with opened(path) as stream:
            readers = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv}
            return readers[file_format(path)](path, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got a damaged one ({error}); write it again") from error


def read_head(path: Path, num_rows: int) -> Records:
    """The first rows of a JSONL or CSV file that is not packed.

    Raises:
        ValueError: If they are not of that format.
    """
    with path.open("rb") as stream:
        if file_format(path) == "csv":
            return _read_csv(path, stream, num_rows)
        return _read_jsonl(path, islice(stream, num_rows))


def read_table(path: Path, columns: Sequence[str] | None = None, num_rows: int | None = None) -> pa.Table:
    """Read a Parquet or Arrow file.

    Args:
        path: The file.
        columns: Which columns; None = all.
        num_rows: How many rows, the first ones; None = all.

    Raises:
        ValueError: If there is no such file, it cannot be read, or two columns have one name.
    """
    check_exists(path)
    with table_errors(path):
        if path.name.endswith(".arrow"):  # as the datasets library saves them: streams
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().slice(0, num_rows)
            named_once(path, table.column_names)
            return table if columns is None else table.select(columns)
        file = pq.ParquetFile(path)
        named_once(path, file.schema_arrow.names)
        if num_rows is None:  # in each row group a text is held once
            texts = [column.name for column in file.schema_arrow if pa.types.is_string(column.type)]
            return pq.read_table(path, columns=columns, read_dictionary=texts)
        wanted = file.schema_arrow.names if columns is None else columns
        first = next(file.iter_batches(num_rows, columns=wanted), None) if wanted and num_rows else None
        return pa.table({name: [] for name in wanted}) if first is None else pa.Table.from_batches([first])


def table_records(path: Path, table: pa.Table) -> Records:
    """Rows of a table that was read of a file."""
    with table_errors(path):
        return Records(table.column_names, table.to_pylist(), list(range(table.num_rows)), [])


@contextmanager
def table_errors(path: Path) -> Iterator[None]:
    """Report what Arrow cannot read or Python cannot hold as an error of the file."""
    kind = "an Arrow" if path.name.endswith(".arrow") else "a Parquet"
    try:
        yield
    except (pa.ArrowException, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected {kind} file, got {error}") from error
    except OSError as error:
        if type(error) is not OSError:  # not its content: there is no such file, or it may not be read
            raise
        raise ValueError(
            f"{path}: expected a whole {kind.split()[1]} file, got a damaged one ({error}); write it again"
        ) from error


def named_once(path: Path, names: Sequence[str]) -> None:
    """Refuse a file in which two columns have one name."""
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"{path}: expected each column once, got {', '.join(map(repr, twice))} again; rename one")


def file_format(path: Path) -> str:
    """The format that a file's ending says: jsonl, json, csv, parquet or arrow.

    Raises:
        ValueError: If it says another.
    """
    if not path.name.endswith(FORMATS):
        advice = "; save the table as CSV with commas" if path.suffix in _SPREADSHEETS else ""
        raise ValueError(f"{path}: expected a file ending in {', '.join(FORMATS)}, got {path.suffix!r}{advice}")
    return path.name.removesuffix(".gz").rsplit(".", 1)[-1]


def _read_jsonl(path: Path, stream: Any) -> Records:
    records: list[tuple[int, Any]] = []
    problems = []
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            records.append((number, _parsed_json(line)))
        except ValueError as error:
            problems.append((number, f"malformed JSON ({error}), got {short(line.decode(errors='replace').strip())}"))
    return _objects(records, problems)


def _read_json(path: Path, stream: Any) -> Records:
    try:
        content = _parsed_json(stream.read())
    except ValueError as error:
        advice = "; if each line is an object of its own, name the file .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{path}: malformed JSON ({error}){advice}") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a JSON array of objects, got {short(content)}")
    return _objects(list(enumerate(content)), [])


def _objects(records: list[tuple[int, Any]], problems: list[tuple[int, str]]) -> Records:
    """Numbered JSON values as rows; those that are no objects are problems."""
    rows = [(number, record) for number, record in records if isinstance(record, dict)]
    for number, record in records:
        if not isinstance(record, dict):
            advice = "; name a file of one array .json" if isinstance(record, list) else ""
            problems.append((number, f"expected a JSON object, got {short(record)}{advice}"))
    names = list(dict.fromkeys(key for _, row in rows for key in row))
    return Records(names, [row for _, row in rows], [number for number, _ in rows], problems)


def _parsed_json(text: bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: If it is none, with a key given twice, or with brackets too deep to read.
    """
    if b"\0" in text:
        raise ValueError("expected UTF-8, got zero bytes, as UTF-16 has them; save the file as UTF-8")
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        byte = text[error.start]
        raise ValueError(f"expected UTF-8, got byte 0x{byte:02x} at {error.start}; save the file as UTF-8") from None
    except RecursionError:
        raise ValueError("its brackets are too deep to read") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are given once."""
    record = dict(pairs)
    if len(record) < len(pairs):
        (name, times), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} is given {times} times")
    return record


def _no_number(name: str) -> float:
    """Refuse what Python writes for numbers that JSON does not have."""
    raise ValueError(f"{name} is not JSON; write null")


def _read_csv(path: Path, stream: Any, num_rows: int | None = None) -> Records:
    header: list[str] = []
    end = 0  # the last line that was read
    rows, lines, problems = [], [], []
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        try:
            first = text.readline()
            _refuse_other_separators(path, first)
            reader = csv.reader(chain([first], text), strict=True)
            header = next(reader, [])
            named_once(path, header)
            end = reader.line_num
            for cells in islice(reader, num_rows):
                start, end = end + 1, reader.line_num  # a quoted cell may span lines: name the first one
                if not cells:
                    continue
                if len(cells) != len(header):
                    problems.append((start, f"expected {len(header)} cells, got {len(cells)}: {short(cells)}"))
                    continue
                rows.append(dict(zip(header, cells, strict=True)))
                lines.append(start)
        except csv.Error as error:
            raise ValueError(
                f"{path}:{end + 1}: malformed CSV ({error}), so nothing after it can be read; close its quote"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8 text, got {error}; save the file as UTF-8") from error
    return Records(header, rows, lines, problems)


def _refuse_other_separators(path: Path, first: str) -> None:
    """Refuse a file whose first line has other separators than commas, as spreadsheets of many countries write them.

    Raises:
        ValueError: With how to save it.
    """
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if mark in first and "," not in first:
            raise ValueError(
                f"{path}: expected commas between the cells, got {name}: {short(first.strip())}; save it as CSV with "
                "commas: in LibreOffice as the field delimiter, in Excel as the list separator of the system"
            )


_Parsed = TypeVar("_Parsed")


def read_rows(
    path: Path, parse: Callable[[dict[str, Any]], _Parsed], example: str, share: tuple[int, int] = (1, 1)
) -> list[_Parsed]:
    """Rows of a JSONL(.gz), CSV(.gz) or Parquet file; all malformed ones are reported together as ``file:line``.

    Args:
        path: The file.
        parse: What makes a row of a record.
        example: What a record looks like, for the error about an empty file.
        share: ``(i, n)``, only the i-th of n equal parts: one after the other they are all rows in their order.

    Raises:
        ValueError: If the file cannot be read, is empty, or a row of the share is malformed.
    """
    table = read_table(path) if path.name.endswith(TABLES) else None
    records = read_records(path) if table is None else Records([], [], list(range(table.num_rows)), [])
    part = slice(*((place * len(records.lines)) // share[1] for place in (share[0] - 1, share[0])))
    some = records.rows[part] if table is None else table_records(path, table[part]).rows  # only these are made
    rows, problems = [], records.problems
    for line, record in zip(records.lines[part], some, strict=True):
        try:
            rows.append(parse(record))
        except ValueError as error:
            problems.append((line, str(error)))
    if problems:
        lines = [f"{position(path, line)}: {text}" for line, text in sorted(problems)]
        raise ValueError(listed(counted(len(problems), "malformed row"), lines, indent=""))
    if not records.lines:
        raise ValueError(f"expected rows like {example} in {path}, got an empty file")
    return rows
