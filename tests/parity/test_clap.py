"""CLaP against equations written out here, closed forms, and the network read without any cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from plm.backbones import CausalLM, KeyValueMaker, Policy, Reading, completion_tokens, split_texts
from plm.checkpoint import load_method
from plm.functional import kl_to_prior, log_densities
from plm.generation import sample
from plm.methods.clap import CLaP
from plm.methods.clap.adapter import SteeredTexts
from plm.methods.clap.groups import group_by_prompt
from plm.methods.clap.losses import (
    Posteriors,
    candidates,
    density_gap,
    gradient_only,
    likelihood_contrast,
    mean_kl,
    mutual_information,
)
from plm.recipe.defaults import shipped
from plm.testing.contract import saved
from plm.types import PreferenceBatch, Tokens, UserState
from tests.groups import method_options

Folder = Callable[[str], Path]
KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama"])
PLACEMENTS = pytest.mark.parametrize("placement", ["prefix", "suffix"])
PAIRS = [("hello there", " my friend"), ("hello there", " no"), ("a", " something long"), ("what is it?", " x")]
Z = 8


def clap(causal_lm: Folder, kind: str = "gpt2", *, untrained: bool = False, **options: Any) -> CLaP:
    """A small model; all of it but the language model is random, so that nothing is zero by luck."""
    given: dict[str, Any] = {"latent_dim": Z, "num_queries": 2, "num_virtual_tokens": 3, "encoder_layers": 1}
    method = CLaP(2, 16, CausalLM(str(causal_lm(kind))).spec(), **{**given, **options})
    method.configure_model()
    if not untrained:
        torch.manual_seed(0)
        for part in (method.encoder.head, method.encoder.network):
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.3 * torch.randn_like(parameter)
    return method.eval()


def tokens(method: CLaP, pairs: list[tuple[str, str]] = PAIRS, left: bool = False) -> Tokens:
    return completion_tokens([method.causal_lm.completion(*pair) for pair in pairs], left=left)


def posteriors(num_prompts: int = 1, num_responses: int = 4, seed: int = 0) -> Posteriors:
    generator = torch.Generator().manual_seed(seed)
    mean, log_var = (torch.randn(num_prompts, num_responses, 3, generator=generator).double() for _ in range(2))
    return Posteriors(1.5 * mean, log_var - 1, torch.ones(num_prompts, num_responses, dtype=torch.bool))


# ---------------------------------------------------------------------- memory
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("options", [{}, {"placement": "prefix", "unfreeze": True}, {"gated": True}])
def test_blocks_that_run_again_find_the_keys_and_values_of_their_first_run(
    causal_lm: Folder, kind: str, options: dict[str, Any]
) -> None:
    """Every part of a text is read after others: the same loss and gradients, and less is kept for them."""
    found: list[tuple[Tensor, dict[str, Tensor], int]] = []
    for checkpointing in (False, True):
        method = clap(causal_lm, kind, gradient_checkpointing=checkpointing, **options).train()
        others = [(prompt, response[::-1]) for prompt, response in PAIRS]
        batch = PreferenceBatch(
            tokens(method), tokens(method, others), torch.zeros(4).long(), torch.ones(4), torch.zeros(4).bool()
        )
        kept: dict[int, int] = {}
        pointers = {value.untyped_storage().data_ptr() for value in method.parameters()}

        def pack(value: Tensor, kept: dict[int, int] = kept, pointers: set[int] = pointers) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in pointers:
                kept[storage.data_ptr()] = storage.nbytes()
            return value

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = method.loss(batch)["loss"]
        loss.backward()
        gradients = {name: value.grad for name, value in method.named_parameters() if value.grad is not None}
        found.append((loss.detach(), gradients, sum(kept.values())))
    (loss, gradients, size), (again, same, less) = found
    assert torch.equal(loss, again) and gradients.keys() == same.keys() and any(value.any() for value in same.values())
    for name, value in gradients.items():
        torch.testing.assert_close(same[name], value, atol=1e-6, rtol=1e-5)
    assert less < 0.6 * size


# ---------------------------------------------------------------------- losses
def test_densities_are_those_of_torch() -> None:
    latent, mean, log_var = torch.randn(3, 5, dtype=torch.double).unbind(0)
    expected = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    torch.testing.assert_close(log_densities(latent, mean, log_var), expected.log_prob(latent))
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(
        kl_to_prior(mean, log_var).sum(), torch.distributions.kl_divergence(expected, prior).sum()
    )


@pytest.mark.parametrize("joint", [False, True])
def test_density_gap_of_a_mixture(joint: bool) -> None:
    """Against torch's mixtures on the same draws: of the whole latent, or of every dimension, summed."""
    given = posteriors()
    noise = torch.randn(1, 4, 6, 3, dtype=torch.double)
    latent = given.draw(noise)[0]
    normal = torch.distributions.Normal(given.mean[0].T, (0.5 * given.log_var[0]).exp().T)
    if joint:
        parts = torch.distributions.Independent(torch.distributions.Normal(normal.mean.T, normal.stddev.T), 1)
        mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(4)), parts)
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(latent).sum(-1)
        expected = (mixture.log_prob(latent) - prior).mean()
    else:
        each = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(3, 4)), normal)
        expected = (each.log_prob(latent) - torch.distributions.Normal(0.0, 1.0).log_prob(latent)).sum(-1).mean()
    torch.testing.assert_close(density_gap(given, noise, joint=joint)[0], expected.double())


