"""Scores of the whole vocabulary are in memory for few tokens at a time, and never for the backward pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from plm.backbones import CausalLM, Policy, head
from plm.backbones.head import token_facts, token_logps
from plm.backbones.reference import ReferenceLogps
from plm.generation import Sample, sample_logps
from plm.methods.clap import CLaP
from plm.methods.lora_dpo import LoRADPO
from plm.methods.sft import SFT
from tests.method.test_accumulation import batch_of

VOCAB, WIDTH, ROWS = 98, 16, 8  # of the small models; scores of so many tokens may be there at once


class Scores(TorchDispatchMode):
    """Most rows of any tensor as wide as the vocabulary that an operation gives."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            is_scores = isinstance(value, Tensor) and value.dim() > 1 and value.shape[-1] == VOCAB
            if is_scores and value.shape[-2] != WIDTH:  # else of the output embedding
                self.most = max(self.most, value.numel() // VOCAB)
        return out


@contextmanager
def few_scores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(head, "CPU_BLOCK", ROWS * VOCAB)
    with Scores() as scores:
        yield
    assert 0 < scores.most <= ROWS


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_trained_head_gives_what_autograd_gives(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    output = nn.Linear(WIDTH, VOCAB, dtype=dtype)
    hidden, token = torch.randn(3 * ROWS + 1, WIDTH, dtype=dtype, requires_grad=True), torch.randint(VOCAB, (25,))
    slope = torch.randn(25, dtype=torch.float64)
    inputs = [hidden, output.weight, output.bias]
    logits = output(hidden).double() if dtype == torch.float64 else output(hidden).float()
    expected = torch.log_softmax(logits, -1)[torch.arange(25), token]
    gradients = torch.autograd.grad((slope.to(expected) * expected).sum(), inputs)
    monkeypatch.setattr(head, "CPU_BLOCK", ROWS * VOCAB)
    saved: list[int] = []

    def keep(value: Tensor) -> Tensor:
        saved.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        found, facts = token_logps(output, hidden, token, with_facts=True)
        found_gradients = torch.autograd.grad((slope.to(found) * found).sum(), inputs)
    assert max(saved, default=0) <= output.weight.numel()
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float64 else {"atol": 5e-2, "rtol": 2e-2}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, two in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(one, two, **tolerance)
    assert facts is not None
    for one, two in zip(facts, token_facts(logits.detach(), token), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


METHODS: dict[str, Callable[..., Any]] = {
    "sft": SFT,
    "dpo": lambda **options: LoRADPO(adapter="full", **options),
    "clap": lambda **options: CLaP(unfreeze=True, latent_dim=4, encoder_layers=1, deterministic=True, **options),
}


@pytest.mark.parametrize("case", METHODS)
def test_methods_that_train_the_head_keep_no_scores(
    case: str, causal_lm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CausalLM(str(causal_lm("llama"))).spec()
    found = []
    for few in (False, True):
        torch.manual_seed(0)
        method = METHODS[case](num_users=2, feature_dim=WIDTH, backbone=spec)
        method.configure_model()
        batch = batch_of(method, [0, 1, 2, 3])
        if few:
            with few_scores(monkeypatch):
                method.loss(batch)["loss"].backward()
        else:
            method.loss(batch)["loss"].backward()
        found.append(torch.cat([value.grad.flatten() for value in method.parameters() if value.grad is not None]))
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()


def test_reference_and_judge_keep_no_scores(causal_lm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = CausalLM(str(causal_lm("llama")))
    texts = [("hello", " my friend and all others"), ("what is it?", " nothing that anybody knows of")]
    with few_scores(monkeypatch):
        reference = ReferenceLogps(lm.spec()).encode([json.dumps(text) for text in texts])[:, 0]
        written = [Sample(text, tuple(lm.completion(prompt, text).response)) for prompt, text in texts]
        judged = sample_logps(Policy(lm), [prompt for prompt, _ in texts], written)
    torch.testing.assert_close(judged, reference)
