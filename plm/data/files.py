"""Files to rows, and pairs files to factorised columns: JSONL, JSON, CSV (all also .gz) and Parquet, unvalidated.

Axes: N rows of a file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plm.arrays import IntArray
from plm.data.values import is_number, short
from plm.messages import closest, first_of, nearest

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
    "winner",
)
csv.field_size_limit(sys.maxsize)  # texts may be longer than the 131,072 characters that are usual
_WINNERS = ("winner", "preferred", "preference", "better", "choice", "label")
FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")


class Column(NamedTuple):
    """A factorised column: distinct values stored once."""

    codes: IntArray  # (N,) row of values, -1 = null
    values: list[Any]


class Records(NamedTuple):
    """Rows of one file as they are; CSV cells are texts."""

    names: list[str]
    """All columns."""
    rows: list[dict[str, Any]]
    lines: list[int]
    """Line of every row; Parquet and JSON: its number from 0."""
    problems: list[tuple[int, str]]
    """Lines that could not be parsed."""


class RawPairs(NamedTuple):
    """Columns of one file under our names, unvalidated."""

    columns: dict[str, Column]
    lines: IntArray
    problems: list[tuple[int, str]]


def column_names(columns: dict[str, str | None]) -> dict[str, str]:
    """Our name -> the file's name, for every column that is to be read."""
    known = (*REQUIRED, *OPTIONAL)
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise ValueError(
            f"columns: expected keys among {', '.join(known)}, got {unknown!r}{nearest(unknown[0], known)}"
        )
    unread = [name for name in REQUIRED if name in columns and columns[name] is None]
    if unread:
        raise ValueError(f"columns: {unread!r} are required and cannot be null")
    named = {name: columns.get(name, name) for name in known}
    return {name: file_name for name, file_name in named.items() if file_name is not None}


def position(file: str | Path, line: int) -> str:
    """Where a row stands, for messages."""
    return f"{file}:row {line}" if str(file).endswith((".parquet", ".json", ".json.gz")) else f"{file}:{line}"


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


def read_records(path: Path) -> Records:
    """Read all rows and columns of one file.

    Args:
        path: The file; its ending says the format.

    Raises:
        ValueError: If the format is unknown or the file is not of that format.
    """
    if _format(path) == "parquet":
        with _parquet_errors(path):
            table = pq.read_table(path)
            _once(path, table.column_names)
            return Records(table.column_names, table.to_pylist(), list(range(table.num_rows)), [])
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as stream:
            readers = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv}
            return readers[_format(path)](path, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got a damaged one ({error}); write it again") from error


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """Report what Arrow cannot read or Python cannot hold as an error of the file."""
    try:
        yield
    except (pa.ArrowException, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a Parquet file, got {error}") from error


def _once(path: Path, names: Sequence[str]) -> None:
    """Refuse a file in which two columns have one name."""
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"{path}: expected each column once, got {', '.join(map(repr, twice))} again; rename one")


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
    if _format(path) == "parquet":
        return _read_parquet(path, names)
    records = read_records(path)
    if _format(path) != "csv" and "responses" in records.names:
        records = _graded_pairs(records, names)
    if records.names:
        _require(path, names, records.names)
        _refuse_unread_winner(path, names, records.names)
    found = {name: file_name for name, file_name in names.items() if file_name in records.names}
    columns = {name: factorise(row.get(file_name) for row in records.rows) for name, file_name in found.items()}
    if _format(path) == "csv":
        for name in OPTIONAL:  # an empty cell means "not given"
            if name in columns and "" in columns[name].values:
                codes, values = columns[name]
                columns[name] = Column(np.where(codes == values.index(""), -1, codes), values)
    return RawPairs(columns, np.array(records.lines, dtype=np.int64), records.problems)


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


def _format(path: Path) -> str:
    if not path.name.endswith(FORMATS):
        raise ValueError(f"{path}: expected a file ending in {', '.join(FORMATS)}, got {path.suffix!r}")
    return path.name.removesuffix(".gz").rsplit(".", 1)[-1]


def _read_parquet(path: Path, names: dict[str, str]) -> RawPairs:
    with _parquet_errors(path):
        present = pq.read_schema(path).names
        _once(path, present)
        _require(path, names, present)
        _refuse_unread_winner(path, names, present)
        found = {name: file_name for name, file_name in names.items() if file_name in present}
        table = pq.read_table(path, columns=list(dict.fromkeys(found.values())))
        columns = {name: _factorise_arrow(table.column(file_name)) for name, file_name in found.items()}
    return RawPairs(columns, np.arange(table.num_rows, dtype=np.int64), [])


def _factorise_arrow(column: Any) -> Column:
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
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
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


def _read_csv(path: Path, stream: Any) -> Records:
    header: list[str] = []
    rows, lines, problems = [], [], []
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, [])
            _once(path, header)
            end = reader.line_num
            for cells in reader:
                start, end = end + 1, reader.line_num  # a quoted cell may span lines: name the first one
                if not cells:
                    continue
                if len(cells) != len(header):
                    problems.append((start, f"expected {len(header)} cells, got {len(cells)}: {short(cells)}"))
                    continue
                rows.append(dict(zip(header, cells, strict=True)))
                lines.append(start)
        except csv.Error as error:
            problems.append((reader.line_num, f"malformed CSV ({error})"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8 text, got {error}; save the file as UTF-8") from error
    return Records(header, rows, lines, problems)


def stack(name: str, raws: Sequence[RawPairs]) -> Column | None:
    """Concatenate one column over the files; None where no file has it."""
    if not any(name in raw.columns for raw in raws):
        return None
    codes: list[IntArray] = []
    values: list[Any] = []
    for raw in raws:
        column = raw.columns.get(name, Column(np.full(len(raw.lines), -1, dtype=np.int64), []))
        codes.append(np.where(column.codes >= 0, column.codes + len(values), -1))
        values += column.values
    return Column(np.concatenate(codes), values)


_Parsed = TypeVar("_Parsed")


def read_rows(path: Path, parse: Callable[[dict[str, Any]], _Parsed], example: str) -> list[_Parsed]:
    """Rows of a JSONL(.gz), CSV(.gz) or Parquet file; all malformed ones are reported together as ``file:line``."""
    records = read_records(path)
    rows, problems = [], records.problems
    for line, record in zip(records.lines, records.rows, strict=True):
        try:
            rows.append(parse(record))
        except ValueError as error:
            problems.append((line, str(error)))
    if problems:
        lines = [f"{position(path, line)}: {text}" for line, text in sorted(problems)]
        raise ValueError("\n".join([f"{len(problems)} malformed rows", *first_of(lines)]))
    if not rows:
        raise ValueError(f"expected rows like {example} in {path}, got an empty file")
    return rows
