"""Language models of many makes, tiny and random: windows, networks that also see images, adapters, pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from plm.backbones import CausalLM, Policy, PrefixShape, completion_tokens
from plm.methods.clap import CLaP
from plm.methods.clap.adapter import SteeredTexts, SteeredWriting
from plm.methods.clap.groups import group_by_prompt
from plm.types import Tokens
from tests.conftest import KINDS, WINDOW
from tests.logps import sequence_logps

Folder = Callable[[str], Path]
PROMPT = "the weather is"
CHOSEN = [(PROMPT, " lovely here today"), ("a", " b")]
REJECTED = [(PROMPT, " no"), ("a", " very long answer indeed")]
WITH_WINDOW = ["mistral", "gpt_oss", "gemma2", "gemma3_text", "gemma3", "llama4"]


def policy_of(folder: Path, **options: int) -> Policy:
    return Policy(CausalLM(str(folder), **options))  # type: ignore[arg-type]


def tokens(policy: Policy, pairs: list[tuple[str, str]]) -> Tokens:
    return completion_tokens([policy.backbone.completion(*pair) for pair in pairs])


@torch.no_grad()
def expected_totals(policy: Policy, pairs: list[tuple[str, str]]) -> Tensor:
    """Against the whole network of transformers, one text at a time, without padding, masks or positions."""
    totals = []
    for pair in pairs:
        prompt, response = policy.backbone.completion(*pair)
        logps = policy.network(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        totals.append(sum(logps[len(prompt) + place - 1, token] for place, token in enumerate(response)))
    return torch.tensor(totals)


@pytest.mark.parametrize("kind", ["gpt2", *KINDS])
def test_sharing_prompts_changes_nothing_at_lengths_beyond_the_window(causal_lm: Folder, kind: str) -> None:
    policy = policy_of(causal_lm(kind))
    assert policy.window == (WINDOW if kind in WITH_WINDOW else None)
    chosen, rejected = tokens(policy, CHOSEN), tokens(policy, REJECTED)
    assert chosen.attention_mask.sum(-1).max() > WINDOW + 8
    expected = expected_totals(policy, [*CHOSEN, *REJECTED])
    for first, second in ((chosen, rejected), (chosen.take(torch.tensor([1])), rejected.take(torch.tensor([1])))):
        with torch.no_grad():
            hidden, token, row = policy.shared_completions(first, second)
            found = sequence_logps(policy.logits(hidden), token, row, 2 * first.num_rows).total
        of_pair = expected if first.num_rows == 2 else expected[[1, 3]]
        torch.testing.assert_close(found, of_pair, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", WITH_WINDOW)
def test_writing_beyond_the_window_is_that_of_transformers(causal_lm: Folder, kind: str) -> None:
    policy = policy_of(causal_lm(kind))
    ids = [policy.backbone.prompt_tokens(prompt) for prompt in (PROMPT, "a")]
    writing = policy.write()
    logits = writing.start(completion_tokens([(prompt, []) for prompt in ids], left=True))
    for _ in range(2 * WINDOW):
        token = logits.argmax(-1)
        ids = [[*prompt, int(one)] for prompt, one in zip(ids, token, strict=True)]
        logits = writing.step(token)
    for row, prompt in enumerate(ids):
        whole = policy.network(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits[row], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_virtual_tokens_stay_in_sight_of_layers_with_a_window(causal_lm: Folder, kind: str) -> None:
    """Those of a real text, before texts with so much padding between that columns are beyond the window."""
    with pytest.raises(ValueError, match=r"max_length: expected at most 12, as layers of .* at no more than 16 tokens"):
        PrefixShape(policy_of(causal_lm(kind)), 4)
    policy = policy_of(causal_lm(kind), max_length=WINDOW - 4)
    PrefixShape(policy, 4)
    begin = torch.tensor([policy.backbone.prompt_tokens("once")])
    cache = policy.decoder(input_ids=begin, use_cache=True).cache
    prefix = [(layer.keys.expand(2, -1, -1, -1), layer.values.expand(2, -1, -1, -1)) for layer in cache.layers]
    parts, whole = [(" a", " b"), (" up", " on")], [("once a", " b"), ("once up", " on")]
    read = completion_tokens([policy.backbone.completion(*pair) for pair in parts], left=True)
    pad = torch.zeros(2, WINDOW, dtype=torch.long)
    wide = Tokens(*(torch.cat([pad.to(part.dtype), part], 1) for part in read[:3]))
    expected = expected_totals(policy, whole)
    with torch.no_grad():
        hidden, token, row = policy.completions(wide, prefix)
        found = sequence_logps(policy.logits(hidden), token, row, 2).total
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_the_window_is_known_by_whatever_name(causal_lm: Folder) -> None:
    from transformers import GPTNeoConfig, ModernBertDecoderConfig, Qwen2Config

    from plm.backbones.attention import attention_window

    assert attention_window(GPTNeoConfig(window_size=200)) == 200
    assert attention_window(ModernBertDecoderConfig(local_attention=128)) <= 128
    assert attention_window(Qwen2Config(sliding_window=100, use_sliding_window=False)) is None


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {"target_modules": None}) for kind in ["gpt2", *KINDS]],
        *[(kind, {"target_modules": "all-linear"}) for kind in ["gpt2", "phi3", "qwen3_moe", "gemma3", "llama4"]],
        ("llama", {"target_modules": None, "use_rslora": True}),
    ],
)
def test_adapters_of_every_make_load_in_peft_with_equal_logits(
    causal_lm: Folder, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """Nobody names a map; the sum of two adapters is exported, and of networks with eyes the part for text alone."""
    policy = policy_of(causal_lm(kind))
    lora = policy.add_lora(4, 8, **options)
    random = torch.Generator().manual_seed(0)
    adapters = [lora.start(0) + 0.1 * torch.randn(lora.num_parameters, generator=random) for _ in range(2)]
    lora.save(adapters, tmp_path, str(causal_lm(kind)))
    ids = torch.tensor([[5, 30, 42, 7]])
    with torch.no_grad(), policy.adapted(*[adapter[None] for adapter in adapters]):
        ours = policy.network(input_ids=ids).logits
        plain = Policy(policy.backbone).network(input_ids=ids).logits
    base = transformers.AutoModelForCausalLM.from_pretrained(causal_lm(kind))
    assert not any("vision" in place.name for place in lora.places)
    peft_model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert peft_model.base_model.targeted_module_names == [place.name for place in lora.places]
    with torch.no_grad():
        torch.testing.assert_close(peft_model(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-5)
    assert (ours - plain).abs().max() > 1e-3
    lora.save(adapters[:1], tmp_path, str(causal_lm(kind)))
    assert torch.equal(lora.read(tmp_path), adapters[0])
    other = policy_of(causal_lm(kind)).add_lora(4, 8, options["target_modules"], use_rslora=not lora.use_rslora)
    with pytest.raises(ValueError, match="expected an adapter of rank 4 and alpha"):
        other.read(tmp_path)


@pytest.mark.parametrize("kind", ["phi3", "qwen3_moe", "olmo2"])
def test_all_linear_means_what_it_means_in_peft(causal_lm: Folder, kind: str) -> None:
    lora = policy_of(causal_lm(kind)).add_lora(2, 4, "all-linear")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(causal_lm(kind)), config)
    assert model.base_model.targeted_module_names == [place.name for place in lora.places]


def test_dropout_is_that_of_peft_and_of_training_alone(causal_lm: Folder, tmp_path: Path) -> None:
    """With the same seed, over a batch whose texts all read with one adapter."""
    policy = policy_of(causal_lm("llama"))
    lora = policy.add_lora(4, 8, None, use_rslora=True, dropout=0.3)
    adapter = lora.start(0) + 0.1 * torch.randn(lora.num_parameters, generator=torch.Generator().manual_seed(0))
    lora.save([adapter], tmp_path, str(causal_lm("llama")))
    base = transformers.AutoModelForCausalLM.from_pretrained(causal_lm("llama"))
    model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    ids = torch.tensor([[5, 30, 42, 7], [9, 9, 3, 60]])
    logits = {}
    for mode in (True, False):
        policy.train(mode)
        model.train(mode)
        with torch.no_grad(), policy.adapted(adapter[None]):
            torch.manual_seed(3)
            logits[mode] = policy.network(input_ids=ids).logits
            torch.manual_seed(3)
            torch.testing.assert_close(logits[mode], model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert (logits[True] - logits[False]).abs().max() > 1e-2
    with policy.adapted():
        torch.testing.assert_close(policy.train().network(input_ids=ids).logits, policy.eval().network(ids).logits)


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma3", "mistral", "qwen3"])
@pytest.mark.parametrize(("placement", "gated"), [("prefix", False), ("suffix", False), ("suffix", True)])
def test_texts_are_read_and_written_from_latents(causal_lm: Folder, kind: str, placement: Any, gated: bool) -> None:
    """Read in parts, batched and shared, as one text after another; written as read; trained as far as the encoder."""
    lm = CausalLM(str(causal_lm(kind)), max_length=WINDOW - 4)
    method = CLaP(1, 16, lm.spec(), latent_dim=4, num_queries=2, encoder_layers=1, placement=placement, gated=gated)
    method.configure_model()
    with torch.no_grad():
        for norm in method.adapter.maker.norms:
            norm.weight.normal_(std=3.0)
        if method.adapter.gate is not None:
            method.adapter.gate.fill_(0.7)
    pairs = [("q", "cdefghijk"), ("q", "x"), ("abcdefghij", "k")]  # padding makes columns beyond the window
    read = tokens(method.policy, pairs)
    latent = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([0, 0, 1])
    steered = SteeredTexts(method.policy, method.adapter, read, group, latent)
    hidden, _, row = steered.predictions(torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 2, 0]))
    for text, (of_text, of_latent) in enumerate([(0, 0), (1, 1), (2, 2), (1, 0)]):
        alone = read.take(torch.tensor([of_text])).trimmed()
        one = SteeredTexts(method.policy, method.adapter, alone, torch.zeros(1, dtype=torch.long), latent[[of_latent]])
        expected = one.predictions(torch.tensor([0]), torch.tensor([0])).hidden
        torch.testing.assert_close(hidden[row == text], expected, atol=1e-4, rtol=1e-4)
    plain = method.policy.completions(read)
    assert (plain.hidden - hidden[row < 3]).abs().max() > 0.01, "a latent must do something"
    writing = SteeredWriting(method.policy, method.adapter, latent)
    prompts = completion_tokens([(method.policy.backbone.prompt_tokens(prompt), []) for prompt, _ in pairs], left=True)
    logits = writing.start(prompts)
    starts = [int((row == text).nonzero()[0]) for text in range(3)]
    torch.testing.assert_close(logits, method.policy.logits(hidden[starts]), atol=1e-3, rtol=1e-4)
    loss = method._terms(group_by_prompt(read), None, 1, method.skip)
    (loss.reconstruction.mean() + loss.kl.mean()).backward()
    assert method.encoder.queries.grad is not None and method.encoder.queries.grad.isfinite().all()
