"""What a user can get wrong with language models: ``plm fit`` says so in one message, before it trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning  # noqa: F401 - imported in a test, it would log to what the test has closed
import pytest
import torch
import yaml

from plm.cli import main

Folder = Callable[[str], Path]
PAIRS = 12  # of each of three users


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, causal_lm: Folder) -> Callable[..., str]:
    """Writes a recipe that trains, but for the changes, and returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(
        backbone: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        change: Callable[[int, dict[str, str]], None] = lambda row, pair: None,
    ) -> str:
        rows = []
        for row in range(3 * PAIRS):
            pair = {"user_id": f"u{row % 3}", "prompt": f"q{row:02}?", "chosen": f"yes {row}", "rejected": f"no {row}"}
            change(row, pair)
            rows.append(json.dumps(pair))
        Path("pairs.jsonl").write_text("\n".join(rows))
        lm = {"class_path": "CausalLM", "init_args": {"model": str(causal_lm("gpt2")), **(backbone or {})}}
        content = {
            "defaults": [{"trainer": "tokens"}, {"logger": "csv"}],
            "data": {
                "source": {"class_path": "PairFiles", "init_args": {"path": "pairs.jsonl"}},
                "backbone": lm,
                "cache_dir": str(tmp_path / "cache"),
                "unseen_users": 0.0,
                "shots": [],
                **(data or {}),
            },
            "model": {"class_path": "plm.methods.lora_dpo.LoRADPO", "init_args": {"rank": 2, **(model or {})}},
            "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, **(trainer or {})},
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(content))
        return "recipe.yaml"

    return write


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """What a fit of a recipe says when it stops: one message, no traceback."""

    def run(recipe: str) -> str:
        capsys.readouterr()
        assert main(["fit", "--config", recipe]) == 1
        shown = capsys.readouterr().err
        # pytest's log handler, and the progress bar of transformers
        noise = ("INFO: ", "Loading weights", "Writing model")
        lines = [line for line in shown.splitlines() if line and not line.startswith(noise)]
        assert lines[0].startswith("error: ") and all(line.startswith("  ") for line in lines[1:]), shown
        assert not list(Path("runs").glob("*/checkpoints")), "nothing was trained"
        return "\n".join(lines)

    return run


def test_token_ids_outside_of_the_vocabulary(
    recipe: Callable[..., str], error: Callable[[str], str], causal_lm: Folder, tmp_path: Path
) -> None:
    """A tokenizer that is not the model's."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((causal_lm("gpt2") / name).read_bytes())
    config = json.loads((causal_lm("gpt2") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 70}))
    message = error(recipe(backbone={"model": str(folder)}))
    assert "expected token ids below 70, the vocabulary of" in message and "pairs.jsonl:1: " in message
    assert "take the tokenizer the model was trained with" in message


def test_empty_responses(recipe: Callable[..., str], error: Callable[[str], str]) -> None:
    def empty(row: int, pair: dict[str, str]) -> None:
        if row == 4:
            pair["rejected"] = ""

    assert "pairs.jsonl:5: " in (message := error(recipe(change=empty))) and "rejected" in message


def test_prompts_that_leave_no_room(recipe: Callable[..., str], error: Callable[[str], str]) -> None:
    def long(row: int, pair: dict[str, str]) -> None:
        if row in (1, 2):
            pair["prompt"] *= 20

    advice = "raise data.backbone.init_args.max_length or set max_prompt_length"
    message = error(recipe(backbone={"max_length": 4}))
    assert (
        f"expected prompts that leave room for a response, got none (the first at pairs.jsonl:1); {advice}" in message
    )
    with pytest.warns(UserWarning, match=r"2 of 36 pairs are left out: .*the first at pairs\.jsonl:2\); " + advice):
        assert main(["fit", "--config", recipe(change=long)]) == 0
    (splits,) = Path("runs").glob("*/splits.json")
    assert json.loads(splits.read_text())["dropped_too_long"] == 2
    assert main(["fit", "--config", recipe(backbone={"max_prompt_length": 8}, change=long)]) == 0  # no warning


def test_a_chat_template_that_is_not_there(recipe: Callable[..., str], error: Callable[[str], str]) -> None:
    message = error(recipe(backbone={"template": "chat"}))
    assert message.startswith("error: template='chat' needs one chat template, and the tokenizer of "), "of no pair"
    assert " has none; take a model tuned to chat" in message and "set template='plain'" in message


def test_a_model_without_the_linear_maps_to_adapt(recipe: Callable[..., str], error: Callable[[str], str]) -> None:
    message = error(recipe(model={"target_modules": ["q_proj", "v_proj"]}))
    assert "target_modules: expected names of linear maps of GPT2LMHeadModel, got ['q_proj', 'v_proj']" in message
    assert "it has ['c_attn', 'c_fc', 'c_proj']: name some of them, set all-linear for all, or null for a" in message


def test_features_for_a_method_that_reads_tokens(recipe: Callable[..., str], error: Callable[[str], str]) -> None:
    hashing = {"class_path": "HashingBackbone", "init_args": {"dim": 32}}
    message = error(recipe(data={"backbone": hashing, "batch_size": 8}))
    assert "LoRADPO reads 'tokens' batches, the data give 'features'; set data.backbone to a plm.backbones" in message
    message = error(recipe(data={"backbone": hashing, "pairs_per_user": 2}))
    assert "data.pairs_per_user: has an effect on tokens only, and HashingBackbone gives features" in message


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_a_trainer_in_half_precision(recipe: Callable[..., str], error: Callable[[str], str], precision: str) -> None:
    message = error(recipe(trainer={"precision": precision}))
    assert f"trainer.precision: expected 32-true, bf16-mixed or 16-mixed, got '{precision}'" in message
    assert "data.backbone.init_args.dtype" in message


def test_float16_on_a_cpu(recipe: Callable[..., str], error: Callable[[str], str]) -> None:
    message = error(recipe(backbone={"dtype": "float16"}))
    assert "data.backbone.init_args.dtype: expected float32 or bfloat16" in message and "on cpu" in message


@pytest.mark.skipif(torch.cuda.is_available() and find_spec("bitsandbytes") is not None, reason="4-bit weights work")
def test_quantized_weights_without_what_they_need(recipe: Callable[..., str], error: Callable[[str], str]) -> None:
    message = error(recipe(backbone={"quantization": "4bit"}))
    missing = "bitsandbytes" if find_spec("bitsandbytes") is None else "CUDA device"
    assert f"quantization='4bit' needs a CUDA device and bitsandbytes, got no {missing}" in message
