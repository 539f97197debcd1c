"""Rows of output go to their file one by one."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plm.cli.writing import write_rows


class Row(dict[str, Any]):
    """A row that can be watched."""


def test_rows_are_not_held_all_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refs: list[weakref.ref[Any]] = []
    most = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal most
        for number in range(50):
            row = Row(number=number)
            refs.append(weakref.ref(row))
            most = max(most, sum(ref() is not None for ref in refs))
            yield row

    path = tmp_path / "rows.jsonl"
    write_rows(rows(), str(path), "thing")
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [*range(50)]
    assert most <= 3
    assert capsys.readouterr().err == f"50 things written to {path}\n"
    write_rows([], str(path))
    assert path.read_text() == "" and capsys.readouterr().err == f"0 rows written to {path}\n"
