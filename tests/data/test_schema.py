from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plm.data.schema import PairTable, make_pairs, read_pairs
from plm.data.values import canonical_messages, plain_prompt
from plm.messages import NUM_SHOWN

ROWS = [
    {"user_id": "bob", "prompt": "p1", "chosen": "a", "rejected": "b"},
    {"user_id": "amy", "prompt": "p1", "chosen": "b", "rejected": "a"},
    {"user_id": "bob", "prompt": "p2", "chosen": "a", "rejected": "c"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path: Path, *rows: dict[str, Any], **columns: str | None) -> PairTable:
    return read_pairs([write(tmp_path / "pairs.jsonl", list(rows))], columns or None)


def error(tmp_path: Path, *rows: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, *rows)
    return str(caught.value)


def plain(table: PairTable) -> list[tuple[str, str, str, str]]:
    texts = table.texts()
    columns = zip(table.user, table.prompt, table.chosen, table.rejected, strict=True)
    return [(table.user_ids[u], table.prompts[p], texts[c][1], texts[r][1]) for u, p, c, r in columns]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.parquet"])
def test_all_formats_give_the_same_table(tmp_path: Path, name: str) -> None:
    table = read_pairs([write(tmp_path / name, ROWS)])
    assert plain(table) == [tuple(row.values()) for row in ROWS]
    assert table.user_ids == ["amy", "bob"]
    assert table.texts() == [("p1", "a"), ("p1", "b"), ("p2", "a"), ("p2", "c")]
    assert table.weight.tolist() == [1, 1, 1] and np.isnan(table.chosen_score).all()
    assert table.row_split.tolist() == table.user_split.tolist() == [-1, -1, -1]


def test_gzip_and_several_files(tmp_path: Path) -> None:
    zipped = tmp_path / "more.jsonl.gz"
    zipped.write_bytes(gzip.compress(json.dumps({**ROWS[0], "user_id": 7}).encode()))
    table = read_pairs([write(tmp_path / "pairs.jsonl", ROWS), zipped])
    assert table.user_ids == ["7", "amy", "bob"]
    assert table.position(3) == f"{zipped}:1"


def test_dictionary_encoded_parquet_with_nulls(tmp_path: Path) -> None:
    columns = {key: pa.array([row[key] for row in ROWS]).dictionary_encode() for key in ROWS[0]}
    columns["weight"] = pa.array([2.0, None, 0.5])
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    table = read_pairs([tmp_path / "pairs.parquet"])
    assert plain(table) == [tuple(row.values()) for row in ROWS]
    assert table.weight.tolist() == [2, 1, 0.5]


def test_optional_columns(tmp_path: Path) -> None:
    extra = {"weight": "2", "chosen_score": 3.5, "tie": "true", "dialogue_id": "d1", "turn": 1, "row_split": "val"}
    other = {"weight": 0, "rejected_score": 1, "tie": 0, "timestamp": "1970-01-02T00:00:00Z", "row_split": "test"}
    table = read(tmp_path, {**ROWS[0], **extra}, {**ROWS[1], **other})
    assert table.weight.tolist() == [2, 0] and table.tie.tolist() == [True, False]
    assert table.chosen_score[0] == 3.5 and table.rejected_score[1] == 1
    assert table.dialogues == ["d1"] and table.dialogue.tolist() == [0, -1]
    assert table.turn.tolist() == [1, -1] and table.timestamp[1] == 86400
    assert table.row_split.tolist() == [1, 2]


def test_messages_become_canonical(tmp_path: Path) -> None:
    prompt = [{"content": "Hi", "role": "user"}]
    reply = {"role": "assistant", "content": "Hello"}
    pair = {"user_id": "u", "prompt": prompt, "chosen": [*prompt, reply], "rejected": [{**reply, "content": "Go"}]}
    table = read(tmp_path, pair)
    assert table.prompts == ['[{"role":"user","content":"Hi"}]']
    assert table.responses == ["Hello", "Go"]
    assert plain_prompt(table.prompts[0]) == "Hi"
    assert canonical_messages(prompt) == table.prompts[0]
    pq.write_table(pa.Table.from_pylist([pair]), tmp_path / "pairs.parquet")
    assert read_pairs([tmp_path / "pairs.parquet"]).texts() == table.texts()
    assert read(tmp_path, {**pair, "prompt": table.prompts[0]}).prompts == table.prompts


REPLY = [{"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": "b"}, "chosen equals rejected: 'b'"),
        ({"chosen": "  "}, "chosen: empty text, got '  '"),
        ({"rejected": ["b", "c"]}, "rejected: expected a text or chat messages, not a list of 2 strings"),
        ({"chosen": REPLY}, "chosen and rejected must both be texts or both chat messages, got messages and a text"),
        (
            {"chosen": [{"role": "user", "content": "x"}]},
            "chosen: expected chat messages that end with the assistant's",
        ),
        ({"chosen": [{"role": "assistant"}]}, "chosen: expected chat messages {role: text, content: text}"),
        ({"user_id": None}, "user_id: missing or null"),
        ({"user_id": " "}, "user_id: expected an id, got ' '"),
        ({"user_id": 1.5}, "user_id: expected a string or an integer, got 1.5"),
        ({"prompt": 3}, "prompt: expected a text or chat messages, got 3"),
        ({"weight": -1}, "weight: expected a weight between 0 and 1e30, got -1"),
        ({"tie": "maybe"}, "tie: expected true or false, got 'maybe'"),
        ({"turn": 1.5}, "turn: expected an integer, got 1.5"),
        ({"chosen_score": "good"}, "chosen_score: expected a number, got 'good'"),
        ({"timestamp": "soon"}, "timestamp: expected seconds or an ISO date, got 'soon'"),
        ({"user_id": "a\nb"}, "user_id: expected an id without control characters"),
        ({"user_id": "a\u202eb"}, "user_id: expected an id without control characters"),
        ({"user_id": "\ud83d"}, "user_id: expected text, got half of a character (\\ud83d) at position 0"),
        ({"chosen": "wren \ud83d"}, "chosen: expected text, got half of a character (\\ud83d) at position 5"),
        ({"prompt": [{"role": "user", "content": "\udc00"}]}, "prompt: expected text, got half of a character"),
        ({"weight": 10**400}, "weight: expected a number below 1e308"),
        ({"turn": 1e300}, "turn: expected an integer below 2 to the power of 63"),
        (
            {"prompt": [{"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}]},
            "prompt: expected chat messages of role and content alone, got 'tool_calls' too, which would be lost",
        ),
        ({"prompt": json.dumps([{"role": "user", "content": "Hi", "name": "Eve"}])}, "prompt: expected chat messages"),
        ({"prompt": str([{"role": "user", "content": "Hi"}])}, "prompt: expected chat messages as JSON, got the prin"),
    ],
)
def test_bad_row_is_named_by_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    text = error(tmp_path, ROWS[1], {**ROWS[0], **change})
    assert f"pairs.jsonl:2: {message}" in text
    assert text.startswith("1 malformed row to correct or remove:")


def test_history_that_is_not_the_prompt(tmp_path: Path) -> None:
    chosen = [{"role": "user", "content": "other"}, *REPLY]
    text = error(
        tmp_path, {"user_id": "u", "prompt": "p", "chosen": chosen, "rejected": [{**REPLY[0], "content": "y"}]}
    )
    assert "chosen: the messages before the reply differ from the prompt" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user_id": "u", "user_id": "v"}', "malformed JSON (the key 'user_id' is given 2 times)"),
        ('{"user_id": "u", "weight": NaN}', "malformed JSON (NaN is not JSON; write null)"),
        ("[" * 100_000, "malformed JSON (its brackets are too deep to read)"),
        ('[{"user_id": "u"}]', "expected a JSON object, got [{'user_id': 'u'}]; name a file of one array .json"),
    ],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line)
    with pytest.raises(ValueError) as caught:
        read_pairs([path])
    assert f"pairs.jsonl:2: {message}" in str(caught.value)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("user_id,prompt,chosen,rejected,chosen\nu,p,a,b,c\n")
    with pytest.raises(ValueError, match="expected each column once, got 'chosen' again"):
        read_pairs([path])
    names = ["user_id", "prompt", "chosen", "rejected", "chosen"]
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 5, names=names), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match="expected each column once, got 'chosen' again"):
        read_pairs([tmp_path / "pairs.parquet"])


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.csv.gz"])
def test_a_damaged_archive_is_one_error(tmp_path: Path, name: str) -> None:
    whole = write(tmp_path / name.removesuffix(".gz"), ROWS * 50).read_bytes()
    packed = gzip.compress(whole)
    path = tmp_path / name
    for damaged in (packed[:-12], packed[:30] + b"\x00" * 20 + packed[50:], whole):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"expected a whole gzip file, got a damaged one"):
            read_pairs([path])


