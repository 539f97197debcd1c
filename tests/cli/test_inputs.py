"""What every kind of malformed or odd input gets: an error that names it and says how to go on, or its exact meaning.

Each table maps a name to the content and to what the command answers, as a regular expression; None means that it is
read. Whatever is refused leaves the users and the output as they were, and nothing ends in a traceback.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from plm.backbones import HashingBackbone
from plm.checkpoint import load_method
from plm.cli import main
from plm.data.schema import read_pairs
from plm.methods.lore import LoRe
from plm.testing import saved
from plm.users import UserStore, store_path
from tests.changed_bytes import changed_bytes

HUGE = "1" + "0" * 400
DEEP = "[" * 100_000
ROW = {"user_id": "n0", "prompt": "p", "chosen": "a good bus", "rejected": "poor water"}
GOOD = json.dumps(ROW) + "\n"
pytestmark = pytest.mark.filterwarnings("default::UserWarning")  # a warning is no refusal
Run = Callable[..., tuple[int, str]]


def second(**changes: Any) -> str:
    """Two rows as JSONL, of which the second has other values."""
    return GOOD + json.dumps({**ROW, "prompt": "q", **changes}) + "\n"


def written(name: str, literal: str) -> str:
    """Two rows as JSONL, of which the second gives a value as it stands."""
    return GOOD + GOOD.replace('"p"', '"q"').rstrip()[:-1] + f', "{name}": {literal}}}\n'


def table(**columns: Any) -> bytes:
    """A Parquet file of two pairs with other or further columns."""
    usual = {name: [value, f"{value} too"] for name, value in ROW.items()}
    sink = io.BytesIO()
    pq.write_table(
        pa.table({name: column for name, column in {**usual, **columns}.items() if column is not None}), sink
    )
    return sink.getvalue()


def damaged(content: bytes, start: int, stop: int) -> bytes:
    return content[:start] + b"\xff" * (stop - start) + content[stop:]


CSV = "user_id,prompt,chosen,rejected\nn0,p,good bus,bad tax\n"
PACKED = gzip.compress((GOOD * 50).encode(), mtime=0)
MS = pa.timestamp("us")

PAIRS: dict[str, tuple[str | bytes, str | None]] = {
    # files
    "empty.jsonl": ("", r"expected preference pairs, got none in .*empty\.jsonl, which is empty"),
    "blank.jsonl": ("\n \n", "expected preference pairs, got none in"),
    "empty.csv": ("", r"expected preference pairs, got none in .*empty\.csv, which is empty"),
    "header.csv": ("user_id,prompt,chosen,rejected\n", "expected preference pairs, got none in"),
    "empty.jsonl.gz": (gzip.compress(b""), "expected preference pairs, got none in"),
    "no_rows.parquet": (
        table(**{name: pa.array([], pa.string()) for name in ROW}),
        "expected preference pairs, got none",
    ),
    "zero.parquet": (b"", "zero.parquet: expected a Parquet file"),
    "text.parquet": (GOOD, "text.parquet: expected a Parquet file"),
    "cut.parquet": (table()[:-20], "cut.parquet: expected a Parquet file"),
    "corrupt.parquet": (damaged(table(), 8, 24), "corrupt.parquet"),
    "no_ending": (GOOD, r"expected a file ending in \.jsonl, .* got ''"),
    "x.txt": (GOOD, r"expected a file ending in \.jsonl, .* got '\.txt'"),
    "no_gzip.jsonl.gz": (GOOD, r"expected a whole gzip file, got a damaged one .* write it again"),
    "cut.jsonl.gz": (PACKED[:40], "expected a whole gzip file, got a damaged one"),
    "cut.csv.gz": (gzip.compress(CSV.encode())[:40], "expected a whole gzip file, got a damaged one"),
    "middle.jsonl.gz": (damaged(PACKED, 30, 40), "expected a whole gzip file, got a damaged one"),
    "checksum.jsonl.gz": (
        damaged(PACKED, len(PACKED) - 8, len(PACKED) - 4),
        "expected a whole gzip file, got a damaged",
    ),
    # characters: a mark of order and both line ends are read, other encodings are told to be saved as UTF-8
    "bom.jsonl": (GOOD.encode("utf-8-sig"), None),
    "bom.csv": (CSV.encode("utf-8-sig"), None),
    "crlf.jsonl": (second().replace("\n", "\r\n"), None),
    "crlf.csv": (CSV.replace("\n", "\r\n"), None),
    "cr_only.jsonl": (second(prompt="q").replace("\n", "\r"), r"cr_only\.jsonl:1: malformed JSON \(Extra data"),
    "latin1.jsonl": (second(user_id="é").encode().replace(b"\\u00e9", b"\xe9"), r":2: .*expected UTF-8, got byte 0xe9"),
    "utf16.jsonl": (GOOD.encode("utf-16"), r":1: .*expected UTF-8, got zero bytes, as UTF-16 has them"),
    "utf16le.jsonl": (GOOD.encode("utf-16-le"), "expected UTF-8, got zero bytes, as UTF-16 has them"),
    "utf16.csv": (CSV.encode("utf-16"), r"utf16\.csv: expected UTF-8 text, .*save the file as UTF-8"),
    "zeros.jsonl": (b"\0" * 40, r":1: malformed JSON \(expected UTF-8, got zero bytes"),
    # rows
    "array.jsonl": (json.dumps([ROW]), r"array\.jsonl:1: expected a JSON object, .*name a file of one array \.json"),
    "scalar.jsonl": ("5\n", r"scalar\.jsonl:1: expected a JSON object, got 5"),
    "brace.jsonl": ("{\n", r"brace\.jsonl:1: malformed JSON"),
    "cut.jsonl": (second()[:-9], r"cut\.jsonl:2: malformed JSON"),
    "deep.jsonl": (GOOD + DEEP, r"deep\.jsonl:2: malformed JSON \(its brackets are too deep to read\)"),
    "key_twice.jsonl": (
        second().replace('"p", "chosen"', '"p", "user_id": "z", "chosen"'),
        "the key 'user_id' is given 2",
    ),
    "column_twice.csv": (
        "user_id,prompt,chosen,rejected,chosen\na,p,x,y,z\n",
        "expected each column once, got 'chosen'",
    ),
    "missing.jsonl": (json.dumps({**ROW, "rejected": None}).replace(', "rejected": null', ""), "'rejected' is missing"),
    "typo.jsonl": (GOOD.replace("user_id", "user"), r"did you mean 'user'\? Set columns: \{user_id: user\}"),
    "semicolon.csv": (
        CSV.replace(",", ";").replace("good", "good, big"),
        "between the cells, got semicolons: 'user_id;prompt;chosen;rejected'; save it as CSV with commas:",
    ),
    "quoted.csv": ('"user_id";"prompt"\n"a";"b"\n', "expected commas between the cells, got semicolons"),
    "separator.csv": ("sep=;\n" + CSV.replace(",", ";"), "expected commas between the cells, got semicolons: 'sep=;'"),
    "tabs.csv": (CSV.replace(",", "\t"), r"expected commas between the cells, got tabs: 'user_id\\tprompt"),
    "rows.tsv": (CSV.replace(",", "\t"), r"got '\.tsv'; save the table as CSV with commas"),
    "rows.xlsx": (b"PK", r"got '\.xlsx'; save the table as CSV with commas"),
    "in_a_text.csv": (CSV.replace("good bus", "good; bus\t"), None),
    "short.csv": (CSV + "a,b\n", r"short\.csv:3: expected 4 cells, got 2"),
    "quote.csv": (CSV + 'a,"p,x,y\n' + "b,p,x,y\n" * 9, r"quote\.csv:3: malformed CSV"),
    "zero_byte.csv": (CSV + "a\0,p,x,y\n", r"zero_byte\.csv:3: user_id: expected an id without control characters"),
    "long.csv": (CSV + f"a,p,{'long ' * 40_000},y\n", None),
    "formula.csv": (CSV + "=1+1,p,@x,-y\n", None),
    # ids
    "user_null.jsonl": (second(user_id=None), r":2: user_id: missing or null"),
    "user_empty.jsonl": (second(user_id=""), r":2: user_id: expected an id, got ''"),
    "user_space.jsonl": (second(user_id=" "), r":2: user_id: expected an id, got ' '"),
    "user_bool.jsonl": (second(user_id=True), r":2: user_id: expected a string or an integer, got True"),
    "user_float.jsonl": (second(user_id=1.5), r":2: user_id: expected a string or an integer, got 1.5"),
    "user_list.jsonl": (second(user_id=["a"]), r":2: user_id: expected a string or an integer"),
    "user_object.jsonl": (second(user_id={"a": 1}), r":2: user_id: expected a string or an integer"),
    "user_newline.jsonl": (second(user_id="a\nb"), r":2: user_id: expected an id without control characters"),
    "user_zero.jsonl": (second(user_id="a\0b"), r":2: user_id: expected an id without control characters"),
    "user_escape.jsonl": (second(user_id="\x1b[2J"), r":2: user_id: expected an id without control characters"),
    "user_turned.jsonl": (second(user_id="\u202eabc"), r":2: user_id: expected an id without control characters"),
    "user_half.jsonl": (second(user_id="\ud800x"), r":2: user_id: expected text, got half of a character"),
    "user_integer.jsonl": (
        written("user_id", "7").replace('"user_id": "n0", ', "", 2).replace("{", '{"user_id": 8, ', 1),
        None,
    ),
    "user_digits.jsonl": (second(user_id=10**399), None),
    "user_formula.jsonl": (second(user_id='=HYPERLINK("http://x")'), None),
    "user_markup.jsonl": (second(user_id="<b>[/red]"), None),
    "user_path.jsonl": (second(user_id="../../etc/passwd"), None),
    "user_emoji.jsonl": (second(user_id="\U0001f469\u200d\U0001f467"), None),
    "user_bytes.parquet": (table(user_id=[b"\xff", b"a"]), r"row 0: user_id: expected a string or an integer, got b"),
    "user_float.parquet": (table(user_id=[7.0, 8.0]), None),
    "user_none.parquet": (table(user_id=pa.array([None, None], pa.null())), "row 0: user_id: missing or null"),
    "no_utf8.parquet": (
        table(prompt=pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"a"]).buffers())),
        "no_utf8.parquet: expected a Parquet file, got 'utf-8' codec",
    ),
    "dictionary.parquet": (table(user_id=pa.array(["a", "b"]).dictionary_encode()), None),
    "large.parquet": (table(prompt=pa.array(["p", "q"], pa.large_string())), None),
    "dialogue_object.jsonl": (second(dialogue_id={}), r":2: dialogue_id: expected a string or an integer"),
    # texts and messages
    "text_int.jsonl": (second(chosen=5), r":2: chosen: expected a text or chat messages, got 5"),
    "text_empty.jsonl": (second(chosen=""), r":2: chosen: empty text"),
    "text_half.jsonl": (second(chosen="\udfff x"), r":2: chosen: expected text, got half of a character \(\\udfff\)"),
    "text_zero.jsonl": (second(chosen="a\0b"), None),
    "text_equal.jsonl": (second(rejected=ROW["chosen"]), r":2: chosen equals rejected"),
    "text_messages.jsonl": (
        second(chosen=[{"role": "assistant", "content": "x"}]),
        r":2: .*both be texts or both chat",
    ),
    "text_no_role.jsonl": (second(chosen=[{"role": "user"}]), r":2: chosen: expected chat messages"),
    "text_printed.jsonl": (
        second(chosen='[{"role": 5}]'),
        r":2: chosen: expected chat messages .*'\[\{\"role\": 5\}\]'",
    ),
    "prompt_null.jsonl": (second(prompt=None), r":2: prompt: missing or null"),
    "prompt_list.jsonl": (
        second(prompt=["a", "b"]),
        r":2: prompt: .*not a list of 2 strings; write one row per response",
    ),
    "prompt_deep.jsonl": (second(prompt=json.loads("[" * 900 + "]" * 900)), r":2: prompt: expected chat messages"),
    "prompt_object.parquet": (
        table(prompt=[{"role": "user", "content": "x"}] * 2),
        "row 0: prompt: expected a text or chat",
    ),
    # numbers
    "weight_null.jsonl": (second(weight=None), None),
    "weight_zero.jsonl": (second(weight=0), None),
    "weight_tiny.jsonl": (second(weight=1e-300), None),
    "weight_negative.jsonl": (second(weight=-1), r":2: weight: expected a weight between 0 and 1e30, got -1"),
    "weight_1e31.jsonl": (second(weight=1e31), r":2: weight: expected a weight between 0 and 1e30, got 1e\+31"),
    "weight_1e400.jsonl": (written("weight", "1e400"), r":2: weight: expected a weight between 0 and 1e30, got inf"),
    "weight_huge.jsonl": (written("weight", HUGE), r":2: weight: expected a number below 1e308"),
    "weight_digits.jsonl": (written("weight", "1" * 5000), r":2: malformed JSON \(Exceeds the limit"),
    "weight_nan.jsonl": (written("weight", "NaN"), r":2: malformed JSON \(NaN is not JSON; write null\)"),
    "weight_infinite.jsonl": (written("weight", "Infinity"), r":2: malformed JSON \(Infinity is not JSON"),
    "weight_minus.jsonl": (written("weight", "-Infinity"), r":2: malformed JSON \(-Infinity is not JSON"),
    "weight_word.jsonl": (second(weight="nan"), r":2: weight: expected a weight between 0 and 1e30, got 'nan'"),
    "weight_bool.jsonl": (second(weight=True), r":2: weight: expected a number, got True"),
    "weight_list.jsonl": (second(weight=[1]), r":2: weight: expected a number, got \[1\]"),
    "weight_object.jsonl": (second(weight={}), r":2: weight: expected a number, got \{\}"),
    "weight_nan.parquet": (
        table(weight=[float("nan"), 1.0]),
        "row 0: weight: expected a weight between 0 and 1e30, got nan",
    ),
    "weight_decimal.parquet": (
        table(weight=[decimal.Decimal("1.0")] * 2),
        "row 0: weight: expected a number, got Decimal",
    ),
    "score_1e39.jsonl": (second(chosen_score=1e39, rejected_score=0), r":2: chosen_score: .*got 1e\+39"),
    "score_huge.jsonl": (written("chosen_score", HUGE), r":2: .*chosen_score: expected a number below 1e308"),
    "tie_2.jsonl": (second(tie=2), r":2: tie: expected true or false, got 2"),
    "tie_list.jsonl": (second(tie=[]), r":2: tie: expected true or false, got \[\]"),
    "turn_half.jsonl": (second(dialogue_id="d", turn=1.5), r":2: turn: expected an integer, got 1.5"),
    "turn_1e300.jsonl": (
        second(dialogue_id="d", turn=1e300),
        r":2: turn: expected an integer below 2 to the power of 63",
    ),
    "turn_huge.jsonl": (
        second(dialogue_id="d", turn=10**30),
        r":2: turn: expected an integer below 2 to the power of 63",
    ),
    # times
    "time_0001.jsonl": (second(timestamp="0001-01-01T00:00:00"), None),
    "time_9999.jsonl": (second(timestamp="9999-12-31T23:59:59"), None),
    "time_word.jsonl": (
        second(timestamp="yesterday"),
        r":2: timestamp: expected seconds or an ISO date, got 'yesterday'",
    ),
    "time_list.jsonl": (second(timestamp=[]), r":2: timestamp: expected a number"),
    "time_huge.jsonl": (written("timestamp", HUGE), r":2: timestamp: expected a number below 1e308"),
    "time_nano.parquet": (table(timestamp=pa.array([1, 2], pa.timestamp("ns"))), None),
    "time_range.parquet": (
        table(timestamp=pa.array([2**62, 1], MS)),
        "expected a Parquet file, got date value out of range",
    ),
    "date_range.parquet": (
        table(timestamp=pa.array([2**30, 1], pa.date32())),
        "expected a Parquet file, got days=1073741824",
    ),
    "span.parquet": (
        table(timestamp=[datetime.timedelta(seconds=1)] * 2),
        "row 0: timestamp: expected a number, got datetime",
    ),
    # splits and ratings
    "row_split.jsonl": (second(row_split="dev"), r":1: row_split: missing or null"),
    "user_split.jsonl": (second(user_split=[]), r":1: user_split: missing or null"),
    "rating_huge.jsonl": (
        f'{{"user_id": "a", "prompt": "p", "responses": ["x", "y"], "ratings": [{HUGE}, 1]}}',
        r":1: ratings: expected finite numbers",
    ),
    "rating_nan.jsonl": (
        '{"user_id": "a", "prompt": "p", "responses": ["x", "y"], "ratings": [NaN, 1]}',
        r":1: malformed JSON \(NaN is not JSON",
    ),
    "rating_weight.jsonl": (
        f'{{"user_id": "a", "prompt": "p", "responses": ["x", "y"], "ratings": [2, 1], "weight": {HUGE}}}',
        r":1: weight: expected a number below 1e308",
    ),
}

SCORED: dict[str, tuple[str | bytes, str | None]] = {
    "empty.jsonl": ("", r'expected rows like \{"response": \.\.\.\}'),
    "bytes.jsonl": (b"\xff\xfe\xfd", r":1: malformed JSON"),
    "int.jsonl": ('{"response": "bus"}\n{"response": 5}', r":2: response: expected a text or chat messages, got 5"),
    "null.jsonl": ('{"response": null}', r":1: response: expected a text or chat messages, got None"),
    "missing.jsonl": (GOOD, r":1: missing 'response', got the keys"),
    "half.jsonl": ('{"response": "\\ud800 bus"}', r":1: response: expected text, got half of a character"),
    "user_half.jsonl": ('{"response": "bus", "user_id": "\\ud800"}', r":1: user_id: expected text, got half of a char"),
    "user_list.jsonl": ('{"response": "bus", "user_id": ["u0"]}', r":1: user_id: expected a string or an integer"),
    "nan.jsonl": ('{"response": "bus", "x": NaN}', r":1: malformed JSON \(NaN is not JSON"),
    "twice.csv": ("response,user_id,response\na,u0,b\n", "expected each column once, got 'response'"),
    "cut.jsonl.gz": (gzip.compress(b'{"response": "bus"}' * 90)[:30], "expected a whole gzip file"),
    "zero.parquet": (b"", "expected a Parquet file"),
    "reward.jsonl": ('{"response": "bus", "reward": 0.9}', "expected rows without 'reward', which this command writes"),
    "known.jsonl": ('{"response": "bus", "user_known": "x"}', "expected rows without 'user_known'"),
    "bytes.parquet": (
        table(response=["a", "b"], d=[b"\xff", b"a"]),
        "column 'd': expected values that JSON can hold, got b",
    ),
    "messages.jsonl": ('{"response": [{"role": "assistant", "content": "hi"}], "prompt": "q"}', None),
    "huge.jsonl": (f'{{"response": "bus", "x": {HUGE}}}', None),
    "note_half.jsonl": ('{"response": "bus", "note": "\\ud800"}', None),
    "nan.parquet": (table(response=["a", "b"], x=[float("nan"), 1.0], day=[datetime.date(2020, 1, 2)] * 2), None),
}

POOLS: dict[str, tuple[str, str | None]] = {
    "empty.jsonl": ("", r"expected rows like \{\"prompt\": \.\.\., \"responses\""),
    "int.jsonl": ('{"prompt": "p", "responses": [1, 2]}', r":1: responses: expected a text or chat messages"),
    "text.jsonl": ('{"prompt": "p", "responses": "ab"}', r":1: responses: expected a list of two, got 'ab'"),
    "three.jsonl": ('{"prompt": "p", "responses": ["a", "b", "c"]}', r":1: responses: expected a list of two"),
    "equal.jsonl": ('{"prompt": "p", "responses": ["a", "a"]}', r":1: responses: expected two different texts"),
    "half.jsonl": ('{"prompt": "p", "responses": ["a", "\\udc00"]}', r":1: responses: expected text, got half of a"),
    "deep.jsonl": (DEEP, r":1: malformed JSON \(its brackets are too deep"),
    "no_prompt.jsonl": ('{"prompt": null, "responses": ["a bus", "b tax"]}', None),
}

SAMPLES: dict[str, tuple[str, str]] = {
    "empty.jsonl": ("", "expected two or more prompts with two different responses"),
    "one.jsonl": ('{"prompt": "p", "responses": ["x"]}', "expected two or more prompts with two different responses"),
    "none.jsonl": ('{"prompt": "p", "responses": [null, "b"]}', r":1: responses: expected a list of texts"),
    "text.jsonl": ('{"prompt": "p", "responses": "x"}', r":1: responses: expected a list of texts, got 'x'"),
    "deep.jsonl": (DEEP, "too deep"),
    "cut.jsonl": ('{"prompt": "p", "resp', "malformed JSON"),
}

RECIPES: dict[str, tuple[str | bytes, str]] = {
    "empty.yaml": ("", "expected a mapping in the config .* got nothing"),
    "scalar.yaml": ("hello", "expected a mapping in the config .* got a str"),
    "list.yaml": ("[1, 2]", "expected a mapping in the config .* got a list"),
    "binary.yaml": (b"\xf7\x84\xb3=D\xb6", "is not valid YAML: 'utf-8' codec"),
    "utf16.yaml": ("model: LoRe".encode("utf-16"), "is not valid YAML: 'utf-8' codec"),
    "deep.yaml": (DEEP, "its brackets are too deep to read"),
    "tag.yaml": ("!!python/object/new:os.system [x]", "is not valid YAML: could not determine a constructor"),
    "class.yaml": (
        "data: {source: {class_path: builtins.exec}}",
        "builtins.exec does not correspond to a subclass of Pair",
    ),
    "group.yaml": ("defaults: [{../recipes: group}]", r"no group '\.\./recipes' in defaults"),
    "variable.yaml": (
        "model: LoRe\ndata: {source: {class_path: PairFiles, init_args: {path: '${oc.env:NO_SUCH_NAME}'}}}",
        "NO_SUCH_NAME",
    ),
    "eval.yaml": (
        "data: {source: {class_path: PairFiles, init_args: {path: '${eval:1+1}'}}}",
        "interpolation type eval",
    ),
    "itself.yaml": ("trainer: {max_epochs: '${trainer.max_epochs}'}", "trainer.max_epochs"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint over hashed words, with its users."""
    torch.manual_seed(0)
    backbone = HashingBackbone(dim=16)
    method = LoRe(2, backbone.feature_dim, backbone=backbone.spec(), num_bases=2)
    torch.nn.init.normal_(method.bases)
    with saved(method) as path:
        copy = tmp_path_factory.mktemp("trained") / "best.ckpt"
        shutil.copy(path, copy)
        shutil.copy(store_path(path), store_path(copy))
        yield copy


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command; the exit status and all that it prints on standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> tuple[int, str]:
        status = main([str(arg) for arg in args])
        shown = capsys.readouterr().err
        assert "Traceback" not in shown and "this is a bug" not in shown
        return status, shown

    return call


