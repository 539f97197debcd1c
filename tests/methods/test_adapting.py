"""Unseen users with many pairs are adapted in batches: as few tokens at once as asked for, and the same adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plm.backbones import CausalLM
from plm.methods.lora_dpo import LoRADPO
from plm.types import Context, Tokens

WORDS = ["a cat", "no", "nothing at all", "one and two", "so", "because it is"]
NUM_PAIRS = 7

CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "sorted and averaged": {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.3], "label_smoothing": 0.1},
    "weighed": {"mode": "shared_and_user", "use_weighting": True, "ld_alpha": 0.5, "share_prompts": False},
}


def context_of(method: LoRADPO) -> Context:
    """Three users with seven, two and no pairs, one of them a tie."""
    mask = torch.zeros(3, NUM_PAIRS, dtype=torch.bool)
    mask[0], mask[1, :2] = True, True
    count = 3 * NUM_PAIRS
    prompts = [f"what is it {index % 4}?" for index in range(count)]
    sides = []
    for step in (1, 2):
        texts = [f" {WORDS[step * index % 6]}{' and' * (index % 5)}" for index in range(count)]
        side = method.causal_lm.represent(prompts, texts)
        assert isinstance(side, Tokens)
        sides.append(side.map(lambda value: value.view(3, NUM_PAIRS, *value.shape[1:])))
    tie = torch.zeros_like(mask)
    tie[0, 3] = True
    weight = torch.rand(3, NUM_PAIRS, generator=torch.Generator().manual_seed(0)) + 0.5
    return Context(sides[0], sides[1], mask, weight, tie=tie)


@pytest.mark.parametrize("case", CASES)
def test_few_tokens_at_once_give_the_same_adapters(
    case: str, causal_lm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"mode": "per_user", "rank": 2, "adapt_steps": 2, "lr": 1e-2, **CASES[case]}
    method = LoRADPO(num_users=2, feature_dim=16, backbone=CausalLM(str(causal_lm("llama"))).spec(), **options)
    method.configure_model()
    base, read = type(method.policy.network.base_model), []
    forward = base.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(base, "forward", counted)
    context, found = context_of(method), []
    for limit in (10_000, 120):
        method.batch_tokens = limit
        read.clear()
        found.append(method.adapt(context).tensors["adapter"])
        assert limit > max(read) if limit == 120 else max(read) > 240
    assert (found[0][0] - method.fresh).abs().max() > 5e-3
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
