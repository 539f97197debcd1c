"""plm generate and plm sample: texts for users, and files of samples that survive a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

from plm.backbones import CausalLM, HashingBackbone, Policy
from plm.checkpoint import load_method
from plm.cli import main
from plm.generation import best_of_n, sample, sample_texts
from plm.methods.lore import LoRe
from plm.recipe.prompts import read_prompts
from plm.testing import saved
from plm.users import UserStore, store_path
from tests.test_generation import adapted

Folder = Callable[[str], Path]
PROMPTS = ["hello there", "a", "to be", "what is"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "temperature": 2.0, "seed": 3}
OPTIONS = ["--max_new_tokens", "8", "--temperature", "2.0", "--seed", "3"]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------- prompts
def test_prompts_come_from_files_of_every_kind(tmp_path: Path) -> None:
    texts = tmp_path / "p.txt"
    texts.write_text("one\n\n two\nthree\n")
    assert [prompt.text for prompt in read_prompts(str(texts))] == ["one", " two", "three"]
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": "one", "split": "test"}, {"prompt": chat}]
    read = read_prompts(jsonl(tmp_path / "p.jsonl", rows))
    assert [prompt.text for prompt in read] == ["one", '[{"role":"user","content":"hi"}]']
    assert read[0].record == rows[0]
    (tmp_path / "p.csv").write_text("id,prompt\n1,one\n2,two\n")
    assert [prompt.record for prompt in read_prompts(str(tmp_path / "p.csv"))][1] == {"id": "2", "prompt": "two"}
    pq.write_table(pa.table({"prompt": ["x", "y"]}), tmp_path / "p.parquet")
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "p.parquet"))] == ["x", "y"]
    pairs = [
        {"user_id": "u", "prompt": prompt, "chosen": split, "rejected": "b", "row_split": split}
        for prompt, split in (("one", "test"), ("two", "train"), ("two", "test"))
    ]
    (tmp_path / "r.yaml").write_text(
        "data: {source: {class_path: plm.data.sources.pairs.PairFiles, init_args: {path: "
        + jsonl(tmp_path / "pairs.jsonl", pairs)
        + "}}}"
    )
    assert [prompt.record for prompt in read_prompts(str(tmp_path / "r.yaml"))] == [
        {"prompt": "one", "split": "test"},
        {"prompt": "two", "split": "train"},  # it has been trained on
    ]


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a file of prompts, got 'nothing.txt', which does not exist"):
        read_prompts("nothing.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="at least one prompt in"):
        read_prompts(str(tmp_path / "empty.txt"))
    for rows, message in (
        ([{"prompts": "a"}], r":1: missing 'prompt', got the keys \['prompts'\]; rename 'prompts'\?"),
        ([{"prompt": "a"}, {"prompt": []}], r":2: prompt: .*not an empty list"),
        ([{"prompt": None}], ":1: prompt: expected a text or chat messages, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(jsonl(tmp_path / "p.jsonl", rows))
    repeated = jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "user_id": user} for user in ("x", "y", "y")])
    with pytest.warns(UserWarning, match="2 repeated prompts of"):
        assert len(read_prompts(repeated)) == 1
    with pytest.warns(UserWarning, match="1 repeated prompts of"):
        assert len(read_prompts(repeated, per_user=True)) == 2


# ---------------------------------------------------------------------- generate
def test_generate_writes_for_users_of_a_policy(
    causal_lm: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, output = adapted(causal_lm), tmp_path / "out.jsonl"
    prompts = jsonl(tmp_path / "p.jsonl", [{"prompt": prompt, "id": place} for place, prompt in enumerate(PROMPTS[:2])])
    with saved(method) as path:
        command = ["generate", "--ckpt_path", str(path), "--prompts", prompts, *OPTIONS]
        asked = [*command, "--user", "ben", "zoe", "--num_samples", "2", "--output", str(output)]
        with pytest.warns(UserWarning, match="treated as the population: 'zoe'"):
            assert main(asked) == 0
        capsys.readouterr()
        assert main(command) == 0
        shown = capsys.readouterr().out
    states = method.user_states(torch.tensor([1, 1]))
    ben = sample(method, PROMPTS[:2], states, num_samples=2, **SETTINGS)
    zoe = sample(method.policy, PROMPTS[:2], num_samples=2, **SETTINGS)
    assert rows_of(output) == [
        {
            "prompt": prompt,
            "id": place,
            "user_id": user,
            "user_known": user == "ben",
            "responses": [x.text for x in own],
        }
        for place, prompt in enumerate(PROMPTS[:2])
        for user, own in (("ben", ben[place]), ("zoe", zoe[place]))
    ]
    assert "hello there\n[population] " in shown and zoe[1][0].text.strip() in shown


@pytest.mark.filterwarnings("ignore:unknown users are treated as the population")
def test_generate_goes_on_where_it_was_killed(
    causal_lm: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former file stays until the new one is whole; what is done is not done again, unless users have changed."""
    monkeypatch.setattr("plm.sampling.CHUNK", 4)  # two users at a time, of whom each prompt has three
    asked: list[str] = []
    deadly = [4]

    def mortal(method: Any, prompts: list[str], **settings: Any) -> Any:
        asked.extend(settings["user_id"])
        if len(asked) >= deadly[0]:
            raise KeyboardInterrupt
        return sample(method, prompts, **settings)

    monkeypatch.setattr("plm.sampling.sample", mortal)
    prompts = jsonl(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:2]])
    output = tmp_path / "out.jsonl"
    output.write_text("before")
    with saved(adapted(causal_lm)) as path:
        command = ["generate", "--ckpt_path", str(path), "--prompts", prompts, *OPTIONS, "--num_samples", "2"]
        command += ["--user", "ben", "zoe", "anna", "--output"]
        with pytest.raises(KeyboardInterrupt):
            main([*command, str(output)])
        (part,) = tmp_path.glob(".out.jsonl.*.part")
        assert output.read_text() == "before" and [row["user_id"] for row in rows_of(part)] == ["ben", "zoe", "anna"]
        part.write_text(part.read_text()[:-20])  # and a torn line
        asked.clear()
        deadly[0] = 99
        assert main([*command, str(output)]) == 0
        assert asked == ["anna", "ben", "zoe", "anna"] and not list(tmp_path.glob(".*.part"))
        assert main([*command, str(tmp_path / "whole.jsonl")]) == 0
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        asked.clear()
        deadly[0] = 4
        with pytest.raises(KeyboardInterrupt):
            main([*command, str(output)])
        load_method(path).forget("ben")  # who writes otherwise from now on
        asked.clear()
        deadly[0] = 99
        assert main([*command, str(output)]) == 0
        assert len(asked) == 6 and not list(tmp_path.glob(".*.part"))
        assert rows_of(output)[0]["user_known"] is False
    with FileLock(tmp_path / ".out.jsonl.lock"), saved(adapted(causal_lm)) as path:
        command[2] = str(path)
        assert main([*command, str(output)]) == 1