def matches(outcome: tuple[int, str], expected: str | None) -> bool:
    """Whether a command did what a table says; the message is shown where it did not."""
    status, shown = outcome
    assert (status == 0) == (expected is None), shown
    assert expected is None or re.search(expected, shown, re.DOTALL), shown
    return status == 0


def placed(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def stored(users: Path) -> list[str]:
    return UserStore(users).ids


@pytest.fixture
def users(trained: Path, tmp_path: Path) -> Path:
    """A copy of the users of the checkpoint, which a test may change."""
    return Path(shutil.copy(store_path(trained), tmp_path / "copy.db"))


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_to_learn_from(name: str, trained: Path, users: Path, run: Run, tmp_path: Path) -> None:
    content, expected = PAIRS[name]
    before = stored(users)
    file = placed(tmp_path, name, content)
    if matches(run("adapt", "--ckpt_path", trained, "--users", users, "--pairs", file), expected):
        assert {*read_pairs([file]).user_ids, *before} == {*stored(users)}
        assert run("users", "list", "--ckpt_path", trained, "--users", users)[0] == 0
    else:
        assert stored(users) == before
        assert run("data", "check", "--pairs", file)[0] == 1


@pytest.mark.parametrize("name", ["no.jsonl", "no.csv.gz", "no.parquet", "folder.json"])
def test_a_file_that_is_not_there_is_named(name: str, trained: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    what = "a folder" if name == "folder.json" else "which does not exist"
    for verb, option in (("adapt", "--pairs"), ("score", "--responses"), ("query", "--pool")):
        user = ["--user", "anna"] if verb == "query" else []
        status, shown = run(verb, "--ckpt_path", trained, option, name, *user)
        assert status == 1 and shown.endswith(f"error: expected a file, got {name!r}, {what}\n")


@pytest.mark.parametrize("name", SCORED)
def test_responses_to_score(name: str, trained: Path, run: Run, tmp_path: Path) -> None:
    content, expected = SCORED[name]
    output = placed(tmp_path, "output.jsonl", "kept")
    file = placed(tmp_path, name, content)
    if matches(run("score", "--ckpt_path", trained, "--responses", file, "--output", output), expected):
        rows = [json.loads(line, parse_constant=pytest.fail) for line in output.read_text().splitlines()]
        assert rows and all(isinstance(row["reward"], float) and row["user_known"] is False for row in rows)
    else:
        assert output.read_text() == "kept"
    assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())


def test_values_of_parquet_keep_their_meaning_in_json(trained: Path, run: Run, tmp_path: Path) -> None:
    """A missing number is null and a day its text; nothing becomes the way in which Python prints it."""
    file = placed(tmp_path, "rows.parquet", SCORED["nan.parquet"][0])
    run("score", "--ckpt_path", trained, "--responses", file, "--output", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["x"], row["day"]) for row in rows] == [(None, "2020-01-02"), (1.0, "2020-01-02")]