def test_json_holds_an_array_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(ROWS))
    assert plain(read_pairs([path])) == [tuple(row.values()) for row in ROWS]
    path.write_text(json.dumps([ROWS[0], {**ROWS[1], "chosen": ""}]))
    with pytest.raises(ValueError, match=r"pairs\.json:row 1: chosen: empty text"):
        read_pairs([path])
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]))
    with pytest.raises(ValueError, match=r"Extra data.*name the file \.jsonl"):
        read_pairs([path])


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000
    assert long in read_pairs([write(tmp_path / "pairs.csv", [{**ROWS[0], "chosen": long}])]).responses


def test_one_id_in_two_spellings_is_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ids '7' and '7.0' are two, as are 1 more that look alike"):
        table = read(tmp_path, *({**ROWS[0], "user_id": name} for name in ("7", "7.0", "8", "8 ", "007", "x.0")))
    assert table.num_users == 6
    with pytest.warns(UserWarning, match="'d' and 'd '"):
        read(tmp_path, {**ROWS[0], "dialogue_id": "d"}, {**ROWS[1], "dialogue_id": "d "})


def test_a_whole_number_is_one_id_with_and_without_decimals(tmp_path: Path) -> None:
    assert read(tmp_path, {**ROWS[0], "user_id": 7}, {**ROWS[1], "user_id": 7.0}).user_ids == ["7"]
    floats = [{**row, "user_id": number} for row, number in zip(ROWS, (7.0, 8.0, 7.0), strict=True)]
    assert read_pairs([write(tmp_path / "pairs.parquet", floats)]).user_ids == ["7", "8"]