def test_rows_may_say_who_is_written_for(causal_lm: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "user_id": "anna"}, {"prompt": "a", "user_id": "cleo"}]
    method = adapted(causal_lm)
    with saved(method) as path:
        command = ["generate", "--ckpt_path", str(path), *OPTIONS, "--output", str(tmp_path / "out.jsonl"), "--prompts"]
        assert main([*command, jsonl(tmp_path / "p.jsonl", rows)]) == 0
        expected = sample(method, ["a", "a"], method.user_states(torch.tensor([0, 2])), **SETTINGS)
        assert [row["responses"] for row in rows_of(tmp_path / "out.jsonl")] == [[one.text] for [one] in expected]
        assert main([*command, jsonl(tmp_path / "p.jsonl", [*rows, {"prompt": "b"}])]) == 1
        assert "a user_id in all rows of" in capsys.readouterr().err
        with pytest.warns(UserWarning, match="1 repeated prompts of"):
            assert main([*command, jsonl(tmp_path / "p.jsonl", rows), "--user", "ben"]) == 0
        assert [row["user_id"] for row in rows_of(tmp_path / "out.jsonl")] == ["ben"]  # the prompt once
        zeros = jsonl(tmp_path / "zeros.jsonl", [{"prompt": "a", "user_id": user} for user in (0, 1)])
        with pytest.warns(UserWarning, match="treated as the population: '0', '1'"):
            assert main([*command[:-3], "--output", str(tmp_path / "new" / "out.jsonl"), "--prompts", zeros]) == 0
        assert [row["user_id"] for row in rows_of(tmp_path / "new" / "out.jsonl")] == ["0", "1"]
        assert main([*command, jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "user_id": " "}])]) == 1
        assert "user_id of a row of" in capsys.readouterr().err


