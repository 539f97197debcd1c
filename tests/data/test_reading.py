"""JSONL and CSV that Arrow reads give what their rows give, and what only rows can tell is told by them."""

from __future__ import annotations

import csv
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plm.data import reading, text_tables
from plm.data.schema import PairTable, read_pairs
from tests.changed_bytes import changed_bytes

ROWS = [
    {"user_id": f"n{user}", "prompt": f"p{number % 3}", "chosen": f"good {number}", "rejected": f"bad\n{user}"}
    for user in range(4)
    for number in range(5)
]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def outcome(path: Path, **options: Any) -> Any:
    """Every array and text of the table, or the message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            table: PairTable = read_pairs([path], **options)
        except ValueError as error:
            return str(error)
    texts = table.texts()
    pairs = [(texts[first], texts[second]) for first, second in zip(table.chosen, table.rejected, strict=True)]
    numbered = {"prompts", "responses", "items", "prompt", "chosen", "rejected"}
    others = {name: value for name, value in vars(table).items() if name not in numbered}
    shown = {
        name: [*map(repr, value.ravel())] if isinstance(value, np.ndarray) else value for name, value in others.items()
    }
    return {**shown, "pairs": pairs}


def both(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """What Arrow gives, where it is asked, after a comparison with what rows give."""
    fast = outcome(path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_read_text", lambda path, layout: None)
        assert outcome(path, **options) == fast
    return fast


def is_read_by_arrow(path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    def refuse(path: Path) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(reading, "read_records", refuse)
        try:
            read_pairs([path])
        except AssertionError:
            return False
        return True


OPTIONAL = {"weight": 2, "tie": True, "timestamp": "2020-01-02", "turn": 3, "dialogue_id": 7, "row_split": "test"}


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [{**row, **OPTIONAL, "chosen_score": 1.5, "unread": None} for row in ROWS],
        [{**row, "user_id": number % 3} for number, row in enumerate(ROWS)],
        [{**ROWS[0], "weight": 1}, {**ROWS[1], "weight": 0.5}, ROWS[2], {**ROWS[3], "weight": None}],
        [{**row, "prompt": "2020-01-02"} for row in ROWS],
    ],
    ids=["plain", "optional", "integers", "numbers", "dates"],
)
def test_plain_rows_are_read_by_arrow(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(rows))
    assert isinstance(both(path, monkeypatch), dict) and is_read_by_arrow(path, monkeypatch)


FIRST = lines(ROWS * 20)
"""More rows than are looked at first."""


@pytest.mark.parametrize(
    "more",
    [
        "\n" + lines(ROWS[:1]),
        " \n" + lines(ROWS[:1]),
        lines(ROWS[:2]).replace("}\n{", "}{"),
        lines(ROWS[:2]).replace("}\n{", "}{") + "\n",
        lines([{**ROWS[0], "weight": 2.0, "chosen": "new"}]),
        lines([{**ROWS[0], "user_id": 7}]),
        lines([{**ROWS[0], "unread": float("nan")}]),
        lines([{**ROWS[0], "chosen": [{"role": "assistant", "content": "x"}]}]),
        lines([{**ROWS[0], "chosen": '[{"role": "assistant", "content": "x"}]'}]),
        lines([{**ROWS[0], "chosen": "new", "winner": "left"}]),
        '{"user_id": "a", "user_id": "b", "prompt": "p", "chosen": "x", "rejected": "y"}\n',
        '{"user_id": "a", "prompt": "p", "chosen": "\\ud800", "rejected": "y"}\n',
        "{\n",
        lines([{**ROWS[0], "meta": "x"}]).replace('"x"', "[" * 20_000 + "]" * 20_000),
        lines([{**ROWS[0], "meta": {"x": float("nan")}}]),
        lines([{**ROWS[0], "chosen": "new", "late": 1}]),
        lines(ROWS[:2]).replace("}\n{", "}{") + " \n",
        lines(ROWS[:1]).replace(", ", ",\n") + lines(ROWS[:4]).replace("}\n{", "}{"),
        "null\n",
        lines([{**ROWS[0], "unread": 1}]).replace("}\n", "}\r\n"),
    ],
)
def test_what_only_rows_tell_is_told_by_them(more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line numbers, numbers that are none, columns and kinds that come late, lists that are printed, and errors."""
    path = tmp_path / "a.jsonl"
    path.write_text(FIRST + more)
    both(path, monkeypatch)
    assert not is_read_by_arrow(path, monkeypatch)