def test_other_responses_beside_a_pair_are_not_read(tmp_path: Path) -> None:
    rows = [{**row, "responses": ["a", "b", "c"]} for row in ROWS]
    for name in ("pairs.jsonl", "pairs.parquet"):
        assert plain(read_pairs([write(tmp_path / name, rows)])) == [tuple(row.values()) for row in ROWS]


def test_all_bad_rows_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    bad = json.dumps({**ROWS[0], "chosen": ""})
    path.write_text("\n".join([json.dumps(ROWS[0]), "{not json", "", "[1]", *[bad] * 30]))
    with pytest.raises(ValueError) as caught:
        read_pairs([path])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("32 malformed rows")
    assert "pairs.jsonl:2: malformed JSON" in lines[1] and "'{not json'" in lines[1]
    assert "pairs.jsonl:4: expected a JSON object, got [1]" in lines[2]
    assert "pairs.jsonl:5: chosen: empty text" in lines[3]
    assert len(lines) == NUM_SHOWN + 2 and lines[-1] == "  ... and 12 more"


def test_parquet_rows_and_quoted_csv_lines_are_named(tmp_path: Path) -> None:
    parquet = write(tmp_path / "pairs.parquet", [ROWS[0], {**ROWS[1], "chosen": ""}])
    with pytest.raises(ValueError, match=r"pairs\.parquet:row 1: chosen: empty text"):
        read_pairs([parquet])
    table = write(tmp_path / "pairs.csv", [{**ROWS[0], "chosen": "two\nlines"}, {**ROWS[1], "chosen": ""}])
    with pytest.raises(ValueError, match=r"pairs\.csv:4: chosen: empty text"):
        read_pairs([table])
    table.write_text("user_id,prompt,chosen,rejected\nu,p,a\n")
    with pytest.raises(ValueError, match=r"pairs\.csv:2: expected 4 cells, got 3"):
        read_pairs([table])


def test_missing_column_names_the_near_one_and_the_option(tmp_path: Path) -> None:
    rows = [{"user": "u", "prompt": "p", "chosen": "a", "rejected": "b"}]
    with pytest.raises(
        ValueError, match=r"column 'user_id' is missing; did you mean 'user'\? Set columns={'user_id': 'user'}"
    ):
        read_pairs([write(tmp_path / "pairs.csv", rows)])
    assert read_pairs([tmp_path / "pairs.csv"], {"user_id": "user"}).user_ids == ["u"]
    with pytest.raises(ValueError, match="got \\['promt'\\]; did you mean 'prompt'"):
        read_pairs([tmp_path / "pairs.csv"], {"promt": "prompt"})


def test_column_absent_from_one_row(tmp_path: Path) -> None:
    assert "pairs.jsonl:2: chosen: missing or null" in error(
        tmp_path, ROWS[0], {"user_id": "u", "prompt": "p", "rejected": "b"}
    )


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="2 duplicate pairs left out"):
        table = read(tmp_path, ROWS[0], ROWS[1], ROWS[0], ROWS[0])
    assert plain(table) == [tuple(row.values()) for row in ROWS[:2]]
    assert table.dropped == {"duplicates": 2}


