"""A column that names the preferred response is read as it says, and is never overlooked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plm.cli import main
from plm.data.schema import PairTable, read_pairs

SIDES: dict[str, str | None] = {"chosen": "one", "rejected": "two"}
ROW = {"user_id": "u", "prompt": "p", "one": "a", "two": "b"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(table: PairTable) -> list[tuple[str, str, str, str]]:
    texts = table.texts()
    columns = zip(table.user, table.prompt, table.chosen, table.rejected, strict=True)
    return [(table.user_ids[u], table.prompts[p], texts[c][1], texts[r][1]) for u, p, c, r in columns]


FORMATS = pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])


@FORMATS
def test_the_winner_is_chosen_and_scores_go_with_their_response(tmp_path: Path, ending: str) -> None:
    answers = [("a", "b", "B"), ("c", "d", "A"), ("e", "f", "same"), ("g", "h", "both_bad")]
    rows = [
        {"user_id": "u", "prompt": "p", "one": left, "two": right, "better": word, "s1": 1.0, "s2": 2.0}
        for left, right, word in answers
    ]
    path = write(tmp_path / f"pairs.{ending}", rows)
    columns = {**SIDES, "chosen_score": "s1", "rejected_score": "s2"}
    winner = {"column": "better", "left": "A", "right": "B", "tie": ["same", "both_bad"]}
    table = read_pairs([path], columns, winner)
    assert [pair[2:] for pair in plain(table)] == [("b", "a"), ("c", "d"), ("e", "f"), ("g", "h")]
    assert table.tie.tolist() == [False, False, True, True]
    assert table.chosen_score.tolist() == [2, 1, 1, 1] and table.rejected_score.tolist() == [1, 2, 2, 2]
    with pytest.raises(ValueError, match=r"the column 'better' \('A', 'B', 'both_bad', 'same'\) seems to say .*better"):
        read_pairs([path], columns)
    assert [pair[2:] for pair in plain(read_pairs([path], columns, {"column": None}))] == [
        tuple(a[:2]) for a in answers
    ]
    with pytest.raises(ValueError, match=r"(:[34]|row 2): winner: expected one of .*, got 'same'"):
        read_pairs([path], columns, {"column": "better", "tie": "both_bad"})


@pytest.mark.parametrize(
    ("left", "right", "more"),
    [
        ("left", "right", {}),
        ("Model A", "model_b", {}),
        ("one", "TWO", {}),  # names of the columns
        (1, 0, {"left": 1, "right": 0}),
        ("1.0", "0.0", {"left": 1, "right": 0}),
        (True, False, {"left": True, "right": False}),
        (-2, 2, {"left": [-1, -2, -3], "right": [1, 2, 3], "tie": 0}),
        ("b", "a", {"left": "b", "right": "a"}),  # what the options say wins over what a word says by itself
    ],
)
def test_labels(tmp_path: Path, left: Any, right: Any, more: dict[str, Any]) -> None:
    rows = [{**ROW, "best": right}, {**ROW, "prompt": "q", "best": left}]
    for ending in ("jsonl", "csv"):
        table = read_pairs([write(tmp_path / f"pairs.{ending}", rows)], SIDES, {"column": "best", **more})
        assert plain(table) == [("u", "p", "b", "a"), ("u", "q", "a", "b")]


def test_mistakes_in_the_options(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{**ROW, "best": "left"}])
    for winner, message in [
        (
            {"column": "best", "first": "A"},
            r"winner: expected keys column, left, right, tie, got \['column', 'first'\]",
        ),
        ({"left": "A"}, r"winner: expected keys column, left, right, tie, got \['left'\]"),
        ({"column": "best", "left": "A", "right": ["B", "a"]}, "winner: the label 'a' means both left and right"),
        ({"column": "bst"}, r"column 'bst' is missing; did you mean 'best'\? Set winner={'column': 'best'}"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_pairs([path], SIDES, winner)
    with pytest.raises(ValueError, match=r"set winner={'column': 'best'}"):
        read_pairs([path], {**SIDES, "winner": "best"})


def test_a_winner_must_be_given(tmp_path: Path) -> None:
    for ending, empty in (("jsonl", None), ("csv", "")):
        path = write(tmp_path / f"pairs.{ending}", [{**ROW, "best": "two"}, {**ROW, "best": empty, "prompt": "q"}])
        with pytest.raises(ValueError, match=r"pairs\.\w+:[23]: winner: missing or null"):
            read_pairs([path], SIDES, {"column": "best"})


# ---------------------------------------------------------------------- never overlooked
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("comparison", ["left", "right"]),
        ("pw", ["left", "right"]),  # Label Studio's name is the author's
        ("winner", ["model_a", "tie (bothbad)"]),
        ("overall", ["response-0", "response-1"]),
        ("preference.responses", ["['response-0']", "['response-1']"]),
        ("which", ["one", "two"]),
        ("preferred", ["A", "B"]),
        ("label", [0, 1]),
        ("choice", [1, 2]),
        ("is_better", [True, False]),
        ("best_one", ["resp1", "resp2"]),  # few labels under such a name are evidence, whatever they are
    ],
)
def test_a_column_that_names_the_winner_is_not_ignored(tmp_path: Path, column: str, values: list[Any]) -> None:
    rows = [{**ROW, column: values[number % 2], "prompt": f"p{number}"} for number in range(4)]
    for ending in ("jsonl", "json", "csv", "parquet"):
        with pytest.raises(ValueError, match=rf"the column '{column}' .*set winner={{'column': '{column}'"):
            read_pairs([write(tmp_path / f"pairs.{ending}", rows)], SIDES)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("label", ["toxic", "fine"]),  # a name alone is no evidence
        ("grade", ["A", "B"]),  # nor are letters and numbers under another name
        ("number", [0, 1]),
        ("choice", [None, None]),
        ("comment", ["left it", "right"]),
    ],
)
def test_other_columns_do_not_hinder(tmp_path: Path, column: str, values: list[Any]) -> None:
    rows = [{**ROW, column: values[number % 2], "prompt": f"p{number}"} for number in range(4)]
    for ending in ("jsonl", "parquet"):
        assert read_pairs([write(tmp_path / f"pairs.{ending}", rows)], SIDES).num_pairs == 4


def test_a_winner_beside_chosen_and_rejected_is_not_overlooked_either(tmp_path: Path) -> None:
    row = {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "pairs.jsonl", [{**row, "winner": "model_b", "label": 1}])
    with pytest.raises(ValueError, match="the column 'winner'"):
        read_pairs([path])
    assert plain(read_pairs([path], None, {"column": None})) == [("u", "p", "a", "b")]
    assert plain(read_pairs([path], None, {"column": "winner"})) == [("u", "p", "b", "a")]


# ---------------------------------------------------------------------- several people in a row
ARGILLA: dict[str, str | None] = {
    **SIDES,
    "user_id": "pick.responses.users",
    "status": "pick.responses.status",
}


@FORMATS
def test_lists_of_users_and_winners_are_as_many_pairs(tmp_path: Path, ending: str) -> None:
    """As Argilla exports records: lists, in a CSV in their printed form; drafts are no judgements."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": "p",
            "one": "a",
            "two": "b",
            "pick.responses": ["two", "one", "one"],
            "pick.responses.users": ["anna", "ben", "eve"],
            "pick.responses.status": ["submitted", "submitted", "draft"],
        },
        {
            "prompt": "q",
            "one": "c",
            "two": "d",
            "pick.responses": ["one"],
            "pick.responses.users": ["anna"],
            "pick.responses.status": ["submitted"],
        },
    ]
    path = write(tmp_path / f"records.{ending}", rows)
    table = read_pairs([path], ARGILLA, {"column": "pick.responses"})
    assert plain(table) == [("anna", "p", "b", "a"), ("ben", "p", "a", "b"), ("anna", "q", "c", "d")]
    assert table.dropped == {"not_submitted": 1}
    assert len({table.position(row) for row in (0, 1)}) == 1