def test_information_and_density_gap_sum_to_the_mean_kl() -> None:
    """mean_k KL(q_k || p) = I + KL(q_bar || p), whose left side has a closed form; 8 responses, 4 dimensions."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(1, 8, 4, generator=generator).double()
    log_var = 0.5 * torch.randn(1, 8, 4, generator=generator).double() - 1
    given = Posteriors(mean, log_var, torch.ones(1, 8, dtype=torch.bool))
    noise = torch.randn(1, 8, 20_000, 4, generator=generator).double()
    information, gap = mutual_information(given, noise), density_gap(given, noise, joint=True)
    torch.testing.assert_close(information + gap, mean_kl(given), atol=0.02, rtol=0)
    assert 0 < information.item() <= math.log(8)
    same = Posteriors(mean[:, :1].expand(-1, 8, -1), log_var[:, :1].expand(-1, 8, -1), given.mask)
    assert mutual_information(same, noise[:, :, :4]).abs().item() < 1e-12  # nothing tells them apart


def test_padding_of_prompts_changes_nothing() -> None:
    given, noise = posteriors(), torch.randn(1, 4, 5, 3, dtype=torch.double)
    wide = Posteriors(
        *(torch.cat([value, torch.full_like(value[:, :2], 3.0)], 1) for value in given[:2]),
        torch.tensor([[True] * 4 + [False] * 2]),
    )
    more = torch.cat([noise, noise[:, :2]], 1)
    for loss in (mutual_information, density_gap):
        torch.testing.assert_close(loss(wide, more), loss(given, noise))
    torch.testing.assert_close(mean_kl(wide), mean_kl(given))


def test_contrast_at_chance_is_log_n_and_a_transcription_agrees() -> None:
    chance = likelihood_contrast(torch.full((5, 8), 170.0), torch.ones(5, 8, dtype=torch.bool))
    torch.testing.assert_close(chance.loss, torch.full((5,), math.log(8)))
    assert not chance.correct.any() and chance.gap.abs().max() < 1e-4
    nll = torch.tensor([[2.0, 3.0, 9.0], [5.0, 4.0, 1.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = likelihood_contrast(nll, mask)
    expected = [
        math.log(math.exp(-2) + math.exp(-3) + math.exp(-9)) + 2,
        math.log(math.exp(-5) + math.exp(-4)) + 5,
    ]
    assert found.loss.tolist() == pytest.approx(expected)
    assert found.correct.tolist() == [True, False] and found.gap.tolist() == [4.0, -1.0]
    large = likelihood_contrast(torch.tensor([[400.0, 401.0]], dtype=torch.float16), torch.ones(1, 2).bool())
    assert large.loss.dtype == torch.float32 and large.loss.item() == pytest.approx(math.log1p(math.exp(-1)), 1e-4)


def test_candidates_are_the_own_response_and_distinct_others_of_its_prompt() -> None:
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    group, place = torch.tensor([0] * 5 + [1] * 2), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    every = candidates(mask, group, place, None, torch.rand(7, 5))
    assert every[:, 0].tolist() == place.tolist()
    assert [sorted(row) for row in every.tolist()] == [[0, 1, 2, 3, 4]] * 5 + [[-1, -1, -1, 0, 1]] * 2
    counts = torch.zeros(5)
    for _ in range(400):
        some = candidates(mask, group, place, 2, torch.rand(7, 5))
        assert some.shape == (7, 3) and len(set(some[2].tolist())) == 3 and some[2, 0] == 2
        assert some[5].tolist() == [0, 1, -1]
        counts[some[2, 1:]] += 1
    assert counts[2] == 0 and (counts[[0, 1, 3, 4]] / 400 - 0.5).abs().max() < 0.12  # two of four others


def test_gradient_only_skip_leaves_the_forward_alone() -> None:
    hidden, skip = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    out = gradient_only(hidden, skip)
    assert torch.equal(out, hidden)
    given = torch.randn(4, 3)
    out.backward(given)
    assert torch.equal(hidden.grad, given) and torch.equal(skip.grad, given)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- encoder
@KINDS
def test_an_untrained_posterior_is_the_prior(causal_lm: Folder, kind: str) -> None:
    """Exactly N(0, I) for every text; the density gap is the noise of an estimate of zero, here exactly zero."""
    method = clap(causal_lm, kind, untrained=True)
    read = method.encoder(tokens(method))
    assert read.mean.shape == (4, Z) and not read.mean.any() and not read.log_var.any()
    same = Posteriors(read.mean[None], read.log_var[None], torch.ones(1, 4, dtype=torch.bool))
    for joint in (False, True):
        assert density_gap(same, torch.randn(1, 4, 16, Z), joint=joint).abs().max() < 1e-5


@KINDS
@pytest.mark.parametrize("prompt_in_posterior", [True, False])
def test_the_posterior_of_a_text_does_not_depend_on_padding(
    causal_lm: Folder, kind: str, prompt_in_posterior: bool
) -> None:
    method = clap(causal_lm, kind, prompt_in_posterior=prompt_in_posterior)
    right, left = (method.encoder(tokens(method, left=side)) for side in (False, True))
    alone = [method.encoder(tokens(method, [pair])) for pair in PAIRS]
    for part in ("mean", "log_var", "hidden"):
        torch.testing.assert_close(getattr(right, part), getattr(left, part), atol=1e-5, rtol=1e-4)
        single = torch.cat([getattr(one, part) for one in alone])
        torch.testing.assert_close(getattr(right, part), single, atol=1e-5, rtol=1e-4)
    assert (right.mean[0] - right.mean[1]).abs().max() > 0.01
    other_prompt = method.encoder(tokens(method, [("other words", " no")])).mean
    assert torch.allclose(other_prompt, right.mean[1:2], atol=1e-5) is not prompt_in_posterior


def test_an_end_token_is_read(causal_lm: Folder) -> None:
    """Although padding has no id of its own in many models, an end of text is no padding."""
    method = clap(causal_lm)
    one = tokens(method, [("a", " b")])
    assert int(one.input_ids[0, -1]) == method.causal_lm.tokenizer.eos_token_id
    without = Tokens(*(value[:, :-1] for value in one[:3]))
    assert (method.encoder(one).mean - method.encoder(without).mean).abs().max() > 1e-3


def test_fixed_entropy(causal_lm: Folder) -> None:
    read = clap(causal_lm, fix_entropy=True).encoder(tokens(clap(causal_lm)))
    assert read.log_var.abs().max() > 0.01 and read.log_var.sum(-1).abs().max() < 1e-5


# ---------------------------------------------------------------------- adapter
@KINDS
def test_keys_and_values_are_those_the_network_makes(causal_lm: Folder, kind: str) -> None:
    """Of any hidden states, at any position: against the layer's own attention and its cache."""
    from transformers import DynamicCache

    policy = Policy(CausalLM(str(causal_lm(kind))))
    base = policy.network.base_model
    hidden, start = torch.randn(2, 2, 3, 16), torch.tensor([0, 5])
    made = KeyValueMaker(policy, False)(hidden, start)
    cache = DynamicCache(config=policy.network.config)
    position = start[:, None] + torch.arange(3)
    for row, layer in enumerate(base.h if kind == "gpt2" else base.layers):
        if kind == "gpt2":
            layer.attn(layer.ln_1(hidden[:, row]), cache=cache)
        else:
            angles = base.rotary_emb(hidden, position)
            layer.self_attn(layer.input_layernorm(hidden[:, row]), angles, None, cache=cache)
    for ours, theirs in zip(made, cache.layers, strict=True):
        torch.testing.assert_close(ours[0], theirs.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours[1], theirs.values, atol=1e-5, rtol=1e-4)