@pytest.mark.parametrize("more", [b'"note": "\xff\xfe"', b'"\xff": 1'])
def test_bytes_that_are_no_text_are_named(more: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    noted = lines([{**row, "note": "x"} for row in ROWS * 20]).encode()
    path.write_bytes(noted + b'{"user_id": "v", "prompt": "p", "chosen": "a", "rejected": "b", ' + more + b"}\n")
    assert f"{path}:401: malformed JSON (expected UTF-8" in both(path, monkeypatch)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"user_id": value} for value in (1.0, 2**53 + 1, 2**53)], {}),
        ([{"dialogue_id": value} for value in (1.0, None, 12345678901234567)], {}),
        ([{"m.w": 1.0, "m": {"w": 2.0}}, {"m": {"w": 3.0}}], {"columns": {"weight": "m.w"}}),
        ([{"s": 1.0}, {"s": None}], {"attributes": {"s": 1.0}}),
        ([{"tie": 1.0}, {"tie": -0}], {}),
        ([{"user_id": '["a","b"]', "winner": '["left","right"]'}], {"winner": {"column": "winner"}}),
        ([{"user_id": "a", "winner": "left"}, {"user_id": "b", "winner": "right"}], {"winner": {"column": "winner"}}),
        ([{"user_id": "a", "tie": None}, {"user_id": "b", "tie": True}], {}),
        ([{"\ud800": 1}], {}),
    ],
)
def test_columns_are_read_alike(
    rows: list[dict[str, Any]], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{**ROWS[number], **row} for number, row in enumerate(rows)]))
    both(path, monkeypatch, **options)


def test_errors_name_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(FIRST + lines([{**ROWS[0], "chosen": ROWS[0]["rejected"]}]))
    assert f"{path}:401: chosen equals rejected" in both(path, monkeypatch)
    assert both(path, monkeypatch, on_error="skip")["dropped"]["malformed"] == 1


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_files_are_read_alike(data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes changed, taken out or put in anywhere: one table or one message, whoever reads."""
    content = lines([{**row, "weight": 1.5, "tie": False} for row in ROWS]).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(changed_bytes(data, content))
    both(path, monkeypatch)


# ---------------------------------------------------------------------- CSV
def cells(rows: list[dict[str, Any]], end: str = "\r\n") -> str:
    """Rows as Python's csv module writes them."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def written_csv(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


MARKED = [
    {**row, "note": f'said "{number}"\r\nand, then\nleft', "chosen": f'"{number}",\n\ngood'}
    for number, row in enumerate(ROWS)
]


@pytest.mark.parametrize("end", ["\r\n", "\n"])
@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        MARKED,
        [{**row, **OPTIONAL, "tie": "", "weight": "" if number % 2 else 2} for number, row in enumerate(ROWS)],
        [{**row, "chosen": "", "weight": "0x"} for row in ROWS],
        [{**row, "a\nname": "x", "user_id": number % 3} for number, row in enumerate(ROWS)],
        [],
    ],
    ids=["plain", "marks", "optional", "wrong", "names", "none"],
)
def test_cells_are_read_by_arrow(
    rows: list[dict[str, Any]], end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written_csv(tmp_path / "a.csv", cells(rows, end) if rows else "user_id,prompt,chosen,rejected" + end)
    both(path, monkeypatch)
    monkeypatch.setattr(reading, "read_records", None)
    outcome(path)


def test_errors_name_the_line_on_which_a_row_of_many_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written_csv(tmp_path / "a.csv", cells([*MARKED, {**MARKED[0], "chosen": ROWS[0]["rejected"]}]))
    assert (
        len(MARKED) == 20
    )  # below the line of names; each has four ends in its cells and one of its own, two in a name
    assert f"{path}:122: chosen equals rejected" in both(path, monkeypatch)


@pytest.mark.parametrize(
    "more",
    [
        "\n",
        "\nu,p,x,y\n",
        "u,p\rq,x,y\n",
        "u,p,x\n",
        "u,p,x,y,z\n",
        'u,p,"x"z,y\n',
        'u,p, "x",y\n',
        'u,p,x"x,y\n',
        'u,p,"x,y\n',
        'u,p,"x"',
        'u,p,"[{""role"": ""user"", ""content"": ""x""}]",y\n',
        "   \n",
    ],
)
def test_cells_that_only_rows_tell(more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written_csv(tmp_path / "a.csv", cells(ROWS * 20, "\n") + more)
    both(path, monkeypatch)
    assert not is_read_by_arrow(path, monkeypatch)


@pytest.mark.parametrize(
    "more", [b"u,p,\xff,y\n", b"u,p,\0,y\n", b'u,"a\rb",x,y', b"u,p,x,y", b'"u","","x",""""\n', b'u,p,"x\n\n",y']
)
def test_odd_cells_are_read_alike(more: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + cells(ROWS * 20, "\n").encode() + more)
    both(path, monkeypatch)


def test_blocks_that_end_anywhere_are_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotes, ends of lines and braces are told across the ends of blocks."""
    quoted = written_csv(tmp_path / "a.csv", cells(MARKED))
    objects = written_csv(tmp_path / "a.jsonl", lines(ROWS))
    for size in range(1, 40):
        monkeypatch.setattr(text_tables, "_BLOCK", size)
        assert text_tables._num_csv_lines(quoted) == quoted.read_bytes().count(b"\n")
        assert text_tables._num_objects(objects) == len(ROWS)


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_cells_are_read_alike(data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = cells([{**row, "weight": 1.5, "tie": ""} for row in MARKED[:8]]).encode()
    path = tmp_path / "a.csv"
    path.write_bytes(changed_bytes(data, content))
    both(path, monkeypatch)
