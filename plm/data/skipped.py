"""Rows of files that were left out because they are malformed, kept where a person finds and mends them."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from plm.atomic import whole_file
from plm.data.files import TABLES, read_records
from plm.data.schema import PairTable

NAME = "skipped.ndjson"
"""Name of the file in the folder of a run or report; no pattern of files of pairs, such as ``*.jsonl``, matches it."""


def write_skipped(table: PairTable, path: str | Path) -> bool:
    """Write the malformed rows of a table's files, if it left out any: one line of JSON each.

    A line holds ``file``, ``line`` (of tables and JSON the row, from 0), ``problems``, and ``row`` as it was read, or
    ``text`` where it could not be read as a row.

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
        return False
    with whole_file(path) as out:
        for file, lines in problems.items():
            content = _content(Path(table.files[file]), set(lines))
            for line, texts in lines.items():
                entry = {"file": table.files[file], "line": line, "problems": texts, **content.get(line, {})}
                out.write(json.dumps(entry, default=str).encode() + b"\n")
    return True


def _content(path: Path, lines: set[int]) -> dict[int, dict[str, Any]]:
    """Line -> what stands there, as ``row`` or as ``text``."""
    records = read_records(path)
    content: dict[int, dict[str, Any]] = {
        line: {"row": row} for line, row in zip(records.lines, records.rows, strict=True) if line in lines
    }
    if not path.name.endswith((*TABLES, ".json", ".json.gz")) and len(content) < len(lines):
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as stream:
            for line, text in enumerate(stream, start=1):
                if line in lines and line not in content:
                    content[line] = {"text": text.decode(errors="replace").rstrip("\r\n")}
    return content