def test_a_network_of_another_kind_is_refused(causal_lm: Folder) -> None:
    policy = Policy(CausalLM(str(causal_lm("llama"))))
    attention = policy.network.base_model.layers[1].self_attn
    attend = attention.forward
    attention.forward = lambda hidden_states, **options: attend(hidden_states=2 * hidden_states, **options)
    with pytest.raises(ValueError, match="makes keys and values in a way that is not known"):
        KeyValueMaker(policy, False)


def steered(method: CLaP, read: Tokens, latent: Tensor | None) -> Tensor:
    """Log-probabilities by the cached path."""
    rows = torch.arange(read.num_rows)
    texts = SteeredTexts(method.policy, method.adapter, read, rows, latent)
    return method._totals(*texts.predictions(rows, rows), read.num_rows)


@KINDS
@PLACEMENTS
@pytest.mark.parametrize("gate", [None, 0.4])
def test_the_cache_equals_explicit_concatenation(
    causal_lm: Folder, kind: str, placement: str, gate: float | None
) -> None:
    """Against attention written out: keys and values of virtual tokens set before those of the text, no cache."""
    method = clap(causal_lm, kind, placement=placement, gated=gate is not None)
    if gate is not None:
        method.adapter.gate.data.fill_(-gate)  # type: ignore[union-attr]
    latent = torch.randn(4, Z)
    found = steered(method, tokens(method), latent)
    for row, pair in enumerate(PAIRS):
        ids = method.causal_lm.completion(*pair)
        expected = _written_out(method, kind, [*ids.prompt, *ids.response], len(ids.prompt), latent[row : row + 1])
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(steered(method, tokens(method, left=True), latent), found, atol=1e-4, rtol=1e-4)
    assert (steered(method, tokens(method), -latent) - found).abs().max() > 1e-3


