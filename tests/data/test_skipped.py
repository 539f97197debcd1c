"""Malformed rows that are left out: what stays, what is counted, and where the rest is kept."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import plm
from plm.cli import main
from plm.data.schema import PairTable, read_pairs
from plm.data.skipped import unused, write_skipped
from plm.data.sources.pairs import PairFiles
from plm.erasure import _erase_names, _holds

GOOD = [
    {"user_id": f"n{user}", "prompt": f"p{number}", "chosen": f"good {number} {user}", "rejected": f"bad {number}"}
    for user in range(8)
    for number in range(8)
]
BAD: list[Any] = [
    {**GOOD[0], "user_id": None},
    {**GOOD[0], "chosen": "bad 0"},
    {**GOOD[0], "chosen": 5, "weight": -1},
    {**GOOD[0], "prompt": "new", "timestamp": "yesterday-ish"},
    "[1]",
    "{",
]
"""Rows, or lines as they stand; the third has two faults."""


def line(row: Any) -> str:
    return row if isinstance(row, str) else json.dumps(row)


def skipping(path: Path, **options: Any) -> PairTable:
    with pytest.warns(UserWarning, match="malformed rows? left out"):
        return read_pairs([path], **options, on_error="skip")


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def plain(table: PairTable) -> set[tuple[str, ...]]:
    texts = table.texts()
    return {
        (table.user_ids[user], *texts[chosen], texts[rejected][1])
        for user, chosen, rejected in zip(table.user, table.chosen, table.rejected, strict=True)
    }


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_what_is_left_is_what_was_right_and_the_rest_is_kept_as_it_stood(tmp_path: Path, ending: str) -> None:
    rows: list[Any] = [row for pair in zip(GOOD[:6], BAD, strict=True) for row in pair] + GOOD[6:]
    content = "".join(line(row) + "\n" for row in rows).encode()
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    (tmp_path / "good.jsonl").write_text("\n".join(map(line, GOOD)))
    table = skipping(path)
    assert plain(table) == plain(read_pairs([tmp_path / "good.jsonl"]))
    assert table.dropped["malformed"] == 6
    assert write_skipped(table, tmp_path / "skipped.ndjson")
    kept = entries(tmp_path / "skipped.ndjson")
    assert [entry["line"] for entry in kept] == [2, 4, 6, 8, 10, 12]
    assert [entry.get("row", entry.get("text")) for entry in kept] == BAD
    assert len(kept[2]["problems"]) == 2 and {entry["file"] for entry in kept} == {str(path)}
    with pytest.raises(
        ValueError, match=r"^6 malformed rows to correct or remove, or to leave out by on_error='skip':"
    ):
        read_pairs([path])


def test_all_pairs_of_a_line_go_with_it(tmp_path: Path) -> None:
    """A row of three graded responses, of which one is no text, gives one good pair, which is not taken."""
    rows = [
        {"user_id": "a", "prompt": "p", "responses": ["x", "y", "z"], "ratings": [1, 2, 3]},
        {"user_id": "b", "prompt": "p", "responses": ["x", "y", 5], "ratings": [1, 2, 3]},
        {"user_id": "c", "prompt": "p", "responses": ["x", "y"], "ratings": [1]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = skipping(tmp_path / "a.jsonl")
    assert (table.user_ids, table.num_pairs, table.dropped) == (["a"], 3, {"malformed": 2})


def test_tables_and_csv_and_winners(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([GOOD[0], {**GOOD[1], "chosen": None}, GOOD[2]]), tmp_path / "a.parquet")
    table = skipping(tmp_path / "a.parquet")
    assert table.num_pairs == 2 and write_skipped(table, tmp_path / "s.ndjson")
    assert [(entry["line"], entry["row"]["prompt"]) for entry in entries(tmp_path / "s.ndjson")] == [(1, "p1")]
    (tmp_path / "a.csv").write_text(
        "user_id,prompt,chosen,rejected,winner\na,p,x,y,right\nb,p,x,y,dunno\nc,p,x\nd,p,x,y,left\n"
    )
    table = skipping(tmp_path / "a.csv", winner={"column": "winner"})
    assert plain(table) == {("a", "p", "y", "x"), ("d", "p", "x", "y")}
    write_skipped(table, tmp_path / "s.ndjson")
    assert [entry.get("text", entry.get("row", {}).get("winner")) for entry in entries(tmp_path / "s.ndjson")] == [
        "dunno",
        "c,p,x",
    ]
    (tmp_path / "b.csv").write_text('user_id,prompt,chosen,rejected\na,p,x,y\nz,p,"one\ntwo\nthree"\nb,p,x,y\n')
    write_skipped(skipping(tmp_path / "b.csv"), tmp_path / "s.ndjson")
    assert [entry["text"] for entry in entries(tmp_path / "s.ndjson")] == ['z,p,"one\ntwo\nthree"']


def test_a_rating_that_is_none_leaves_the_others(tmp_path: Path) -> None:
    """Of eleven ratings of one prompt the last has no response: the other ten give their 45 pairs."""
    rows: list[dict[str, Any]] = [
        {"user_id": "u", "prompt": "p", "response": f"good {number}", "rating": number} for number in range(10)
    ]
    rows += [{"user_id": "u", "prompt": "p", "response": None, "rating": 3}]
    rows += [{"user_id": True, "prompt": "p", "response": text, "rating": 3} for text in "ab"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = skipping(path, layout="long_ratings")
    assert (table.num_pairs, table.dropped["malformed"]) == (45, 3)
    write_skipped(table, tmp_path / "s.ndjson")
    assert [entry["line"] for entry in entries(tmp_path / "s.ndjson")] == [11, 12, 13]


def test_a_malformed_row_says_nothing_of_its_user(tmp_path: Path) -> None:
    """Its split is not held against the good rows."""
    rows = [{**GOOD[0], "user_split": "seen"}, {**GOOD[1], "user_split": "seen"}]
    rows += [{**GOOD[2], "user_split": "unseen", "weight": -1}, {**GOOD[9], "user_split": "unseen"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = skipping(tmp_path / "a.jsonl")
    assert (table.num_pairs, table.dropped["malformed"]) == (3, 1)


def test_every_kind_of_row_is_kept_as_json(tmp_path: Path) -> None:
    """Dates that Python cannot hold, numbers that JSON has not, and entries of an array that are no objects."""
    rows = [*GOOD * 5, {**GOOD[2], "chosen": None}]  # more than are looked at first
    columns = pa.Table.from_pylist(rows).append_column("when", pa.array([0] * 320 + [2**50], pa.timestamp("ms")))
    pq.write_table(columns.append_column("x", pa.array([1.0] * 320 + [float("inf")])), tmp_path / "a.parquet")
    assert write_skipped(skipping(tmp_path / "a.parquet"), tmp_path / "s.ndjson")
    (entry,) = entries(tmp_path / "s.ndjson")
    assert (entry["row"]["when"], entry["row"]["x"]) == (str(2**50), "inf")
    (tmp_path / "a.json").write_text(json.dumps([GOOD[0], 5, None, GOOD[1]]))
    write_skipped(skipping(tmp_path / "a.json"), tmp_path / "s.ndjson")
    assert [entry["row"] for entry in entries(tmp_path / "s.ndjson")] == [5, None]
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert not write_skipped(read_pairs(tmp_path / "a.json"), tmp_path / "s.ndjson")
    assert not (tmp_path / "s.ndjson").exists()  # nothing is left of what was mended


def test_what_is_there_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "out.skipped.ndjson"
    assert unused(path) == path
    path.touch()
    assert unused(path) == tmp_path / "out-2.skipped.ndjson"


def test_users_are_erased_from_what_was_skipped(tmp_path: Path) -> None:
    """Also where the line could not be read, and its id is written twice as JSON."""
    rows = [{"user_id": user, "prompt": "p", "chosen": "a"} for user in ("Zoë", 'an"na', "ben")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row)[:-1] + "\n" for row in rows) + line(GOOD[0]))
    path = tmp_path / "skipped.ndjson"
    write_skipped(skipping(tmp_path / "a.jsonl"), path)
    assert _holds(path, ["Zoë"], []) and _holds(path, ['an"na'], []) and not _holds(path, ["anna"], [])
    assert _erase_names(path, ["Zoë", 'an"na']) and not _erase_names(path, ["Zoë"])
    assert [json.loads(entry["text"] + "}")["user_id"] for entry in entries(path)] == ["ben"]


def test_nobody_is_torn_in_two(tmp_path: Path) -> None:
    """Of a user who is both seen and unseen no row is taken: which of them is wrong is not ours to say."""
    rows = [
        {**row, "user_split": split}
        for row, split in zip(GOOD[6:11], ["seen", "unseen", "seen", "seen", "seen"], strict=True)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert skipping(tmp_path / "a.jsonl").user_ids == ["n1"]


def test_what_cannot_be_skipped_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text(json.dumps(BAD[0]) + "\n")
    with pytest.raises(ValueError, match=r"all\.jsonl:1: user_id: missing or null"):
        read_pairs([tmp_path / "all.jsonl"], on_error="skip")
    (tmp_path / "open.csv").write_text('user_id,prompt,chosen,rejected\na,p,x,y\nb,"p,x,y\nc,p,x,y\n')
    with pytest.raises(ValueError, match=r"open\.csv:3: malformed CSV .*nothing after it can be read"):
        read_pairs([tmp_path / "open.csv"], on_error="skip")
    with pytest.raises(ValueError, match="on_error: expected stop or skip, got 'drop'"):
        read_pairs([tmp_path / "all.jsonl"], on_error="drop")  # type: ignore[arg-type]
    (tmp_path / "good.jsonl").write_text("\n".join(map(line, GOOD)))
    table = read_pairs([tmp_path / "good.jsonl"], on_error="skip")
    assert not table.skipped and not write_skipped(table, tmp_path / "none.ndjson")
    assert not (tmp_path / "none.ndjson").exists()


@pytest.mark.filterwarnings("ignore:.*malformed rows? left out")
def test_every_command_says_where_the_rest_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("\n".join(map(line, [*GOOD, *BAD])))
    assert main(["data", "check", "--pairs", "a.jsonl", "--output", "report"]) == 1  # a fit would stop
    printed = " ".join(capsys.readouterr().out.split())
    assert "a.jsonl:65: user_id: missing or null" in printed
    assert len(entries(Path("report/skipped.ndjson"))) == 6
    conclusion = "A fit stops at the malformed rows: mend them, or leave them out with on_error: skip."
    assert conclusion in printed and all(
        conclusion in Path(f"report/report.{ending}").read_text() for ending in ("md", "html")
    )
    assert "and 2 more, which stand in skipped.ndjson" in printed  # seven faults in six rows
    Path("skips.yaml").write_text(
        "model: BradleyTerry\ndata: {source: {class_path: PairFiles, init_args: {path: a.jsonl, on_error: skip}}}\n"
    )
    assert main(["data", "check", "--config", "skips.yaml", "--output", "report"]) == 0  # a fit would go on
    printed = " ".join(capsys.readouterr().out.split())
    assert "A fit stops" not in printed and "warning malformed a.jsonl:65" in printed
    assert main(["data", "convert", "a.jsonl", "--to", "b.parquet", "--on_error", "skip"]) == 0
    assert "b.skipped.ndjson" in capsys.readouterr().out and len(entries(Path("b.skipped.ndjson"))) == 6
    assert plain(read_pairs([Path("b.parquet")])) == plain(PairFiles("a.jsonl", on_error="skip").load())
    run = plm.fit(
        "a.jsonl",
        "BradleyTerry",
        backbone="hashing",
        options={
            "data.source.init_args.on_error": "skip",
            "trainer.max_epochs": 1,
            "trainer.check_val_every_n_epoch": 1,
            "trainer.enable_progress_bar": False,
            "final_test": False,
        },
    )
    assert len(entries(run.folder / "skipped.ndjson")) == 6
    adapting = ["adapt", "--ckpt_path", str(run.checkpoint), "--pairs", "a.jsonl"]
    assert main(adapting) == 1 and "6 malformed rows" in capsys.readouterr().err
    assert main([*adapting, "--on_error", "skip"]) == 0
    assert "a.skipped.ndjson" in capsys.readouterr().out
    assert len(entries(run.checkpoint.with_name("a.skipped.ndjson"))) == 6  # beside the users, with whom it is erased
