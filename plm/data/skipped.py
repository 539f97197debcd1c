"""Rows of files that were left out because they are malformed, kept where a person finds and mends them."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import count
from math import isfinite
from pathlib import Path
from typing import Any

import pyarrow as pa

from plm.atomic import map_leaves, whole_file
from plm.data.files import TABLES, opened, read_records, read_table
from plm.data.schema import PairTable

NAME = "skipped.ndjson"
"""Name of the file in the folder of a run or report; no pattern of files of pairs, such as ``*.jsonl``, matches it."""


def write_skipped(table: PairTable, path: str | Path) -> bool:
    """Write the malformed rows of a table's files, if it left out any: one line of JSON each.

    A line holds ``file``, ``line`` (of tables and JSON the row, from 0), ``problems``, and ``row`` as it was read, or
    ``text`` where it could not be read as a row. A file that is there is replaced, or removed where there are none.

    Args:
        table: What `plm.data.schema.read_pairs` returned with ``on_error="skip"``.
        path: The file to write.

    Returns:
        Whether there were any.
    """
    problems: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file, line, problem in table.skipped:
        problems[file][line].append(problem)
    if not problems:
        Path(path).unlink(missing_ok=True)  # what was written before the file was mended
        return False
    with whole_file(path) as out:
        for file, lines in problems.items():
            content = _content(Path(table.files[file]), list(lines))
            for line, texts in lines.items():
                entry = {"file": table.files[file], "line": line, "problems": texts}
                try:
                    text = json.dumps({**entry, **map_leaves(content.get(line, {}), _plain)})
                except RecursionError:
                    text = json.dumps({**entry, "text": "its brackets are too deep to be kept"})
                out.write(text.encode() + b"\n")
    return True


def unused(path: Path) -> Path:
    """The path, or the next with a number that nothing has: what others wrote is kept."""
    numbered = (path.with_name(path.name.replace(".", f"-{number}.", 1)) for number in count(2))
    return path if not path.exists() else next(one for one in numbered if not one.exists())


def _content(path: Path, lines: list[int]) -> dict[int, dict[str, Any]]:
    """Line -> what stands there, as ``row`` or as ``text``."""
    if path.name.endswith(TABLES):
        rows = read_table(path).take(lines)
        return {line: {"row": _row(rows.slice(place, 1))} for place, line in enumerate(lines)}
    if path.name.endswith((".json", ".json.gz")):
        with opened(path) as stream:
            entries = json.loads(stream.read().decode("utf-8-sig"))
        return {line: {"row": entries[line]} for line in lines}
    wanted, records = set(lines), read_records(path)
    content: dict[int, dict[str, Any]] = {
        line: {"row": row} for line, row in zip(records.lines, records.rows, strict=True) if line in wanted
    }
    begins = {*records.lines, *(line for line, _ in records.problems)}
    texts: dict[int, str] = {line: "" for line in wanted - content.keys()}
    at = 0
    with opened(path) as stream:
        for line, text in enumerate(stream, start=1):
            at = line if line in begins else at  # a cell of CSV may go over several lines
            if at in texts:
                texts[at] += text.decode(errors="replace")
    return content | {line: {"text": text.rstrip("\r\n")} for line, text in texts.items()}


def _row(row: pa.Table) -> dict[str, Any]:
    """One row of a table; what Python cannot hold, such as a date millions of years away, as Arrow prints it."""
    cells: dict[str, Any] = {}
    for name, column in zip(row.column_names, row.columns, strict=True):
        try:
            cells[name] = column[0].as_py()
        except (pa.ArrowException, OverflowError, ValueError):
            cells[name] = str(column[0].cast(pa.int64()) if pa.types.is_temporal(column.type) else column[0])
    return cells


def _plain(value: Any) -> Any:
    """A value as JSON holds it."""
    is_json = value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and isfinite(value))
    return value if is_json else str(value)