def test_generate_chooses_by_the_reward_of_a_method_without_a_policy(
    causal_lm: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    method, output = LoRe(2, 24, backbone=HashingBackbone(dim=24, ngrams=2).spec(), num_bases=3), tmp_path / "out.jsonl"
    method.user_ids = ["anna", "ben"]
    method.weights.normal_()
    method.bases.data.normal_()
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(PROMPTS))
    folder = str(causal_lm("gpt2"))
    with saved(method) as path:
        command = ["generate", "--ckpt_path", str(path), "--prompts", str(prompts), *OPTIONS, "--user", "anna", "ben"]
        assert main([*command, "--policy", folder, "--best_of", "6", "--output", str(output)]) == 0
        expected = best_of_n(
            Policy(CausalLM(folder)),
            load_method(path),
            [prompt for prompt in PROMPTS for _ in range(2)],
            n=6,
            user_id=["anna", "ben"] * 4,
            **SETTINGS,
        )
        rows = rows_of(output)
        assert [row["responses"] for row in rows] == [[one.text] for one in expected]
        assert [row["rewards"] for row in rows] == [[pytest.approx(one.reward, abs=1e-5)] for one in expected]
        capsys.readouterr()
        assert main(command) == 1
        assert "LoRe has no policy that writes: give --policy MODEL --best_of N" in capsys.readouterr().err
        for extra, message in (
            (["--policy", folder], "--policy and --best_of go together"),
            (["--policy", folder, "--best_of", "2", "--num_samples", "2"], "--best_of chooses one text"),
            (["--policy", folder, "--best_of", "0"], "--best_of: expected an integer >= 1, got 0"),
            (["--temprature", "1"], "did you mean '--temperature'?"),
        ):
            assert main([*command, *extra]) == 2
            assert message in capsys.readouterr().err
        for extra, message in (
            (["--policy", str(tmp_path / "none"), "--best_of", "2"], "folder of a Hugging Face model or a hub id"),
            (["--policy", folder, "--best_of", "2", "--template", "chat"], "needs one chat template"),
            (
                ["--policy", folder, "--best_of", "2", "--temperature", "-1"],
                "a finite number >= 0, got -1.0",
            ),
        ):
            assert main([*command, *extra]) == 1
            assert message in capsys.readouterr().err


def test_users_of_a_policy_are_adapted_from_their_pairs(causal_lm: Folder, tmp_path: Path) -> None:
    pairs = [
        {"user_id": user, "prompt": "a", "chosen": chosen, "rejected": "x"}
        for user, chosen in (("dora", " yes"), ("dora", " well"), ("emil", " no"))
    ]
    with saved(adapted(causal_lm)) as path:
        assert main(["adapt", "--ckpt_path", str(path), "--pairs", jsonl(tmp_path / "pairs.jsonl", pairs)]) == 0
        store = UserStore(store_path(path))
        assert store.ids[:3] == ["anna", "ben", "cleo"] and sorted(store.ids[3:]) == ["dora", "emil"]
        state, known = store.get(["dora", "emil"])
        assert known.all() and state.num_pairs.tolist() == [2, 1]
        assert state.tensors["adapter"][:, 0].tolist() == [11.0, 4.0]  # characters and the end token of each response


# ---------------------------------------------------------------------- sample
def sampled(causal_lm: Folder, tmp_path: Path, *extra: str, output: str = "s.jsonl") -> int:
    rows = [{"prompt": prompt, "split": "test" if place % 2 else "train"} for place, prompt in enumerate(PROMPTS)]
    prompts = jsonl(tmp_path / "p.jsonl", rows)
    command = ["sample", "--policy", str(causal_lm("llama")), "--prompts", prompts, "--num_samples", "3"]
    return main([*command, "--output", str(tmp_path / output), *OPTIONS, *extra])


