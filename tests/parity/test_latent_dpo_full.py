"""People with an encoder of their own, as published: what it is, how it is trained, and that it goes the whole way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plm.backbones import CausalLM, completion_tokens
from plm.checkpoint import load_method
from plm.data.datamodule import PreferenceDataModule
from plm.data.encoding import CachedReader, encode_pairs
from plm.data.rewards import Length
from plm.data.schema import read_pairs
from plm.data.sources.sampled import SampledPairs
from plm.generation import best_of_n, sample
from plm.methods.clap import CLaP
from plm.methods.clap.latents import ClapLatents
from plm.methods.latent_dpo import LatentDPO
from plm.methods.latent_dpo.families import Full
from plm.methods.latent_dpo.maths import Gaussian, gaussian
from plm.methods.latent_dpo.rules import preference_losses
from plm.testing import saved, tiny_causal_lm
from plm.testing.contract import quiet_trainer
from plm.types import Context, Tokens
from tests.groups import method_options

WIDTH, PROMPTS = 8, ["how is it", "tell me of the sea, please", "no", "it"]


def model(**options: Any) -> CLaP:
    method = CLaP(1, 16, tiny_causal_lm().spec(), latent_dim=WIDTH, num_queries=2, encoder_layers=1, **options)
    method.configure_model()
    torch.manual_seed(0)
    torch.nn.init.normal_(method.encoder.head.weight, std=0.5)
    return method.eval()


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Path]:
    with saved(model()) as path:
        yield path


def make(checkpoint: Path, **options: Any) -> LatentDPO:
    backbone = ClapLatents(str(checkpoint), prompts="tokens")
    dim = backbone.prompt_backbone.feature_dim
    return LatentDPO(2, 2 * WIDTH, backbone.spec(), prompt_dim=dim, **{"family": "full", **options})


def prompts_of(checkpoint: Path) -> Tokens:
    return ClapLatents(str(checkpoint)).causal_lm.represent_prompts(PROMPTS)


def pairs(checkpoint: Path, num_people: int = 2) -> Context:
    draw = torch.Generator().manual_seed(4)
    sides = [torch.randn(num_people, 4, 2 * WIDTH, generator=draw) for _ in "ab"]
    mask = torch.ones(num_people, 4, dtype=torch.bool)
    prompts = prompts_of(checkpoint).map(lambda value: value.expand(num_people, -1, -1))
    return Context(*sides, mask, mask.float(), prompts)


def test_tokens_of_prompts_are_those_of_the_language_model(checkpoint: Path, tmp_path: Path) -> None:
    """In training, where the data give them, and in use; both as they stand before their responses."""
    backbone = ClapLatents(str(checkpoint), prompts="tokens")
    lm = backbone.prompt_backbone
    assert isinstance(lm, CausalLM)
    rows = [{"prompt": prompt, "chosen": " a", "rejected": " b", "user_id": "anna"} for prompt in PROMPTS]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = CachedReader(backbone, str(tmp_path / "cache"))
    data = encode_pairs(read_pairs([str(file)]), backbone, reader, prompt_features=True)
    assert data.prompts is not None
    for read in (data.prompts.gather(np.arange(len(PROMPTS))), lm.represent_prompts(PROMPTS)):
        assert isinstance(read, Tokens)
        for prompt, ids, attended in zip(PROMPTS, read.input_ids, read.attention_mask, strict=True):
            assert ids[attended].tolist() == lm.prompt_tokens(prompt)
    with pytest.raises(ValueError, match="expected a prompt that leaves room for a response"):
        lm.represent_prompts(["x " * 100])
    with pytest.raises(ValueError, match="expected hidden or tokens, got 'words'"):
        ClapLatents(str(checkpoint), prompts="words")  # type: ignore[arg-type]


def test_it_starts_at_the_prior_with_what_makes_latents(checkpoint: Path) -> None:
    """The loss is ln 2; with the head back in place, the policy is the posterior of the prompt alone."""
    method = make(checkpoint, variance="free")
    users = method.population_state(4)
    policy = method.latent_policies(users, prompts_of(checkpoint))
    assert not policy.mean.any() and not policy.log_var.any()
    clap, names = load_method(checkpoint), list(method.family.trained)  # type: ignore[attr-defined]
    assert isinstance(clap, CLaP)
    sizes = [value.numel() for value in method.family.trained.values()]  # type: ignore[attr-defined]
    parts = dict(zip(names, torch.split(method.start.clone(), sizes), strict=True))
    assert "encoder.network.wte.weight" not in parts and "encoder.queries" in parts
    for name in ("weight", "bias"):
        parts[f"encoder.head.{name}"] = getattr(clap.encoder.head, name).flatten()
    users.tensors["policy"] = torch.cat(list(parts.values())).expand(4, -1)
    policy = method.latent_policies(users, prompts_of(checkpoint))
    for row, prompt in enumerate(PROMPTS):
        tokens = completion_tokens([clap.causal_lm.completion(prompt, " x")])
        alone = tokens.map(lambda value: value[:, : int((~tokens.completion_mask).sum())])  # noqa: B023
        read = clap.encoder(alone)
        torch.testing.assert_close(policy.mean[row], read.mean[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(policy.log_var[row], read.log_var[0], atol=1e-5, rtol=1e-4)


def test_the_token_embeddings_are_trained_where_those_of_the_encoder_were() -> None:
    with saved(model(train_embeddings=True)) as path:
        assert "encoder.network.wte.weight" in make(path).family.trained  # type: ignore[attr-defined]


def test_people_are_trained_as_a_plain_encoder_would_be(checkpoint: Path) -> None:
    """A copy of the encoder, torch.optim.AdamW, the loss of all pairs; each of two people, together and alone."""
    options: dict[str, Any] = {"variance": "free", "rule": "closed_form", "num_steps": 5, "lr": 0.01, "kl_coef": 0.02}
    method, context = make(checkpoint, **options), pairs(checkpoint)
    together = method.adapt(context).tensors["policy"]
    for person in (0, 1):
        encoder = ClapLatents(str(checkpoint), prompts="tokens").prompt_encoder()
        trained = [value for value in encoder.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
        responses = gaussian(torch.stack([context.chosen[person], context.rejected[person]], 1))  # type: ignore[index]
        for _ in range(5):
            policy = Gaussian(*encoder(prompts_of(checkpoint)).chunk(2, -1))
            grades = torch.tensor([1.0, 0.0]).expand(4, 2)
            kl = 0.5 * (policy.log_var.exp() + policy.mean.square() - 1 - policy.log_var).sum(-1)
            loss = (preference_losses("closed_form", policy, responses, grades, None, 0.1) + 0.02 * kl).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        expected = torch.cat([value.detach().flatten() for value in trained])
        assert (expected - method.start).abs().max() > 0.02
        torch.testing.assert_close(together[person], expected, rtol=0, atol=2e-4)
        cut = (value[person : person + 1] for value in context[:4])  # type: ignore[index]
        alone = Context(*cut, prompts_of(checkpoint).map(lambda value: value[None]))  # type: ignore[arg-type]
        torch.testing.assert_close(method.adapt(alone).tensors["policy"][0], together[person], rtol=0, atol=1e-5)


def test_a_person_is_read_once_for_all_their_texts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards, texts and mixtures of two people in turns equal those of a state per text, at one reading of each."""
    method = make(checkpoint, variance="free", rule="closed_form", num_steps=3, lr=0.02)
    users = method.adapt(pairs(checkpoint))
    rows, prompts = (
        torch.tensor([1, 0, 0, 1, 0, 1, 1]),
        prompts_of(checkpoint).take(torch.tensor([0, 1, 2, 3, 0, 0, 1])),
    )
    responses = torch.randn(7, 2 * WIDTH, generator=torch.Generator().manual_seed(1))
    mixed = method.mixed(users, torch.tensor([[0.5, 0.25], [0.0, 1.0]]))
    method.encode_prompts = lambda asked: prompts_of(checkpoint).take(torch.arange(len(asked)))
    read: list[int] = []
    outputs = Full.outputs

    def counted(self: Full, tensors: list[Tensor], given: Tokens) -> Tensor:
        assert {len(value) for value in tensors} == {given.num_rows}
        read.append(given.num_rows)
        return outputs(self, tensors, given)

    def both(call: Any, state: Any, own: Tensor) -> tuple[Any, Any]:
        return call(state, own), call(state.take(own), torch.arange(len(own)))

    monkeypatch.setattr(Full, "outputs", counted)
    for state, once in ((users, 2), (mixed, 4)):
        found, expected = both(lambda s, r: method.score(responses, s, rows=r, prompt_features=prompts), state, rows)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert read == [once, once * 7 // 2] and found.std() > 1e-3
        read.clear()
    found, expected = both(
        lambda s, r: method.latent_states(s, r, PROMPTS, torch.arange(4)).tensors["latent"], users, rows[:4]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert read == [2, 4]
    with saved(method) as path:
        loaded = load_method(path)
        read.clear()
        sample(loaded, PROMPTS, user_id=["0", "1", "0", "1"], max_new_tokens=2)
        loaded.score([" a", " b", " c"], user_id="1", prompts="no")
        best_of_n(loaded, loaded, PROMPTS[:2], user_id="1", n=3, max_new_tokens=2)
    assert read == [2, 1, 1, 1]  # best_of_n writes for the population, and scores


def test_prompts_of_the_wrong_kind_are_refused(checkpoint: Path) -> None:
    hidden = ClapLatents(str(checkpoint)).spec()
    for spec, dim in ((None, 63), (hidden, 16), ({**make(checkpoint).hparams["backbone"]}, 0)):
        with pytest.raises(ValueError, match=r"family full reads the tokens .*init_args\.prompts: tokens"):
            LatentDPO(2, 2 * WIDTH, spec, prompt_dim=dim, family="full")
    with pytest.raises(ValueError, match="family mlp reads features of prompts, got tokens"):
        make(checkpoint, family="mlp")
    make(checkpoint, family="vector")


def test_the_published_settings_from_samples_to_texts(checkpoint: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{prompt} {number}", "responses": [f" {'very ' * n}{word}" for n in range(3) for word in "ab"]}
        for number in range(6)
        for prompt in PROMPTS
    ]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SampledPairs(str(file), {"words": Length()}, {"short": {"words": -1.0}, "long": {"words": 1.0}})
    backbone = ClapLatents(str(checkpoint), prompts="tokens")
    options: dict[str, Any] = {"unseen_users": 0.0, "shots": [], "prompt_features": True}
    data = PreferenceDataModule(source, backbone, cache_dir=str(tmp_path / "cache"), val_rows=0.2, **options)
    changes = {**method_options("latent_dpo_paper"), "lr": 0.01, "num_samples": 4, "num_steps": 25}
    method = LatentDPO(2, data.feature_dim, data.backbone_spec, data.prompt_dim, **changes)
    assert method.options.family == "full" and method.options.rule == "evidence"
    quiet_trainer(tmp_path, max_epochs=25).fit(method, datamodule=data)
    (batch,) = data.train_dataloader()
    assert (method.margin(batch) > 0).float().mean() > 0.8
    method.trainer = None
    with saved(method) as path:
        loaded = load_method(path)
        with torch.no_grad():
            texts = [" very very a", " b"]
            rewards = [loaded.score(texts, user_id=user, prompts="no 9") for user in ("long", "short")]
        assert rewards[0][0] > rewards[0][1] and rewards[1][1] > rewards[1][0]
        written = sample(loaded, ["no 9", "it 9"], user_id=["long", "short"], max_new_tokens=4)
        assert all(one.text for [one] in written)