def _written_out(method: CLaP, kind: str, ids: list[int], num_prompt: int, latent: Tensor) -> Tensor:
    """Log-probability of ids[num_prompt:] by transformer blocks in plain tensors."""
    base, adapter = method.policy.network.base_model, method.adapter
    place = 0 if adapter.placement == "prefix" else num_prompt - 1  # virtual tokens stand before this token
    size = adapter.num_virtual_tokens
    position = torch.arange(len(ids))
    if adapter.gate is None:  # virtual tokens take positions
        position = position + size * (position >= place)
    virtual = adapter(latent, torch.tensor([place]))
    scale = 1.0 if adapter.gate is None else adapter.gate.abs() + 1e-6
    sees = torch.tril(torch.ones(len(ids), len(ids), dtype=torch.bool))
    sees_virtual = (torch.arange(len(ids)) >= place)[:, None].expand(-1, size)
    hidden = base.get_input_embeddings()(torch.tensor(ids))
    if kind == "gpt2":
        hidden = hidden + base.wpe(position)
    for row, layer in enumerate(base.h if kind == "gpt2" else base.layers):
        norm, attention = (layer.ln_1, layer.attn) if kind == "gpt2" else (layer.input_layernorm, layer.self_attn)
        given = norm(hidden)
        if kind == "gpt2":
            query, key, value = attention.c_attn(given).chunk(3, -1)
        else:
            query, key, value = attention.q_proj(given), attention.k_proj(given), attention.v_proj(given)
        query, key, value = (
            part.view(len(ids), -1, attention.head_dim).transpose(0, 1) for part in (query, key, value)
        )
        if kind == "llama":
            query, key = _rotated(query, position), _rotated(key, position)
        key, value = torch.cat([virtual[row][0][0], key], 1), torch.cat([virtual[row][1][0], value], 1)
        key, value = (part.repeat_interleave(len(query) // len(part), 0) for part in (key, value))
        weight = (query @ key.transpose(1, 2) / attention.head_dim**0.5).exp() * torch.cat([sees_virtual, sees], 1)
        weight = weight * torch.cat([scale * torch.ones(size), torch.ones(len(ids))])
        mixed = (weight / weight.sum(-1, keepdim=True) @ value).transpose(0, 1).reshape(len(ids), -1)
        if kind == "gpt2":
            hidden = hidden + attention.c_proj(mixed)
            hidden = hidden + layer.mlp(layer.ln_2(hidden))
        else:
            hidden = hidden + attention.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits = method.policy.logits((base.ln_f if kind == "gpt2" else base.norm)(hidden))
    logps = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    return logps[num_prompt - 1 :].sum()


def _rotated(heads: Tensor, position: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) in pairs (i, i + d/2), base 10,000."""
    width = heads.shape[-1]
    angle = position[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    one, two = heads[..., : width // 2], heads[..., width // 2 :]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


@KINDS
def test_the_language_model_is_left_alone(causal_lm: Folder, kind: str) -> None:
    """Without a latent its predictions are the same bits before, beside and after the adapter; nothing of it moves."""
    alone = Policy(CausalLM(str(causal_lm(kind))))
    method = clap(causal_lm, kind)
    read = tokens(method)
    before = alone.logits(alone.hidden(read))
    assert torch.equal(method.policy.logits(method.policy.hidden(read)), before)
    optimizer = torch.optim.AdamW(method.param_groups(), lr=0.1)
    method.loss(_batch(method))["loss"].backward()
    optimizer.step()
    assert torch.equal(method.policy.logits(method.policy.hidden(read)), before)
    held = set(method.state_dict())
    assert not any(name.startswith("policy.") or name.startswith("adapter.maker.keys") for name in held)
    base = steered(method, read, None)
    whole = method.logps(read).total
    torch.testing.assert_close(base, whole, atol=1e-5, rtol=1e-5)  # reading in parts is reading


def test_a_gated_adapter_starts_as_if_it_were_not_there(causal_lm: Folder) -> None:
    for kind in ("gpt2", "llama"):
        method = clap(causal_lm, kind, gated=True)
        read, latent = tokens(method), torch.randn(4, Z)
        torch.testing.assert_close(steered(method, read, latent), steered(method, read, None), atol=1e-4, rtol=1e-5)
        method.loss(_batch(method))["loss"].backward()
        assert method.adapter.gate.grad.abs() > 1e-3  # type: ignore[union-attr]


@KINDS
@PLACEMENTS
def test_every_response_meets_the_latents_of_its_prompt(causal_lm: Folder, kind: str, placement: str) -> None:
    """The matrix of likelihoods against each response read alone with each latent."""
    method = clap(causal_lm, kind, placement=placement)
    pairs = [("hello there", " my friend"), ("hello there", " no"), ("hello there", ""), ("a", " b"), ("a", " cde")]
    pairs[2] = ("hello there", " ?!")
    groups = group_by_prompt(tokens(method, pairs))
    assert groups.group.tolist() == [0, 0, 0, 1, 1] and groups.mask.tolist() == [[True] * 3, [True, True, False]]
    latent = torch.randn(5, Z)
    texts = SteeredTexts(method.policy, method.adapter, groups.tokens, groups.group, latent)
    text, other = torch.tensor([[i, j] for i in range(5) for j in range(5) if (i < 3) == (j < 3)]).T
    found = method._totals(*texts.predictions(text, other), len(text))
    expected = torch.cat(
        [steered(method, tokens(method, [pairs[i]]), latent[j : j + 1]) for i, j in zip(text, other, strict=True)]
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@KINDS
def test_reading_in_parts(causal_lm: Folder, kind: str) -> None:
    """Whatever the padding, hidden states of what follows are those of the whole text."""
    policy = Policy(CausalLM(str(causal_lm(kind))))
    read = completion_tokens([policy.backbone.completion(*pair) for pair in PAIRS])
    parts = split_texts(read)
    assert parts.before_mask.sum(-1).tolist() == [10, 10, 0, 10] and parts.before.shape[1] == 10
    reading = Reading(policy, 4)
    reading.read(parts.before, parts.before_mask)
    again = reading.take(torch.tensor([3, 0, 0, 2]))
    hidden = again.read(parts.after[[3, 0, 0, 2]], parts.after_mask[[3, 0, 0, 2]])
    whole = policy.completions(read)
    for row, text in enumerate((3, 0, 0, 2)):
        mine = whole.hidden[whole.row == text]
        torch.testing.assert_close(hidden[row, : len(mine)], mine, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------- the method
def _batch(method: CLaP) -> Any:
    from plm.types import PreferenceBatch

    chosen = tokens(method, [("hello there", " my friend"), ("a", " b")])
    rejected = tokens(method, [("hello there", " no"), ("a", " cde")])
    return PreferenceBatch(chosen, rejected, torch.zeros(2).long(), torch.ones(2), torch.zeros(2).bool())


@PLACEMENTS
def test_the_loss_is_the_published_sum(causal_lm: Folder, placement: str) -> None:
    """L_rec + L_DG + L_con of two prompts, weighted, from likelihoods read one by one at the same draws."""
    method = clap(causal_lm, placement=placement, num_negatives=5, kl_weight=0.3, contrast_weight=0.7)
    torch.manual_seed(3)
    found = method.loss(_batch(method))
    torch.manual_seed(3)
    groups = group_by_prompt(Tokens.cat([_batch(method).chosen, _batch(method).rejected]))
    read = method.encoder(groups.tokens)
    latent = read.mean + (0.5 * read.log_var).exp() * torch.randn(4, Z)
    noise = torch.randn(2, 2, 16, Z)
    given = Posteriors(groups.padded(read.mean), groups.padded(read.log_var), groups.mask)

    def nll(i: int, j: int) -> Tensor:
        return -steered(method, groups.tokens.take(torch.tensor([i])), latent[j : j + 1])[0]

    reconstruction = torch.stack([nll(row, row) for row in range(4)]).mean()
    contrast = torch.stack(
        [nll(row, row) + torch.stack([-nll(row, row), -nll(row, row ^ 1)]).logsumexp(0) for row in range(4)]
    ).mean()
    gap = density_gap(given, noise).mean()
    for name, expected in {"reconstruction": reconstruction, "kl": gap, "contrast": contrast}.items():
        torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["loss"], reconstruction + 0.3 * gap + 0.7 * contrast, atol=1e-4, rtol=1e-4)


def test_skip_and_ablations_leave_values_alone(causal_lm: Folder) -> None:
    """The skip changes gradients only; without contrast, or with other KLs, the other terms are the same."""
    losses = {}
    ablations: dict[str, dict[str, Any]] = {
        "plain": {},
        "skip": {"skip": True},
        "no contrast": {"contrast_weight": 0.0},
        "ordinary": {"kl": "ordinary"},
        "means": {"deterministic": True},
    }
    for name, options in ablations.items():
        method = clap(causal_lm, **{"skip": False, **options})
        torch.manual_seed(5)
        losses[name] = out = method.loss(_batch(method))
        out["loss"].backward()
        assert (method.skip is not None) == (name == "skip")
    for name in ("skip", "no contrast", "ordinary"):
        torch.testing.assert_close(losses[name]["reconstruction"], losses["plain"]["reconstruction"])
    torch.testing.assert_close(losses["skip"]["contrast"], losses["plain"]["contrast"])
    assert "contrast" not in losses["no contrast"]
    assert losses["ordinary"]["kl"] > losses["plain"]["kl"]
    assert losses["means"]["reconstruction"] != losses["plain"]["reconstruction"]


@KINDS
@PLACEMENTS
@pytest.mark.parametrize("gated", [False, True])
def test_cached_writing_equals_reading(causal_lm: Folder, kind: str, placement: str, gated: bool) -> None:
    """Different latents in one batch, prompts of different lengths: every token is the best one when read anew."""
    method = clap(causal_lm, kind, placement=placement, gated=gated)
    if gated:
        method.adapter.gate.data.fill_(2.0)  # type: ignore[union-attr]
    prompts = ["hello there", "a", "a", "what is it?"]
    latent = 2 * torch.randn(4, Z)
    users = UserState({"latent": latent}, torch.zeros(4).long())
    written = sample(method, prompts, users, max_new_tokens=5, temperature=0)
    assert written[1][0].token_ids != written[2][0].token_ids  # the same prompt, other latents
    for row, prompt in enumerate(prompts):
        before = method.causal_lm.prompt_tokens(prompt)
        ids = list(written[row][0].token_ids)
        for place, token in enumerate(ids):
            scores = torch.stack(
                [
                    _written_out(method, kind, [*before, *ids[:place], other], len(before), latent[row : row + 1])
                    for other in (token, (token + 1) % 98)
                ]
            )
            assert scores[0] >= scores[1] - 1e-4
    narrow = sample(method, prompts[2:3], users.take(torch.tensor([2])), max_new_tokens=5, temperature=0)
    assert narrow[0][0].token_ids == written[2][0].token_ids


def test_options_that_do_not_fit_are_refused(causal_lm: Folder) -> None:
    spec = CausalLM(str(causal_lm("gpt2"))).spec()
    with pytest.raises(ValueError, match=r"latent_dim: expected a multiple of model.num_queries=4.*got 6"):
        CLaP(1, 16, spec, latent_dim=6)
    with pytest.raises(ValueError, match=r"placement: expected one of prefix, suffix, got 'infix'"):
        CLaP(1, 16, spec, placement="infix")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="encoder_layers: expected 1 to 2, the layers of GPT2LMHeadModel, got 3"):
        CLaP(1, 16, spec, encoder_layers=3).configure_model()
    method = clap(causal_lm, untrained=True)
    with pytest.raises(ValueError, match="at most 64 tokens"):
        steered(method, tokens(method, [("x" * 61, " y")]), torch.zeros(1, Z))


@pytest.mark.parametrize("group", sorted(path.stem for path in (shipped("conf") / "method").glob("clap_*.yaml")))
def test_every_group_of_conf_fits(causal_lm: Folder, group: str) -> None:
    CLaP(1, 16, CausalLM(str(causal_lm("gpt2"))).spec(), **method_options(group))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_published_stages(causal_lm: Folder, stage: int) -> None:
    """arXiv 2412.20834: reconstruction and KL by a frozen model, helped by the skip; then contrast, all trained."""
    options = method_options("clap_paper" if stage == 1 else "clap_paper_stage2") | {"init_from": None}
    method = CLaP(2, 16, CausalLM(str(causal_lm("gpt2"))).spec(), **options)
    method.configure_model()
    assert method.policy.network.base_model.wte.weight.requires_grad == (stage == 2)
    assert (method.skip is None) == (stage == 2)
    out = method.loss(_batch(method))
    assert ("contrast" in out) == (stage == 2)
    expected = out["reconstruction"] + out["kl"] + (out["contrast"] if stage == 2 else 0.0)
    torch.testing.assert_close(out["loss"], expected)
    assert method.num_negatives is None and method.kl == "marginal" and method.encoder_layers == 2


def test_steps_are_those_of_adamw_with_the_published_decay_rates(causal_lm: Folder) -> None:
    """Betas (0.9, 0.95): gradients 1 and 3 have the second moment .95 (.05) 1 + .05 (9), over 1 - .95^2."""
    method = clap(causal_lm, lr=0.01, weight_decay=0.0, warmup=0)
    method.trainer = SimpleNamespace(estimated_stepping_batches=2)  # type: ignore[assignment]
    optimizer: Any = method.configure_optimizers()["optimizer"]  # type: ignore[call-overload,index]
    weight = method.encoder.head.weight
    before = weight.detach().clone()
    for gradient in (1.0, 3.0):
        optimizer.zero_grad()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    moment = (0.1 * 0.9 * 1 + 0.1 * 3) / (1 - 0.9**2)
    square = (0.05 * 0.95 * 1 + 0.05 * 9) / (1 - 0.95**2)
    expected = before - 0.01 - 0.01 * moment / math.sqrt(square)
    torch.testing.assert_close(weight.detach(), expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- stages and validity
def test_the_second_stage_starts_where_the_first_ended(causal_lm: Folder) -> None:
    """Same losses at the start, then the language model moves; another shape is refused; resumed, nothing is reread."""
    first = clap(causal_lm)
    with saved(first) as path:
        second = clap(causal_lm, untrained=True, unfreeze=True)
        second.start_from(str(path))
        read, latent = tokens(first), torch.randn(4, Z)
        assert torch.equal(second.encoder(read).mean, first.encoder(read).mean)
        assert torch.equal(steered(second, read, latent), steered(first, read, latent))
        before = second.policy.logits(second.policy.hidden(read)).detach()
        second.loss(_batch(second))["loss"].backward()
        torch.optim.SGD(second.param_groups(), lr=0.1).step()
        assert (second.policy.logits(second.policy.hidden(read)) - before).abs().max() > 1e-3
        with saved(second) as later:
            loaded = load_method(later)
            assert isinstance(loaded, CLaP)
            assert torch.equal(steered(loaded, read, latent), steered(second, read, latent))
            with pytest.raises(ValueError, match=r"init_from: .* does not fit"):
                clap(causal_lm, untrained=True).start_from(str(later))  # a frozen stage cannot hold a trained network
        with pytest.raises(ValueError, match=r"init_from: .* does not fit .*same latent_dim"):
            clap(causal_lm, untrained=True, latent_dim=4).start_from(str(path))
        with pytest.raises(ValueError, match="trained over another language model"):
            clap(causal_lm, "llama", untrained=True).start_from(str(path))


def test_health_of_a_model_that_knows_and_of_one_that_does_not(causal_lm: Folder) -> None:
    """At the start: no information, no dimension used, chance; numbers of prompts are summed over evaluations."""
    method = clap(causal_lm, untrained=True)
    method.sum_over_processes = lambda value: value  # type: ignore[method-assign, assignment]
    method.evaluate(_batch(method))
    method.evaluate(_batch(method))
    report = method.report()
    assert report["contrast"] == pytest.approx(math.log(2), abs=0.1)
    assert report["mutual_information"] == pytest.approx(0, abs=1e-5) and report["kl"] == pytest.approx(0, abs=1e-5)
    assert report["log_num_responses"] == pytest.approx(math.log(2)) and report["contrastive_chance"] == 0.5
    assert report["active_units"] == 0
    total = report["reconstruction"] + report["kl"] + report["contrast"]
    assert report["loss"] == pytest.approx(total, rel=1e-5)
    with torch.no_grad():
        method.encoder.head.weight.normal_(std=3.0)
        method.encoder.head.weight[Z // 2 :] = 0.0
        method.encoder.head.bias[Z // 2 :] = -6.0
    method.on_test_epoch_start()
    method.evaluate(_batch(method))
    report = method.report()
    assert report["mutual_information"] == pytest.approx(math.log(2), abs=0.01) and report["active_units"] == Z


def test_batches_without_regard_to_prompts_are_refused(causal_lm: Folder) -> None:
    method = CLaP(1, 16, CausalLM(str(causal_lm("gpt2"))).spec(), latent_dim=8, num_queries=2)
    method._trainer = SimpleNamespace(datamodule=SimpleNamespace(prompts_per_batch=None))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"expected data\.prompts_per_batch, got null"):
        method.on_train_start()