def test_splits_of_the_file(tmp_path: Path) -> None:
    rows = [{**row, "user_split": split} for row, split in zip(ROWS, ("seen", "few", "seen"), strict=True)]
    with pytest.warns(UserWarning, match="1 pairs left out: their user_split is neither seen nor unseen"):
        table = read(tmp_path, *rows)
    assert table.user_ids == ["bob"] and table.dropped == {"other_user_split": 1}
    assert read(tmp_path, *rows, user_split=None).num_users == 2
    assert "row_split: expected train, val or test, got 'dev'" in error(tmp_path, {**ROWS[0], "row_split": "dev"})
    assert "jsonl:2: row_split: missing or null" in error(tmp_path, {**ROWS[0], "row_split": "test"}, ROWS[1])
    torn = error(tmp_path, {**ROWS[0], "user_split": "seen"}, {**ROWS[2], "user_split": "unseen"})
    assert "user 'bob' is both seen and unseen" in torn


def test_unknown_format_broken_parquet_and_empty_file(tmp_path: Path) -> None:
    for name, message in [("a.txt", "expected a file ending in"), ("a.parquet", "expected a Parquet file")]:
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match=message):
            read_pairs([tmp_path / name])
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="expected preference pairs, got none"):
        read_pairs([tmp_path / "a.jsonl"])


def test_take_keeps_texts_and_users(tmp_path: Path) -> None:
    table = read(tmp_path, *ROWS)
    assert plain(table.take(np.array([2, 0]))) == [plain(table)[2], plain(table)[0]]
    assert table.take(table.user == 0).num_users == 2
    assert table.take(table.user >= 0) is table  # no copy of millions of rows
    every = np.arange(table.num_pairs)
    assert plain(table.take(every)) == plain(table) and table.take(every[:0]).num_pairs == 0
    with pytest.raises(IndexError, match="boolean"):
        table.take(np.ones(table.num_pairs + 1, dtype=bool))


# ---------------------------------------------------------------------- graded responses
def test_graded_responses_are_all_their_pairs_and_count_once(tmp_path: Path) -> None:
    """The higher rating is chosen, equal ones are a tie; lines with and without ratings stand in one file."""
    lines = [
        {"user_id": "u", "prompt": "p", "responses": ["a", "b", "c"], "ratings": [2, 5.5, 2], "weight": 3.0},
        {"user_id": "u", "prompt": "q", "chosen": "x", "rejected": "y"},
        {"user_id": "v", "prompt": "p", "responses": ["c", "a"], "ratings": [0, -1]},
    ]
    path = tmp_path / "graded.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = read_pairs([path])
    responses = [table.responses[item] for item in table.items[:, 1]]
    found = [
        (responses[chosen], responses[rejected], tie, weight, *scores)
        for chosen, rejected, tie, weight, *scores in zip(
            table.chosen, table.rejected, table.tie, table.weight, table.chosen_score, table.rejected_score, strict=True
        )
    ]
    assert found[:3] == [
        ("b", "a", False, 1.0, 5.5, 2.0),
        ("a", "c", True, 1.0, 2.0, 2.0),
        ("b", "c", False, 1.0, 5.5, 2.0),
    ]
    assert found[3][:4] == ("x", "y", False, 1.0) and found[4] == ("c", "a", False, 1.0, 0.0, -1.0)
    assert [table.position(row).rsplit(":", 1)[1] for row in range(5)] == ["1", "1", "1", "2", "3"]


def test_malformed_ratings_are_named_with_their_line(tmp_path: Path) -> None:
    good = {"user_id": "u", "prompt": "p", "responses": ["a", "b", "c"], "ratings": [1, 2, 3]}
    changes = [
        ({"ratings": [1, 2]}, r"2: ratings: expected a number for each of 3 responses, got \[1, 2\]"),
        ({"ratings": [1, 2, "3"]}, "3: ratings: expected finite numbers, got '3'"),
        ({"responses": ["a"], "ratings": [1]}, r"4: responses: expected a list of at least two, got \['a'\]"),
        ({"responses": [None, "b", "c"]}, "5: rejected: missing or null"),
        ({"chosen": "a"}, "6: ratings: expected either responses with ratings, or chosen and rejected, got both"),
        ({"user_id": None}, "7: user_id: missing or null"),
        ({"ratings": None}, "8: ratings: expected a number for each of 3 responses, got None"),
    ]
    path = tmp_path / "graded.jsonl"
    path.write_text("".join(json.dumps(good | change) + "\n" for change in [{}, *(one for one, _ in changes)]))
    with pytest.raises(ValueError, match=r"^7 malformed rows") as raised:
        read_pairs([path])
    for _, message in changes:
        assert re.search(message, str(raised.value)), message
    path.write_text(json.dumps(good | {"ratings": [1]}) + "\n")
    with pytest.raises(ValueError, match="1: ratings: expected a number for each"):
        read_pairs([path])


def test_reasons_that_left_out_nothing_are_not_counted() -> None:
    row = {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b"}
    assert make_pairs([row], "here", {"empty": 0, "few_pairs": 2}).dropped == {"few_pairs": 2}
