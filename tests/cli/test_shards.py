"""Processes that share the work of adapting and scoring by ``--shard`` do what one process does."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from plm import load_method
from plm.backbones import HashingBackbone
from plm.cli import main
from plm.cli.options import share_name
from plm.data.ray_workers import Ended
from plm.methods.lore import LoRe
from plm.scoring import read_responses
from plm.testing import saved

WORDS = "tea milk sea walk film home black strong evening long".split()
IDS = [f"user {number}" for number in range(23)] + ["ünï", "a/b"]


def texts(draw: random.Random) -> list[str]:
    """Two different texts."""
    return [" ".join(words) for words in draw.sample(list(combinations(WORDS, 4)), 2)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    torch.manual_seed(0)
    method = LoRe(1, 64, backbone=HashingBackbone(dim=64).spec(), num_bases=3)
    torch.nn.init.normal_(method.bases)
    with saved(method) as path:
        yield path


def pairs_of(draw: random.Random, user_ids: list[str], count: int) -> list[dict[str, Any]]:
    return [
        {"user_id": user_id, "prompt": "what?", **dict(zip(("chosen", "rejected"), texts(draw), strict=True))}
        for user_id in user_ids
        for _ in range(count)
    ]


@pytest.mark.filterwarnings("ignore:1 malformed row left out")
def test_shares_of_the_users_learn_what_one_process_learns(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In any order, one of them twice: every user once, with the state that one process gives; malformed rows once."""
    file = write(tmp_path / "new.jsonl", [*pairs_of(random.Random(0), IDS, 6), {"user_id": "user 0"}])
    adapt = ["adapt", "--ckpt_path", str(checkpoint), "--pairs", file, "--on_error", "skip"]
    whole, parts = str(tmp_path / "whole.db"), str(tmp_path / "parts.db")
    assert main([*adapt, "--users", whole]) == 0
    capsys.readouterr()
    numbers = []
    for index in (3, 1, 4, 2, 4):
        assert main([*adapt, "--users", parts, "--shard", f"{index}/4"]) == 0
        numbers.append(int(capsys.readouterr().out.split("in the store")[1].split("│")[1]))
    assert sum(numbers[:4]) == len(IDS) and numbers[4] == numbers[2] and min(numbers) > 0
    one, shared = (load_method(checkpoint, users=place) for place in (whole, parts))
    assert sorted(one.users.ids) == sorted(shared.users.ids) == sorted(IDS)
    for name, value in one.known_users(IDS).tensors.items():
        torch.testing.assert_close(shared.known_users(IDS).tensors[name], value, rtol=0, atol=1e-5)
    assert {user.user_id: user.num_pairs for user in shared.users} == {
        user.user_id: user.num_pairs for user in one.users
    }
    assert len(list(checkpoint.parent.glob("*.skipped.ndjson"))) == 2  # of the whole, and of the first share
    few = write(tmp_path / "few.jsonl", pairs_of(random.Random(0), IDS[:1], 6))
    empty = [main(["adapt", "--ckpt_path", str(checkpoint), "--pairs", few, "--shard", f"{i}/3"]) for i in (1, 2, 3)]
    assert empty == [0, 0, 0] and capsys.readouterr().out.count("no user of the file is in shard") == 2


