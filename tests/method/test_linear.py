"""Methods whose reward is linear in features: their direction, and the reward model that it makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plm.backbones import HFBackbone
from plm.checkpoint import load_method
from plm.cli import main
from plm.method.linear import LinearMethod
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.fast_weights import FastWeights
from plm.methods.lore import LoRe, PublishedLoRe
from plm.methods.mrm import MRM
from plm.methods.pref import PReF
from plm.testing import saved
from plm.types import UserState

DIM = 16
METHODS: list[type[LinearMethod]] = [BradleyTerry, FastWeights, LoRe, MRM, PReF, PublishedLoRe]
TEXTS = ["A green tea.", "Coffee, black and strong.", "?"]


def filled(make: type[LinearMethod], **options: Any) -> tuple[LinearMethod, UserState]:
    """A method with numbers everywhere that a fit could have left there, and two users."""
    torch.manual_seed(0)
    method = make(2, DIM, **options).eval()
    for value in method.parameters():
        value.data.normal_()
    for value in method.conditioning.buffers():
        if value.dim() and method.conditioning.kind != "none":
            value.uniform_(0.5, 1.5)
    users = method.population_state(2)
    drawn = {name: torch.rand_like(value) for name, value in users.tensors.items()}
    return method, UserState(drawn, users.num_pairs + 3)


@pytest.mark.parametrize("conditioning", ["none", "centre", "standardise", "whiten"])
@pytest.mark.parametrize("make", METHODS)
def test_a_reward_is_the_product_with_its_direction(make: type[LinearMethod], conditioning: Any) -> None:
    method, users = filled(make, conditioning=conditioning)
    features = torch.randn(5, DIM)
    for row in range(2):
        user = users.take(torch.tensor([row]))
        rewards = method.score(features, user, rows=torch.zeros(5, dtype=torch.long))
        expected = features @ method.direction(user)
        torch.testing.assert_close(rewards - rewards[0], expected - expected[0], atol=1e-4, rtol=1e-4)
        assert float((rewards - rewards[0]).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("kind", "options", "own"),
    [
        ("llama", {}, True),
        ("qwen3", {"template": "response"}, True),
        ("gpt2", {}, True),
        ("gemma3_text", {}, True),
        ("llama", {"pooling": "mean"}, False),
        ("llama", {"normalize": True}, False),
        ("gpt2", {"layer": 1}, False),
    ],
)
def test_the_reward_of_a_user_is_a_model_of_transformers(
    causal_lm: Callable[[str], Path], tmp_path: Path, kind: str, options: dict[str, Any], own: bool
) -> None:
    """As the README beside it says; by their own code where they have a head for what the backbone reads."""
    backbone = HFBackbone(str(causal_lm(kind)), **options)
    method, _ = filled(LoRe, conditioning="centre", backbone=backbone.spec(), num_bases=3)
    assert isinstance(method, LoRe)
    method.weights.normal_()
    method.num_pairs.fill_(3)
    method.user_ids = ["anna", "ben"]
    with saved(method) as path:
        assert main(["export", "--ckpt_path", str(path), "--user", "ben", "--output", str(tmp_path / "out")]) == 0
        expected = load_method(path).score(TEXTS, user_id="ben", prompts="Tea?")
    (code,) = re.findall("```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    assert ("trust_remote_code" in code) is not own and (tmp_path / "out" / "modeling_reward.py").exists() is not own
    rewards = []
    for text in TEXTS:
        names: dict[str, Any] = {"FOLDER": str(tmp_path / "out"), "prompt": "Tea?", "response": text}
        exec(code, names)
        rewards.append(names["reward"].detach())
    found = torch.stack(rewards)
    torch.testing.assert_close(found - found[0], expected - expected[0], atol=1e-4, rtol=1e-4)
    assert float((found - found[0]).abs().max()) > 0.01
    if own:
        assert type(names["model"]).__module__.startswith("transformers.models")
        texts = [backbone.render("Tea?", text) for text in TEXTS]
        inputs = names["tokenizer"](texts, padding=True, return_tensors="pt")
        torch.testing.assert_close(names["model"](**inputs).logits[:, 0].detach(), found, atol=1e-4, rtol=1e-4)


def test_features_without_a_model_are_not_exported(tmp_path: Path) -> None:
    method, users = filled(LoRe, num_bases=3)
    with pytest.raises(ValueError, match="expected features of a Hugging Face model, got none"):
        method.export(tmp_path / "out", users.take(torch.tensor([0])))
