"""Every section of docs/data.md: its example file is read to the pairs that it shows, and is recognised."""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plm.cli import main
from plm.data.files import Records
from plm.data.guesses import Guess, guess_layout
from plm.data.layouts import LAYOUTS
from plm.data.schema import PairTable, read_pairs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    return PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]


def example(name: str) -> tuple[str, str]:
    """Ending and content of the example file of a section."""
    (kind, content) = re.findall(r"```(json|csv)\n(.*?)```", section(name), re.DOTALL)[0]
    return ("jsonl" if kind == "json" else "csv"), content


def expected(name: str) -> list[str]:
    return [line for line in section(name).splitlines() if line.startswith("|")][2:]


def shown(table: PairTable) -> list[str]:
    """Pairs as the page shows them."""
    texts = table.texts()
    lines = []
    for row in range(table.num_pairs):
        prompt, chosen, rejected = (
            texts[item][k] for item, k in ((table.chosen[row], 0), (table.chosen[row], 1), (table.rejected[row], 1))
        )
        if prompt.startswith("[{"):
            prompt = " ".join(f"{message['role']}: {message['content']}" for message in json.loads(prompt))
        scores = table.chosen_score[row], table.rejected_score[row]
        more = " (tie)" if table.tie[row] else "" if scores[0] != scores[0] else f" ({scores[0]:g} to {scores[1]:g})"
        lines.append(f"| {table.user_ids[table.user[row]]} | {prompt} | {chosen} | {rejected}{more} |")
    return lines


def read(path: Path, **options: Any) -> PairTable:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*judgements left out")
        return read_pairs([path], **options)


def records(name: str) -> list[dict[str, Any]]:
    ending, content = example(name)
    if ending == "csv":
        return list(csv.DictReader(io.StringIO(content)))
    return [json.loads(line) for line in content.splitlines()]