def test_sample_writes_what_the_function_writes(causal_lm: Folder, tmp_path: Path) -> None:
    assert sampled(causal_lm, tmp_path) == 0
    expected = sample(Policy(CausalLM(str(causal_lm("llama")))), PROMPTS, num_samples=3, **SETTINGS)
    assert rows_of(tmp_path / "s.jsonl") == [
        {
            "prompt": prompt,
            "split": "test" if place % 2 else "train",
            "responses": [one.text for one in expected[place]],
        }
        for place, prompt in enumerate(PROMPTS)
    ]


def test_two_samplers_do_not_write_one_file(
    causal_lm: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileLock(tmp_path / ".s.jsonl.lock"):
        assert sampled(causal_lm, tmp_path) == 1
        assert "another plm sample is writing" in capsys.readouterr().err
    assert not (tmp_path / "s.jsonl").exists()


def test_sample_goes_on_where_it_was_killed(
    causal_lm: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill on the third of four prompts, and a torn line; what is done is not done again."""
    monkeypatch.setattr("plm.sampling.CHUNK", 3)  # one prompt at a time
    assert sampled(causal_lm, tmp_path, output="whole.jsonl") == 0
    asked: list[str] = []
    deadly = 3

    def mortal(policy: Policy, prompts: list[str], **settings: Any) -> Any:
        asked.extend(prompts)
        if len(asked) == deadly:
            raise KeyboardInterrupt
        return sample_texts(policy, prompts, **settings)

    monkeypatch.setattr("plm.sampling.sample_texts", mortal)
    with pytest.raises(KeyboardInterrupt):
        sampled(causal_lm, tmp_path)
    file = tmp_path / "s.jsonl"
    assert [row["prompt"] for row in rows_of(file)] == PROMPTS[:2]
    file.write_text(file.read_text()[:-40])
    asked.clear()
    deadly = 99
    assert sampled(causal_lm, tmp_path) == 0
    assert asked == PROMPTS[1:] and file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sampled(causal_lm, tmp_path) == 0
    assert asked == PROMPTS[1:] and "0 prompts written, 4 were there already" in capsys.readouterr().out


def test_shares_are_the_whole(causal_lm: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sampled(causal_lm, tmp_path) == 0
    for index in (1, 2, 3):
        assert sampled(causal_lm, tmp_path, "--shard", f"{index}/3") == 0
    parts = [row for index in (1, 2, 3) for row in rows_of(tmp_path / f"s-{index}of3.jsonl")]
    assert sorted(parts, key=str) == sorted(rows_of(tmp_path / "s.jsonl"), key=str)
    for shard in ("0/3", "4/3", "one"):
        assert sampled(causal_lm, tmp_path, "--shard", shard) == 2
        assert "expected I/K with 1 <= I <= K" in capsys.readouterr().err


def test_samples_of_other_settings_are_not_mixed(
    causal_lm: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampled(causal_lm, tmp_path) == 0
    assert sampled(causal_lm, tmp_path, "--batch_tokens", "50") == 0  # changes no text
    assert sampled(causal_lm, tmp_path, "--top_k", "5", "--seed", "4") == 1
    assert "was made with top_k=None, not 5, seed=3, not 4; choose another --output" in capsys.readouterr().err
    (tmp_path / "mine.jsonl").write_text("{}\n")
    assert sampled(causal_lm, tmp_path, output="mine.jsonl") == 1
    assert "was not written by plm sample" in capsys.readouterr().err
    assert sampled(causal_lm, tmp_path, "--num_samples", "0") == 2
    assert "--num_samples: expected an integer >= 1, got 0" in capsys.readouterr().err
    assert sampled(causal_lm, tmp_path, "--max_new_tokens", "60", output="long.jsonl") == 1
    assert "expected prompts of at most 4 tokens" in capsys.readouterr().err