def test_the_tasks_of_label_studio(tmp_path: Path) -> None:
    """The JSON export: answers below data, annotations in a list, a result in each."""
    answers = [("right", 3), ("left", {"id": 4}), (None, 5)]
    tasks = [
        {
            "id": 1,
            "data": {"prompt": "p", "answer1": "a", "answer2": "b"},
            "annotations": [
                {
                    "completed_by": by["id"] if isinstance(by, dict) else by,
                    "result": [] if side is None else [{"type": "pairwise", "value": {"selected": side}}],
                }
                for side, by in answers
            ],
        }
    ]
    columns: dict[str, str | None] = {
        "user_id": "annotations.completed_by",
        "prompt": "data.prompt",
        "chosen": "data.answer1",
        "rejected": "data.answer2",
    }
    path = write(tmp_path / "tasks.json", tasks)
    table = read_pairs([path], columns, {"column": "annotations.result.value.selected"})
    assert plain(table) == [("3", "p", "b", "a"), ("4", "p", "a", "b")]
    assert table.dropped == {"unanswered": 1}


def test_lists_of_other_lengths_are_refused(tmp_path: Path) -> None:
    row = {**ROW, "user_id": ["u", "v"], "best": ["one"]}
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: expected lists of one length, got 2 user_id and 1 winner"):
        read_pairs([write(tmp_path / "pairs.jsonl", [row])], SIDES, {"column": "best"})


# ---------------------------------------------------------------------- the command line
def test_the_command_line_reads_a_winner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**ROW, "prompt": f"p{number}", "best": "LRSN"[number % 4]} for number in range(8)]
    args = ["data", "check", "--pairs", str(write(tmp_path / "pairs.csv", rows)), "--output", str(tmp_path / "out")]
    args += ["--columns", "chosen=one", "rejected=two"]
    assert main([*args, "--winner", "column=best", "left=L", "right=R", "tie=S", "tie=N"]) == 0
    assert main([*args, "--winner", "column=best", "left=L", "right=R", "tie=S"]) == 1
    shown = capsys.readouterr().err
    assert "pairs.csv:5: winner: expected one of left, right, tie, a, model_a, response_a, b, " in shown
    assert "say what the labels 'N' mean by winner: {column: best, left: ..., right: ..., tie: ...} (--winner" in shown
    assert main(args) == 1
    assert '(--winner "column=best" "left=<label of one>" "right=<label of two>")' in capsys.readouterr().err
    assert main([*args, "--winner", "column="]) == 0


def test_the_only_score_goes_with_its_response(tmp_path: Path) -> None:
    row = {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 5, "winner": "b"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    table = read_pairs(tmp_path / "a.jsonl", winner={"column": "winner"})
    assert table.texts()[table.chosen[0]] == ("p", "b")
    assert np.isnan(table.chosen_score[0]) and table.rejected_score[0] == 5