def test_the_page_has_a_section_for_every_layout() -> None:
    assert re.findall(r"^## (\w+)$", PAGE, re.M) == list(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_example_gives_the_pairs_that_the_page_shows(tmp_path: Path, name: str) -> None:
    """In every format that can hold it."""
    ending, content = example(name)
    path = tmp_path / f"example.{ending}"
    path.write_text(content, encoding="utf-8")
    assert shown(read(path, layout=name)) == expected(name)
    rows = records(name)
    (tmp_path / "example.json").write_text(json.dumps(rows))
    assert shown(read(tmp_path / "example.json", layout=name)) == expected(name)
    kinds = {json.dumps(sorted((key, type(value).__name__) for key, value in row.items())) for row in rows}
    if len(kinds) == 1:  # a column of Parquet has one type
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "example.parquet")
        assert shown(read(tmp_path / "example.parquet", layout=name)) == expected(name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_lists_printed_in_cells_are_read_or_refused_but_never_misread(tmp_path: Path, name: str) -> None:
    """The same rows as a table that holds lists as JSON."""
    rows = [
        {
            key: json.dumps(cell) if isinstance(cell, list | dict) else "" if cell is None else cell
            for key, cell in row.items()
        }
        for row in records(name)
    ]
    with (tmp_path / "example.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert shown(read(tmp_path / "example.csv", layout=name)) == expected(name)


# ---------------------------------------------------------------------- options
def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        read(path, **options)
    return str(caught.value)


HELP = {"prompt": "p", "helpfulness": 4, "correctness": 0}


def test_attributes_are_weighed(tmp_path: Path) -> None:
    """4 + 0.5 * 0 = 4 and 3 + 0.5 * 3 = 4.5; helpfulness alone says the contrary, and so does a chosen column."""
    path = write(
        tmp_path / "a.jsonl", {**HELP, "response": "a"}, {**HELP, "response": "b", "helpfulness": 3, "correctness": 3}
    )
    weighed = read(path, layout="helpsteer2", attributes={"helpfulness": 1, "correctness": 0.5})
    assert shown(weighed) == ["| everyone | p | b | a (4.5 to 4) |"]
    assert shown(read(path, layout="helpsteer2")) == ["| everyone | p | a | b (4 to 3) |"]
    assert shown(read(path, layout="helpsteer2", columns={"rating": "correctness"})) == [
        "| everyone | p | b | a (3 to 0) |"
    ]
    assert "attributes: expected a number as the weight of helpfulness, got nan" in refused(
        path, layout="helpsteer2", attributes={"helpfulness": float("nan")}
    )
    assert "expected the columns ['helpfullness'] of attributes" in refused(
        path, attributes={"helpfullness": 1}, layout="helpsteer2"
    )
    broken = write(tmp_path / "b.jsonl", {**HELP, "response": "a"}, {**HELP, "response": "b", "helpfulness": "N/A"})
    assert "b.jsonl:2: helpfulness: expected a number, got 'N/A'" in refused(broken, layout="helpsteer2")


def test_attributes_of_completions_may_be_texts(tmp_path: Path) -> None:
    completions = [
        {"response": text, "annotations": {"helpfulness": {"Rating": rating}, "honesty": {"Rating": "1"}}}
        for text, rating in (("a", "2"), ("b", "5"))
    ]
    path = write(tmp_path / "u.jsonl", {"instruction": "p", "completions": completions})
    weights = {"completions.annotations.helpfulness.Rating": 2, "completions.annotations.honesty.Rating": 1}
    assert shown(read(path, layout="ultrafeedback", attributes=weights)) == ["| everyone | p | b | a (11 to 5) |"]


def test_columns_of_graded_responses_may_have_other_names(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", {"who": 1, "prompt": "p", "answers": ["a", "b"], "place": [2, 1], "points": [0, 3]}
    )
    columns = {"user_id": "who", "responses": "answers"}
    assert shown(read(path, columns={**columns, "ranking": "place"})) == ["| 1 | p | b | a |"]
    assert shown(read(path, columns={**columns, "ratings": "points"})) == ["| 1 | p | b | a (3 to 0) |"]
    assert shown(read(path, columns={"user_id": "who", "best_first": "answers"})) == ["| 1 | p | a | b |"]
    both = refused(path, columns={**columns, "ratings": "points", "ranking": "place"})
    assert "a.jsonl:1: ratings: expected either responses with ratings, or ranking, got both" in both


def test_rows_of_one_response_are_grouped_by_user_prompt_and_split(tmp_path: Path) -> None:
    row = {"user_id": "u", "prompt": "p", "row_split": "train"}
    path = write(
        tmp_path / "a.jsonl",
        {**row, "response": "a", "rank": 2},
        {**row, "response": "b", "rank": 1},
        {**row, "response": "c", "rank": 1, "row_split": "test"},
        {**row, "response": "d", "rank": 3, "row_split": "test", "weight": None},
        {**row, "response": "e", "rank": None},
    )
    table = read(path)
    assert shown(table) == ["| u | p | b | a |", "| u | p | c | d |"]
    assert table.row_split.tolist() == [0, 2] and table.dropped == {"unrated": 1}
    assert table.position(1).endswith("a.jsonl:3")
    twice = write(tmp_path / "b.jsonl", {**row, "response": "a", "rank": 2}, {**row, "response": "a", "rank": 1})
    assert "expected preference pairs, got none" in refused(twice)
    assert "b.jsonl:1: rank: expected a number, got 'x'" in refused(
        write(tmp_path / "b.jsonl", {**row, "response": "a", "rank": "x"})
    )


def test_empty_and_equal_responses_are_left_out_and_counted(tmp_path: Path) -> None:
    """Of four responses six pairs: one of equal texts, three with the empty one; the others keep their weight."""
    row = {"user_id": "u", "prompt": "p", "responses": ["a", "b", " ", "a"], "ratings": [1, 2, 3, 4]}
    table = read(write(tmp_path / "a.jsonl", row))
    assert shown(table) == ["| u | p | b | a (2 to 1) |", "| u | p | a | b (4 to 2) |"]
    assert table.dropped == {"empty": 3, "same_text": 1} and table.weight.tolist() == pytest.approx([1 / 6, 1 / 6])


def test_a_tree_with_a_missing_message_is_counted(tmp_path: Path) -> None:
    rows = records("oasst")
    path = write(tmp_path / "a.jsonl", *rows, {**rows[1], "message_id": "m9", "parent_id": "m0"})
    assert read(path, layout="oasst").dropped == {"no_thread": 1, "unrated": 1}
    path = write(tmp_path / "a.jsonl", *rows[:-1], {**rows[-1], "parent_id": "m3"})  # its own parent
    with pytest.raises(ValueError, match="expected preference pairs, got none"):
        read(path, layout="oasst")


def test_no_users_and_no_prompts(tmp_path: Path) -> None:
    rows = [{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "a"}]
    for name in ("a.jsonl", "a.parquet"):
        path = tmp_path / name
        write(path, *rows) if name == "a.jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
        assert shown(read(path, columns={"user_id": None, "prompt": None})) == [
            "| everyone |  | a | b |",
            "| everyone |  | c | a |",
        ]
        message = refused(path)
        assert (
            "Set columns={'user_id': '<its name in the file>'}, or columns={'user_id': None} if no users are told apart"
            in message
        )
    pq.write_table(pa.Table.from_pylist([{**row, "prompt": "p"} for row in rows]), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", columns={"user_id": None}).user_ids == ["everyone"]


def test_conversations_that_part_early_are_counted_or_refused(tmp_path: Path) -> None:
    def talk(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]

    same = {"chosen": talk("Hi", "a", "So?", "b"), "rejected": talk("Hi", "a", "So?", "c")}
    other = {"chosen": talk("Hi", "a", "So?", "b"), "rejected": talk("Hi", "x", "So?", "c")}
    path = write(tmp_path / "a.jsonl", same, other)
    with pytest.warns(UserWarning, match="1 judgements left out: other turns"):
        assert read_pairs([path], layout="implicit_prompt").dropped == {"other_turns": 1}
    path = write(
        tmp_path / "b.jsonl", {"user_id": "u", "prompt": "So?", **same}, {"user_id": "u", "prompt": "No?", **same}
    )
    assert "b.jsonl:2: chosen: the messages before the reply differ from the prompt" in refused(path)
    for request in ("Hi", "So?"):  # the first and the last one
        path = write(tmp_path / "c.jsonl", {"user_id": "u", "prompt": request, **same})
        assert shown(read(path)) == ["| u | user: Hi assistant: a user: So? | b | c |"]


@pytest.mark.parametrize("odd", [[], {}, 7, None, ["a"], {"a": 1}, "", "[{", [[]], True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_odd_values_anywhere_are_an_error_of_the_row_or_left_out(tmp_path: Path, name: str, odd: Any) -> None:
    first, *rest = records(name)
    for key in first:
        path = write(tmp_path / "a.jsonl", {**first, key: odd}, *rest)
        try:
            assert read(path, layout=name).num_pairs > 0
        except ValueError as error:
            assert re.search(r"a\.jsonl:\d+: |expected preference pairs, got none in", str(error)), error


def test_lists_that_numpy_has_printed_are_refused(tmp_path: Path) -> None:
    """Python would read two names side by side as one."""
    path = tmp_path / "a.csv"
    path.write_text("prompt,one,two,best,by\np,a,b,\"['one']\",\"['u' 'v']\"\n")
    columns = {"chosen": "one", "rejected": "two", "user_id": "by"}
    message = refused(path, columns=columns, winner={"column": "best"})
    assert "a.csv:2: user_id: expected a list as JSON, got \"['u' 'v']\"" in message


def test_mistakes_in_the_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "answer": []})
    assert "layout: expected one of pairs, " in refused(path, layout="nectars") and "did you mean 'nectar'?" in refused(
        path, layout="nectars"
    )
    assert "column 'answers.answer' is missing" in refused(path, layout="nectar")
    assert "columns: ['chosen'] are required and cannot be null" in refused(path, columns={"chosen": None})
    printed = {"user_id": "u", "prompt": "p", "chosen": str([{"from": "gpt", "value": "a"}]), "rejected": "b"}
    assert "chosen: expected chat messages as JSON, got the printed form" in refused(write(path, printed))


# ---------------------------------------------------------------------- the command line
def test_the_command_line_reads_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {**HELP, "prompt": f"p{number}", "response": text, "helpfulness": number}
        for number in range(4)
        for text in ("a", "b")
    ]
    rows = [{**row, "polite": number % 3} for number, row in enumerate(rows)]
    args = ["data", "check", "--pairs", str(write(tmp_path / "a.jsonl", *rows)), "--output", str(tmp_path / "out")]
    assert main([*args, "--layout", "helpsteer2", "--attributes", "polite=1", "helpfulness=0.5"]) == 0
    assert main([*args, "--layout", "long_ratings", "--columns", "user_id=", "rating=polite"]) == 0
    capsys.readouterr()
    assert main([*args, "--layout", "helpsteer2", "--attributes", "polite=very"]) == 1
    assert "--attributes: expected a number as the weight of polite, got 'very'" in capsys.readouterr().err
    assert main(["data", "check", "--config", "x.yaml", "--layout", "nectar"]) == 2
    assert "--layout goes with --pairs" in capsys.readouterr().err


# ---------------------------------------------------------------------- guesses
def guessed(rows: list[dict[str, Any]], **said: Any) -> Guess:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return guess_layout(Path("mine.jsonl"), Records(names, rows, list(range(len(rows))), []), **said)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_example_is_recognised(name: str) -> None:
    guess = guessed(records(name))
    assert (guess.name, guess.options) == (name, {"layout": name})


SIDED = [
    {"who": "a", "prompt": f"p{n}", "response1": f"x{n}", "response2": f"y{n}", "preferred": word}
    for n, word in enumerate(["1", "2", "tie", "1"])
]


def renamed(rows: list[dict[str, Any]], **names: str) -> list[dict[str, Any]]:
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


def test_columns_of_other_names_are_recognised() -> None:
    """The labels 1 and 2 end as the names of the two columns do."""
    guess = guessed(renamed(SIDED, who="annotator", prompt="question"))
    assert guess.options == {
        "layout": "two_responses",
        "columns": {"user_id": "annotator", "prompt": "question", "chosen": "response1", "rejected": "response2"},
        "winner": {"column": "preferred", "left": ["1"], "right": ["2"]},
    }
    assert [pair[2:] for pair in guess.pairs] == [
        ("x0", "y0", ""),
        ("y1", "x1", ""),
        ("x2", "y2", "tie"),
        ("x3", "y3", ""),
    ]
    long = guessed([{"rater": n % 2, "question": "p", "answer": f"a{n}", "stars": n} for n in range(4)])
    assert long.options == {
        "layout": "long_ratings",
        "columns": {"user_id": "rater", "prompt": "question", "response": "answer", "rating": "stars"},
    }
    assert guessed([{"instruction": "p", "better": "a", "worse": "b"}]).options == {
        "layout": "pairs",
        "columns": {"user_id": None, "prompt": "instruction", "chosen": "better", "rejected": "worse"},
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"user_id": 1, "prompt": "p", "responses": ["a", "b"], "ratings": [1, 2], "ranking": [1, 2]}],
            r"can be read in 2 ways; choose one of them:\n  --layout ratings\n  --layout ranking",
        ),
        (
            [{"user": 1, "annotator": 2, "prompt": "p", "chosen": "a", "rejected": "b"}],
            r"2 ways; .*:\n  --layout pairs --columns user_id=user\n  --layout pairs --columns user_id=annotator",
        ),
        (
            [{"user_id": 1, "prompt": "p", "chosen": "a", "rejected": "b", "winner": "model_b"}],
            r"pairs: nothing reads the column 'winner' \('model_b'\) that names a winner",
        ),
        ([{"id": 1, "text": "p"}], "expected one of the layouts of docs/data.md, got the columns id, text"),
    ],
)
def test_what_is_not_sure_is_not_guessed(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guessed(rows)


def test_the_layout_whose_columns_fit_is_guessed_of_malformed_rows() -> None:
    """Reading says what is wrong with the rows; of two layouts the one that has fewer malformed rows is guessed."""
    row = {"user_id": 1, "prompt": "p", "response_a": "a", "response_b": "b", "best": "0"}
    assert guessed([row, {**row, "best": "1"}]).options["winner"] == {"column": "best"}
    assert len(guessed([row, {**row, "best": "a"}]).malformed) == 1
    both = {"prompt": "p", "chosen": "a", "rejected": "b", "responses": "a", "ratings": 1}
    assert guessed([both]).name == "pairs"


def test_what_is_said_is_not_guessed() -> None:
    both = {"user": 1, "annotator": 2, "prompt": "p", "chosen": "a", "rejected": "b"}
    assert guessed([both], columns={"user_id": "annotator"}).options["columns"] == {"user_id": "annotator"}
    lists = {"user_id": 1, "prompt": "p", "responses": ["a", "b"], "ratings": [1, 2], "ranking": [1, 2]}
    assert guessed([lists], layout="ranking").options == {"layout": "ranking"}
    rows = [{"user_id": 1, "prompt": "p", "response_a": "a", "response_b": "b", "best": word} for word in "01"]
    guess = guessed(rows, winner={"column": "best", "left": 0, "right": 1})
    assert [pair[2:4] for pair in guess.pairs] == [("a", "b"), ("b", "a")]
    weighed = (
        {"prompt": "p", "response": "a", "nice": 1, "true": 0},
        {"prompt": "p", "response": "b", "nice": 0, "true": 2},
    )
    guess = guessed(list(weighed), attributes={"nice": 1, "true": 1})
    assert [pair[2:4] for pair in guess.pairs] == [("b", "a")]
