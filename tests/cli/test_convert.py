"""`plm data convert`: the guess is shown, and the file it writes holds the pairs that were in the first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from plm.cli import main
from plm.data.conversion import write_pairs
from plm.data.schema import PairTable, read_pairs

ROWS = [
    {"prompt": f"Q{n}", "answer1": f"x{n}", "answer2": f"y{n}", "comparison": word, "annotator": n % 2, "id": n}
    for n, word in enumerate(["left", "right", "right", "left"])
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(table: PairTable) -> list[tuple[str, ...]]:
    texts = table.texts()
    columns = zip(table.user, table.chosen, table.rejected, strict=True)
    return [(table.user_ids[u], *texts[c], texts[r][1]) for u, c, r in columns]


def test_a_file_is_guessed_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, to = write(tmp_path / "export.jsonl", ROWS), tmp_path / "new" / "pairs.parquet"
    assert main(["data", "convert", str(path), "--to", str(to)]) == 0
    shown = capsys.readouterr().out
    assert "export.jsonl is read as label_studio: CSV or JSON-MIN export of Label Studio's" in shown
    assert "  user_id     annotator\n" in shown and "  winner      comparison\n" in shown
    assert "  not read    id\n" in shown
    assert 'in a recipe, data.source.init_args: {"layout": "label_studio"}' in shown
    assert shown.count("  chosen    '") == 3 and "export.jsonl:2: user '1'\n  prompt    'Q1'\n  chosen    'y1'" in shown
    assert "4 pairs of 2 users written to" in shown
    assert plain(read_pairs([to])) == [
        ("0", "Q0", "x0", "y0"), ("1", "Q1", "y1", "x1"), ("0", "Q2", "y2", "x2"), ("1", "Q3", "x3", "y3")
    ]  # fmt: skip


def test_what_pairs_say_besides_is_kept(tmp_path: Path) -> None:
    rows = [
        {"user_id": "u", "prompt": [{"role": "user", "content": "Hi"}], "chosen": "a", "rejected": "b", "tie": True},
        {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b", "weight": 2, "chosen_score": 0.5, "turn": 0},
        {"user_id": "v", "prompt": "p", "chosen": "a", "rejected": "b", "dialogue_id": "d", "timestamp": 1.5},
    ]
    for row, split in zip(rows, ("train", "val", "test"), strict=True):
        row |= {"row_split": split, "user_split": "unseen" if row["user_id"] == "v" else "seen"}
    table = read_pairs([write(tmp_path / "a.jsonl", rows)])
    write_pairs(table, tmp_path / "b.parquet", [])
    again = read_pairs([tmp_path / "b.parquet"])
    assert plain(again) == plain(table) and again.prompts == table.prompts and again.dialogues == ["d"]
    for name in (
        "weight",
        "tie",
        "chosen_score",
        "rejected_score",
        "dialogue",
        "turn",
        "timestamp",
        "row_split",
        "user_split",
    ):
        assert repr(getattr(again, name).tolist()) == repr(getattr(table, name).tolist()), name


def test_an_ambiguous_file_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2], "ranking": [1, 2]}])
    args = ["data", "convert", str(path), "--to", str(tmp_path / "pairs.parquet")]
    assert main(args) == 1
    assert "--layout ranking" in capsys.readouterr().err and not (tmp_path / "pairs.parquet").exists()
    assert main([*args, "--layout", "ranking"]) == 0
    assert plain(read_pairs([tmp_path / "pairs.parquet"])) == [("everyone", "p", "a", "b")]
    assert main([*args, "--layout", "ratings"]) == 0
    assert plain(read_pairs([tmp_path / "pairs.parquet"])) == [("everyone", "p", "b", "a")]


def test_the_input_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.parquet"
    write_pairs(
        read_pairs([write(tmp_path / "a.jsonl", [{"user_id": 1, "prompt": "p", "chosen": "a", "rejected": "b"}])]),
        path,
        [],
    )
    before = path.read_bytes()
    os.link(path, tmp_path / "link.parquet")
    for to in (path, tmp_path / "link.parquet", tmp_path / "." / "pairs.parquet"):
        assert main(["data", "convert", str(path), "--to", str(to)]) == 1
        assert "expected an output beside the input" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main(["data", "convert", str(path), "--to", str(tmp_path / "a.csv")]) == 1
    assert "expected an output ending in .parquet" in capsys.readouterr().err


def test_a_malformed_row_leaves_the_target_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS * 70, {**ROWS[0], "comparison": "middle"}]  # behind the rows that are looked at
    to = tmp_path / "pairs.parquet"
    to.write_bytes(b"before")
    assert main(["data", "convert", str(write(tmp_path / "a.jsonl", rows)), "--to", str(to)]) == 1
    assert "a.jsonl:281: winner: expected one of" in capsys.readouterr().err
    assert to.read_bytes() == b"before"
    assert main(["data", "convrt"]) == 1 and "did you mean 'convert'" in capsys.readouterr().err


def test_nothing_of_a_file_steers_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"user_id": "u", "prompt": "\x1b[2J", "chosen": "a\x1b]0;", "rejected": "b", "x\x1b[31m": 1}
    assert main(["data", "convert", str(write(tmp_path / "a.jsonl", [row])), "--to", str(tmp_path / "a.parquet")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def two_responses(path: Path, *, label: str = "a", text: str = "x", more: str = "") -> Path:
    """300 rows, of which the first and the last have a label and a text of their own, and the third more cells."""
    cells = [["u", f"p{n}", "x", "y", "ab"[n % 2]] for n in range(300)]
    for row in (cells[0], cells[-1]):
        row[2], row[4] = text, label
    cells[2].extend(more.split())
    path.write_text(
        "\n".join(",".join(row) for row in [["user_id", "prompt", "response_a", "response_b", "winner"], *cells])
    )
    return path


def test_every_malformed_row_of_the_layout_that_fits_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells too many, a label without a meaning and an empty one, also behind the rows that are looked at, at once."""
    to = tmp_path / "pairs.parquet"

    def refused(**changes: str) -> list[str]:
        path = two_responses(tmp_path / "export.csv", **changes)
        assert main(["data", "convert", str(path), "--to", str(to)]) == 1 and not to.exists()
        shown = capsys.readouterr()
        assert f"{path} is read as two_responses" in shown.out
        return shown.err.replace(f"{path}:", "line ").splitlines()

    cure = "or to leave out by on_error: skip (--on_error skip):"
    first, *rows = refused(text="", more="z")
    assert first == f"error: 3 malformed rows to correct or remove, {cure}"
    assert [row.split(": ")[0] for row in rows] == ["  line 2", "  line 4", "  line 301"]
    first, *rows = refused(label="first", more="z")
    assert first.startswith(
        "error: 3 malformed rows; correct them, or say what the labels 'first' mean by winner: {column"
    )
    assert "on_error" not in first and len(rows) == 3 and "line 4: expected 5 cells, got 6" in rows[1]
    first, *rows = refused(label="")
    assert first == f"error: 2 malformed rows to correct or remove, {cure}"
    assert rows == ["  line 2: winner: missing or null", "  line 301: winner: missing or null"]


