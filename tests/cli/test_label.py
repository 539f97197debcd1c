"""plm label, and rewards that a trained model gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plm.backbones import HashingBackbone
from plm.checkpoint import load_method
from plm.cli import main
from plm.data.rewards import Length
from plm.data.schema import read_pairs
from plm.data.sources.sampled import SampledPairs
from plm.learned_rewards import ClassifierReward, MethodReward
from plm.methods.lore import LoRe
from plm.testing import saved

Folder = Callable[[str], Path]
SAMPLES = [
    {"prompt": "tea?", "responses": ["yes", "no thank you", "well yes please do"], "split": "train"},
    {"prompt": "walk?", "responses": ["a long walk now", "no", "yes later"], "split": "test"},
]
TEXTS = [(row["prompt"], text) for row in SAMPLES for text in row["responses"]]


@pytest.fixture
def samples(tmp_path: Path) -> str:
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
    return str(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lore() -> LoRe:
    torch.manual_seed(0)
    method = LoRe(2, 24, backbone=HashingBackbone(dim=24).spec(), num_bases=3)
    method.user_ids = ["anna", "ben"]
    method.weights.normal_()
    method.bases.data.normal_()
    return method


def write_classifier(causal_lm: Folder, folder: Path, num_labels: int, pads: bool = True) -> Path:
    """A random classifier over characters."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=98,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=num_labels,
        pad_token_id=0 if pads else None,
        id2label={row: f"mood {row}" for row in range(num_labels)},
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((causal_lm("llama") / name).read_bytes())
    return folder


# ---------------------------------------------------------------------- the command
def test_people_compare_their_best_with_their_worst(samples: str, tmp_path: Path) -> None:
    rewards = "{rewards: {words: Length}, people: {long: {words: 1}, short: {words: -1}}, z_score: false}"
    output = tmp_path / "pairs.jsonl"
    assert main(["label", "--samples", samples, "--rewards", rewards, "--output", str(output)]) == 0
    found = {(row["user_id"], row["prompt"]): row for row in rows_of(output)}
    assert len(found) == 4
    long, short = found["long", "tea?"], found["short", "walk?"]
    assert (long["chosen"], long["rejected"], long["row_split"]) == ("well yes please do", "yes", "train")
    assert (long["chosen_score"], long["rejected_score"]) == (4.0, 1.0)
    assert (short["chosen"], short["rejected"], short["row_split"]) == ("no", "a long walk now", "test")
    table = read_pairs([str(output)])
    source = SampledPairs(samples, {"words": Length()}, {"long": {"words": 1}, "short": {"words": -1}}, z_score=False)
    assert sorted(table.user_ids) == sorted(source.load().user_ids) and table.num_pairs == source.load().num_pairs


def test_scores_are_written_as_they_come(samples: str, tmp_path: Path) -> None:
    rewards = tmp_path / "rewards.yaml"
    rewards.write_text("rewards: {words: Length, target: {class_path: Length, init_args: {target: 3}}}")
    output = tmp_path / "scores.jsonl"
    assert main(["label", "--samples", samples, "--rewards", str(rewards), "--scores", "--output", str(output)]) == 0
    assert rows_of(output) == [
        {**SAMPLES[0], "scores": {"words": [1.0, 3.0, 4.0], "target": [-2.0, 0.0, -1.0]}},
        {**SAMPLES[1], "scores": {"words": [4.0, 1.0, 2.0], "target": [-1.0, -2.0, -1.0]}},
    ]


def test_users_of_a_checkpoint_compare(
    samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pairs.jsonl"
    with saved(lore()) as path:
        command = ["label", "--samples", samples, "--output", str(output)]
        assert main([*command, "--ckpt_path", str(path), "--user", "anna", "ben"]) == 0
        method = load_method(path)
        for row in rows_of(output):
            texts = next(entry["responses"] for entry in SAMPLES if entry["prompt"] == row["prompt"])
            rewards = method.score(texts, user_id=row["user_id"], prompts=row["prompt"]).tolist()
            assert row["chosen"] == texts[int(np.argmax(rewards))]
            assert row["rejected"] == texts[int(np.argmin(rewards))]
        assert {row["user_id"] for row in rows_of(output)} == {"anna", "ben"}
        assert main([*command, "--ckpt_path", str(path)]) == 0
        assert {row["user_id"] for row in rows_of(output)} == {"population"}
        capsys.readouterr()
        assert main([*command, "--ckpt_path", str(path), "--user", "ana"]) == 1
        assert "no user 'ana' beside" in capsys.readouterr().err
        for extra, message in (
            ([], "give either --rewards or --ckpt_path"),
            (["--rewards", "{}", "--ckpt_path", str(path)], "give either --rewards or --ckpt_path"),
            (["--rewards", "{}", "--user", "anna"], "--user goes with --ckpt_path"),
        ):
            assert main([*command, *extra]) == 2
            assert message in capsys.readouterr().err
    for rewards, message in (
        ("{rewards: {words: Lenth}}", "no class 'Lenth'"),
        ("{rewards: [", "expected YAML like {rewards:"),
        ("{}", "expected rewards, as in {rewards:"),
        ("nothing.yaml", "nothing.yaml"),
    ):
        assert main([*command, "--rewards", rewards]) == 1
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------- learned rewards
def test_a_user_of_a_method_as_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plm.learned_rewards._SCORED", 4)
    prompts, responses = zip(*TEXTS, strict=True)
    with saved(lore()) as path:
        loaded = load_method(path)
        for user in ("ben", None):
            expected = loaded.score(list(responses), user_id=user, prompts=list(prompts)).tolist()
            assert MethodReward(str(path), user).score(prompts, responses).tolist() == pytest.approx(expected, abs=1e-6)
        assert MethodReward(str(path)).score([], []).shape == (0,)


@pytest.mark.parametrize("pads", [True, False])
def test_the_log_odds_of_a_class(causal_lm: Folder, tmp_path: Path, pads: bool) -> None:
    """Against transformers, one text at a time."""
    import transformers

    folder = write_classifier(causal_lm, tmp_path, 3, pads)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts, responses = zip(*TEXTS, strict=True)
    for template, label, row in (("response", "mood 1", 1), ("plain", 2, 2)):
        ours = ClassifierReward(str(folder), label, template).score(prompts, responses)  # type: ignore[arg-type]
        for (prompt, response), value in zip(TEXTS, ours.tolist(), strict=True):
            text = response if template == "response" else prompt + response
            with torch.no_grad():
                chances = (
                    model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0].softmax(0)
                )
            assert value == pytest.approx(float((chances[row] / (1 - chances[row])).log()), abs=1e-4)


def test_the_logit_of_a_reward_model_and_classes_that_do_not_exist(causal_lm: Folder, tmp_path: Path) -> None:
    import transformers

    folder = write_classifier(causal_lm, tmp_path / "one", 1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = float(model(**tokenizer("yes", return_tensors="pt", return_token_type_ids=False)).logits)
    assert ClassifierReward(str(folder)).score(["tea?"], ["yes"]).tolist() == pytest.approx([expected], abs=1e-5)
    folder = write_classifier(causal_lm, tmp_path / "three", 3)
    for label in (None, "mood 7", 3):
        with pytest.raises(ValueError, match=r"expected a class of .*, one of \['mood 0', 'mood 1', 'mood 2'\], got"):
            ClassifierReward(str(folder), label).score(["a"], ["b"])
    with pytest.raises(ValueError, match=r"expected a trained classifier, but .* lacks the weights"):
        ClassifierReward(str(causal_lm("llama")), 0).score(["a"], ["b"])