def test_shares_of_the_rows_are_scored_as_one_process_scores_them(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(1)
    load_method(checkpoint).learn(
        "anna", [{key: row[key] for key in row if key != "user_id"} for row in pairs_of(draw, ["anna"], 4)]
    )
    rows = [{"id": row, "response": texts(draw)[0], "user_id": draw.choice(["anna", "nobody"])} for row in range(25)]
    file = write(tmp_path / "rows.jsonl", rows)
    score = ["score", "--ckpt_path", str(checkpoint), "--responses", file, "--reference", file]
    assert main([*score, "--output", str(tmp_path / "out.jsonl")]) == 0
    for index in (11, 2, 1, *range(3, 11)):
        assert main([*score, "--output", str(tmp_path / "out.jsonl"), "--shard", f"{index}/11"]) == 0
    parts = sorted(tmp_path.glob("out-*.jsonl"))
    assert [part.name for part in parts] == [f"out-{index:02}of11.jsonl" for index in range(1, 12)]
    found = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    expected = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == list(range(25))
    for one, other in zip(found, expected, strict=True):
        for name in ("reward", "win_probability"):
            assert one.pop(name) == pytest.approx(other.pop(name), abs=1e-6)
    assert found == expected
    assert main([*score, "--output", str(tmp_path / "out.jsonl"), "--shard", "30/30"]) == 0
    assert main([*score, "--output", str(tmp_path / "out.jsonl"), "--shard", "1/30"]) == 0
    assert [len((tmp_path / f"out-{name}of30.jsonl").read_text().splitlines()) for name in ("01", "30")] == [0, 1]
    capsys.readouterr()
    part = str(tmp_path / "out-01of11.jsonl")
    assert (
        main(
            [
                "score",
                "--ckpt_path",
                "x",
                "--responses",
                part,
                "--output",
                str(tmp_path / "out.jsonl"),
                "--shard",
                "1/11",
            ]
        )
        == 2
    )
    assert "is what --responses reads" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_share_looks_at_its_own_rows_alone(ending: str, tmp_path: Path) -> None:
    rows = [{"response": "" if row == 7 else f"text {row}"} for row in range(10)]
    path = tmp_path / f"rows.{ending}"
    pq.write_table(pa.Table.from_pylist(rows), path) if ending == "parquet" else write(path, rows)
    shares = [[row.text for row in read_responses(str(path), share=(index, 3))] for index in (1, 2)]
    assert shares == [[f"text {row}" for row in part] for part in (range(3), range(3, 6))]
    with pytest.raises(
        ValueError, match="rows.parquet:row 7: response" if ending == "parquet" else "rows.jsonl:8: resp"
    ):
        read_responses(str(path), share=(3, 3))


def test_adapt_says_whether_the_bases_fit_the_new_users(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the numbers of the fit's test; of few new users nothing is said. A repeated command says the same."""
    file = write(
        tmp_path / "new.jsonl",
        [{**row, "prompt": f"{number}?"} for number, row in enumerate(pairs_of(random.Random(0), IDS, 8))],
    )
    adapt = ["adapt", "--ckpt_path", str(checkpoint), "--pairs", file]
    assert main(adapt) == 0 and "bases" not in capsys.readouterr().out  # no test to compare with
    (checkpoint.parent / "splits.json").write_text(json.dumps({"pairs_support": 80, "users_unseen": 10}))
    verdicts = []
    for accuracy in (0.99, 0.02):
        ends = {f"{name}_{end}": [accuracy] * 2 for name in ("accuracy", "gain") for end in ("low", "high")}
        curve = {
            "num_users": 9,
            "shots": [0, 3],
            "log_loss": [0.6] * 2,
            "accuracy": [accuracy] * 2,
            "gain": [accuracy] * 2,
            **ends,
        }
        (checkpoint.parent / "metrics.json").write_text(json.dumps({"few_shot": curve}))
        assert main(adapt) == 0
        shown = " ".join(capsys.readouterr().out.split())
        kept = json.loads((checkpoint.parent / "new.drift.json").read_text())
        assert kept["new"]["num_users"] == len(IDS) and kept["verdict"] in shown and "after 3 of the user" in shown
        verdicts.append((kept["fit_again"], kept["new"]["accuracy"]))
    assert [fit_again for fit_again, _ in verdicts] == [True, False] and verdicts[0][1] == verdicts[1][1]
    assert main([*adapt, "--shard", "2/2"]) == 0  # knows a part of the users: the report before is of others
    assert not list(checkpoint.parent.glob("new.drift*"))
    few = write(tmp_path / "few.jsonl", pairs_of(random.Random(0), IDS[:7], 8))
    assert main([*adapt[:-1], few]) == 0 and not list(checkpoint.parent.glob("few.*"))


def serially(command: Sequence[str], workers: int | None) -> Iterator[Ended]:
    """Three shares, one after the other in this process."""
    assert workers == 3
    for index in (1, 2, 3):
        with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
            status = main([*command, "--shard", f"{index}/3"])
        yield Ended(status, output.getvalue(), errors.getvalue())


def test_an_engine_joins_what_its_workers_write(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("plm.data.ray_workers.run_shares", serially)
    monkeypatch.setattr("plm.cli.options.find_spec", lambda name: True)
    file = write(tmp_path / "new.jsonl", pairs_of(random.Random(0), IDS, 2))
    adapt = ["adapt", "--ckpt_path", str(checkpoint), "--engine", "ray", "--pairs", file, "--workers=3"]
    assert main(adapt) == 0
    assert capsys.readouterr().out.count("written to") == 3
    assert sorted(load_method(checkpoint).users.ids) == sorted(["0", *IDS])
    rows = [{"id": row, "response": f"tea {row}", "user_id": IDS[row % 5]} for row in range(10)]
    output = tmp_path / "out.jsonl"
    score = ["score", "--ckpt_path", str(checkpoint), "--responses", write(tmp_path / "rows.jsonl", rows)]
    by_ray = [*score, "--output", str(output), "--engine=ray", "--workers", "3"]
    assert main(by_ray) == 0 and f"joined in {output}" in capsys.readouterr().err
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == list(range(10))
    assert not list(tmp_path.glob("out-*"))
    monkeypatch.setattr("plm.data.ray_workers.run_shares", lambda *_: iter([Ended(0, "", ""), Ended(-9, "", "died\n")]))
    before = output.read_text()
    assert main(by_ray) == 9 and "died" in capsys.readouterr().err and output.read_text() == before
    for wrong, message in (
        ([*score, "--engine", "ray"], "--engine ray needs --output FILE"),
        ([*by_ray, "--shard", "1/2"], "--shard and --engine ray are two ways to share the work"),
        ([*score, "--workers", "2"], "--workers goes with --engine ray"),
    ):
        assert main(wrong) == 2 and message in capsys.readouterr().err
    monkeypatch.setattr("plm.cli.options.find_spec", lambda name: None)
    assert main(by_ray) == 1 and "plm score --engine ray needs ray; pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_of_ray_adapt_and_score_as_one_process(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'plm[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a file to the home
    monkeypatch.chdir(tmp_path)  # paths are those of this process
    write(tmp_path / "new.jsonl", pairs_of(random.Random(0), IDS, 6))
    rows = [{"response": " ".join(words), "user_id": IDS[len(words[0])]} for words in combinations(WORDS, 3)]
    write(tmp_path / "rows.jsonl", rows)
    found = []
    for name, by in (("alone", ()), ("ray", ("--engine", "ray", "--workers", "2"))):
        ours = ["--ckpt_path", str(checkpoint), "--users", f"{name}.db", *by]
        assert main(["adapt", *ours, "--pairs", "new.jsonl"]) == 0, capfd.readouterr()
        assert main(["score", *ours, "--responses", "rows.jsonl", "--output", f"{name}.jsonl"]) == 0, capfd.readouterr()
        found.append([json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()])
    alone, ray = found
    assert [row.pop("reward") for row in alone] == pytest.approx([row.pop("reward") for row in ray], abs=1e-5)
    assert alone == ray and all(row["user_known"] for row in ray)


@pytest.mark.parametrize(
    ("path", "share", "name"),
    [
        ("out.jsonl", (1, 1), "out.jsonl"),
        ("a.b/out.v2.jsonl", (2, 12), "a.b/out.v2-02of12.jsonl"),
        ("a.b/out", (3, 4), "a.b/out-3of4"),
    ],
)
def test_a_share_of_a_file_has_a_name_of_its_own(path: str, share: tuple[int, int], name: str) -> None:
    assert share_name(path, share) == name