@pytest.mark.filterwarnings("ignore:.*malformed rows? left out")
def test_a_file_of_malformed_rows_is_no_file_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where most rows are malformed, to leave them out is not advised and not done."""
    rows = [{"user_id": "u", "prompt": f"p{n}", "chosen": "" if n else "a", "rejected": "b"} for n in range(3)]
    args = ["data", "convert", str(write(tmp_path / "a.jsonl", rows)), "--to", str(tmp_path / "pairs.parquet")]
    assert main(args) == 1
    assert "error: 2 malformed rows to correct or remove:\n" in capsys.readouterr().err
    assert main([*args, "--on_error", "skip"]) == 1 and not (tmp_path / "pairs.parquet").exists()
    assert "expected more pairs than malformed rows, got 1 pair and 2 malformed rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "expected preference pairs, got none in {path}, which is empty"),
        ("a.csv", "user_id,prompt,chosen,rejected\n", "expected preference pairs, got none in {path}"),
        (
            "a.csv",
            "user_id;prompt;chosen;rejected\nu;p;a, b;c\n",
            "{path}: expected commas between the cells, got semi",
        ),
        ("a.jsonl", "{\n{", "2 malformed rows and no other:"),
        ("a.jsonl", '{"id": 1}\n{', "{path}: expected one of the layouts of docs/data.md, got the columns id;"),
    ],
)
def test_a_file_without_pairs_is_told_why(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert main(["data", "convert", str(path), "--to", str(tmp_path / "pairs.parquet")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message.format(path=path)}")