def test_half_of_a_character_is_refused_in_python_too(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"row 2 of 2: expected text, got half of a character"):
        load_method(trained).score(["a bus", "\ud83d"])


@pytest.mark.parametrize("name", POOLS)
def test_pairs_to_ask_about(name: str, trained: Path, run: Run, tmp_path: Path) -> None:
    content, expected = POOLS[name]
    matches(run("query", "--ckpt_path", trained, "--user", "u0", "--pool", placed(tmp_path, name, content)), expected)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_to_label(name: str, run: Run, tmp_path: Path) -> None:
    content, expected = SAMPLES[name]
    rewards = "{rewards: {length: {class_path: plm.data.rewards.Length}}}"
    file, output = placed(tmp_path, name, content), placed(tmp_path, "output.jsonl", "kept")
    matches(run("label", "--rewards", rewards, "--samples", file, "--output", output), expected)
    assert output.read_text() == "kept"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a recipe names is called before its class is known to be one of the framework's."""
    content, expected = RECIPES[name]
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("a recipe ran a command"))
    matches(run("fit", "--config", placed(tmp_path, name, content)), expected)
    assert [path.name for path in tmp_path.iterdir()] == [name]


OBJECTIVES: dict[str, tuple[dict[str, list[Any]], str]] = {
    "constant": ({"a": [1.0] * 8}, r"\['a'\] are the same for nearly all responses; leave them out"),
    "nan": ({"a": [float("nan")] * 8}, "expected numbers in the column 'a', got nan"),
    "infinite": ({"a": [float("inf")] * 8}, "expected numbers in the column 'a', got inf"),
    "text": ({"a": ["x"] * 8}, "expected numbers in the column 'a', got 'x'"),
    "missing": ({"b": [1.0] * 8}, r"expected the column 'a', got \['prompt_id', 'x', 'b'\]"),
    "one_prompt": (
        {"prompt_id": ["p"] * 8, "a": list(range(8))},
        "expected at least 2 prompts with 2 or more complete",
    ),
    "no_prompt": (
        {"prompt_id": [None] * 8, "a": list(range(8))},
        "expected at least 2 prompts with 2 or more complete",
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rewards_of_a_portfolio(name: str, run: Run, tmp_path: Path) -> None:
    columns, expected = OBJECTIVES[name]
    usual = {"prompt_id": [f"p{row // 2}" for row in range(8)], "x": list(range(8))}
    pq.write_table(pa.table({**usual, **columns}), tmp_path / "rewards.parquet")
    table_of = (
        "--rewards",
        "RewardTable",
        "--rewards.path",
        tmp_path / "rewards.parquet",
        "--rewards.objectives",
        "{a: a, x: x}",
    )
    matches(run("portfolio", *table_of, "--size", 2), expected)


def with_entries(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: {**checkpoint, **entries}


def with_about(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: {**checkpoint, "plm": {**checkpoint["plm"], **entries}}


def with_arguments(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: {**checkpoint, "hyper_parameters": {**checkpoint["hyper_parameters"], **entries}}


def with_tensors(change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda checkpoint: {
        **checkpoint,
        "state_dict": {name: change(value) for name, value in checkpoint["state_dict"].items()},
    }


CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a_list": (lambda checkpoint: [1], "has no 'plm' entry"),
    "another_program": (lambda checkpoint: {"state_dict": {}}, "has no 'plm' entry"),
    "about_none": (with_entries(plm=None), "no valid entry plm"),
    "about_text": (with_entries(plm="LoRe"), "no valid entry plm"),
    "class_none": (with_about(class_path=None), "no valid entry plm"),
    "class_dot": (with_about(class_path=".x"), r"cannot import the method '\.x'"),
    "class_system": (with_about(class_path="os.system"), "os.system"),
    "class_popen": (with_about(class_path="subprocess.Popen"), "subprocess.Popen"),
    "class_eval": (with_about(class_path="builtins.eval"), "builtins.eval"),
    "class_of_the_folder": (with_about(class_path="evilmod.M"), "cannot import the method 'evilmod.M'"),
    "ids_none": (with_about(user_ids=None), "no valid entry plm"),
    "ids_integers": (with_about(user_ids=[1, 2]), "no valid entry plm"),
    "ids_nested": (with_about(user_ids=[["a"], ["b"]]), "no valid entry plm"),
    "ids_twice": (with_about(user_ids=["a", "a"]), "no valid entry plm"),
    "ids_few": (with_about(user_ids=["a"]), "user"),
    "arguments_none": (with_entries(hyper_parameters=None), "no valid entry hyper_parameters"),
    "arguments_list": (with_entries(hyper_parameters=[1]), "no valid entry hyper_parameters"),
    "argument_unknown": (with_arguments(no_such=1), "does not fit the installed .*no_such"),
    "bases_negative": (with_arguments(num_bases=-1), "num_bases"),
    "bases_text": (with_arguments(num_bases="x"), "num_bases|does not fit the installed"),
    "bases_many": (with_arguments(num_bases=9), "does not fit the installed"),
    "width_other": (with_arguments(feature_dim=10**6), "does not fit the installed|feature_dim|width"),
    "backbone_text": (with_arguments(backbone="x"), "expected backbone of .* as class_path and init_args"),
    "backbone_system": (with_arguments(backbone={"class_path": "os.system"}), "os.system"),
    "backbone_argument": (
        with_arguments(backbone={"class_path": "plm.backbones.HashingBackbone", "init_args": {"no_such": 1}}),
        "no_such",
    ),
    "no_weights": (lambda checkpoint: {k: v for k, v in checkpoint.items() if k != "state_dict"}, "entry state_dict"),
    "weights_list": (with_entries(state_dict=[1]), "no valid entry state_dict"),
    "weights_further": (
        lambda checkpoint: {**checkpoint, "state_dict": {**checkpoint["state_dict"], "no_such": torch.ones(1)}},
        "no_such",
    ),
    "weights_nan": (with_tensors(lambda value: value * float("nan") if value.is_floating_point() else value), "nan"),
    "weights_nowhere": (with_tensors(lambda value: value.to("meta")), "damaged|meta|does not fit"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected = CHECKPOINTS[name]
    (tmp_path / "evilmod.py").write_text("raise SystemExit('a module of the working folder was run')")
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("a checkpoint ran a command"))
    torch.save(change(torch.load(trained, weights_only=True)), tmp_path / "best.ckpt")
    shutil.copy(store_path(trained), store_path(tmp_path / "best.ckpt"))
    rows = placed(tmp_path, "rows.jsonl", '{"response": "bus"}')
    matches(run("score", "--ckpt_path", tmp_path / "best.ckpt", "--responses", rows), expected)


class Command:
    """Pickles to the call of a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a checkpoint was unpickled",)


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "no archive that torch writes"),
    "text": (lambda whole: b"hello", "no archive that torch writes"),
    "zeros": (lambda whole: b"\0" * 4096, "no archive that torch writes"),
    "first_byte": (lambda whole: whole[:1], "no archive that torch writes"),
    "half": (lambda whole: whole[: len(whole) // 2], "no archive that torch writes"),
    "another_archive": (lambda whole: archive({"a": b"x"}), "cannot be read"),
    "pickle": (
        lambda whole: archive({"best/data.pkl": b"cos\nsystem\n(S'x'\ntR.", "best/version": b"3"}),
        "cannot be read",
    ),
}


def archive(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return sink.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_checkpoints(name: str, trained: Path, run: Run, tmp_path: Path) -> None:
    """No message passes on the advice of torch to read the file without its guard."""
    change, expected = FILES[name]
    path = placed(tmp_path, "best.ckpt", change(trained.read_bytes()))
    rows = placed(tmp_path, "rows.jsonl", '{"response": "bus"}')
    outcome = run("score", "--ckpt_path", path, "--responses", rows)
    matches(outcome, expected)
    assert "weights_only" not in outcome[1]


def test_a_checkpoint_with_an_object_is_not_unpickled(trained: Path, run: Run, tmp_path: Path) -> None:
    torch.save({**torch.load(trained, weights_only=True), "extra": Command()}, tmp_path / "best.ckpt")
    rows = placed(tmp_path, "rows.jsonl", '{"response": "bus"}')
    outcome = run("score", "--ckpt_path", tmp_path / "best.ckpt", "--responses", rows)
    matches(outcome, "it holds more than tensors and plain values, or is damaged")
    assert "weights_only" not in outcome[1]


INDEX = {"format": 1, "shared_hash": "h", "tensors": "users-0.safetensors", "user_ids": ["a", "b"]}
STATES = {"num_pairs": torch.tensor([1, 2]), "state.weights": torch.zeros(2, 2)}


def header(text: str, length: int | None = None) -> bytes:
    """A safetensors file that begins so."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode() + b"\0" * 16


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> str:
    return json.dumps({"num_pairs": {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}})


FOLDERS: dict[str, tuple[Any, bytes | None]] = {
    "index_empty": ("", save(STATES)),
    "index_zero": (0, save(STATES)),
    "index_null": (None, save(STATES)),
    "index_list": ([], save(STATES)),
    "index_text": ("index", save(STATES)),
    "index_deep": (DEEP, save(STATES)),
    "format_9": ({**INDEX, "format": 9}, save(STATES)),
    "tensors_number": ({**INDEX, "tensors": 5}, save(STATES)),
    "tensors_above": ({**INDEX, "tensors": "../../users-1.safetensors"}, save(STATES)),
    "tensors_absolute": ({**INDEX, "tensors": "/etc/passwd"}, save(STATES)),
    "tensors_gone": (INDEX, None),
    "ids_null": ({**INDEX, "user_ids": None}, save(STATES)),
    "ids_text": ({**INDEX, "user_ids": "ab"}, save(STATES)),
    "ids_integers": ({**INDEX, "user_ids": [1, 2]}, save(STATES)),
    "ids_mixed": ({**INDEX, "user_ids": ["a", 2]}, save(STATES)),
    "ids_nested": ({**INDEX, "user_ids": [["a"], ["b"]]}, save(STATES)),
    "ids_twice": ({**INDEX, "user_ids": ["a", "a"]}, save(STATES)),
    "ids_few": ({**INDEX, "user_ids": ["a"]}, save(STATES)),
    "no_num_pairs": (INDEX, save({"state.weights": torch.zeros(2, 2)})),
    "scalar": (INDEX, save({**STATES, "num_pairs": torch.tensor(1)})),
    "empty": (INDEX, b""),
    "length_huge": (INDEX, header("{}", 2**62)),
    "length_ff": (INDEX, b"\xff" * 8),
    "deep": (INDEX, header(DEEP)),
    "dtype": (INDEX, header(entry(0, 8, [2], "XX"))),
    "outside": (INDEX, header(entry(0, 999, [2]))),
    "overflow": (INDEX, header(entry(0, 8, [2**62, 2**62]))),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_users(name: str, trained: Path, run: Run, tmp_path: Path) -> None:
    """A damaged folder of an earlier version stops every command on users, and stays for who can mend it."""
    index, states = FOLDERS[name]
    checkpoint = Path(shutil.copy(trained, tmp_path / "best.ckpt"))
    folder = tmp_path / "best.users"
    folder.mkdir()
    (folder / "index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    placed(tmp_path, "users-1.safetensors", save(STATES))
    if states is not None:
        placed(folder, "users-0.safetensors", states)
    rows = placed(tmp_path, "rows.jsonl", '{"response": "bus", "user_id": "a"}')
    expected = "the users in the folder .* cannot be read"
    matches(run("users", "list", "--ckpt_path", checkpoint), expected)
    matches(run("score", "--ckpt_path", checkpoint, "--responses", rows), expected)
    matches(run("users", "delete", "--ckpt_path", checkpoint, "--user", "a"), expected)
    assert (folder / "index.json").exists() and not store_path(checkpoint).exists()


CORPUS = [second(), second(tie=True, weight=2.5, timestamp="2020-01-02"), GOOD * 3, CSV]


@settings(max_examples=500, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_are_read_or_named(data: st.DataObject, tmp_path: Path) -> None:
    """Bytes changed, taken out or put in anywhere: a table, or one message; never another error."""
    content = changed_bytes(data, data.draw(st.sampled_from(CORPUS)).encode())
    file = placed(tmp_path, data.draw(st.sampled_from(["rows.jsonl", "rows.csv", "rows.json"])), content)
    try:
        pairs = read_pairs([file])
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert pairs.num_pairs > 0 and all(name.strip() for name in pairs.user_ids)
