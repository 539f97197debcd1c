"""A CLaP checkpoint as a backbone: cached latents, prompt features, texts from latents, and people learned on it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plm.backbones import Backbone, CausalLM, FreshCausalLM, completion_tokens
from plm.checkpoint import load_method
from plm.cli.adapt import run
from plm.data.datamodule import PreferenceDataModule
from plm.data.encoding import CachedReader, encode_pairs
from plm.data.features import FeatureCache
from plm.data.rewards import Length
from plm.data.schema import read_pairs
from plm.data.sources.sampled import SampledPairs
from plm.generation import sample
from plm.methods.clap import CLaP
from plm.methods.clap.latents import ClapLatents
from plm.methods.latent_dpo import LatentDPO
from plm.testing import tiny_causal_lm
from plm.testing.contract import quiet_trainer, saved
from plm.types import UserState
from plm.users import UserStore, store_path
from tests.groups import method_options

PROMPTS = ["how is it", "tell me of the sea, please", "no"]
PAIRS = [(prompt, f" {word} words about it") for prompt in PROMPTS for word in ("kind", "long and winding", "few")]


def model(seed: int = 0, **options: Any) -> CLaP:
    given: dict[str, Any] = {"latent_dim": 16, "num_queries": 2, "encoder_layers": 1, "num_virtual_tokens": 2}
    method = CLaP(**{"num_users": 1, "feature_dim": 16, "backbone": tiny_causal_lm().spec(), **given, **options})
    method.configure_model()
    torch.manual_seed(seed)
    torch.nn.init.normal_(method.encoder.head.weight, std=0.5)
    return method.eval()


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Path]:
    with saved(model()) as path:
        yield path


def test_latents_are_those_of_the_encoder(checkpoint: Path, tmp_path: Path) -> None:
    """Mean and log-variance side by side, whatever the batch; cached under the content, wherever the file lies."""
    backbone = ClapLatents(str(checkpoint))
    assert (backbone.view, backbone.feature_dim, backbone.latent_dim) == ("latents", 32, 16)
    cache = FeatureCache(backbone, tmp_path)
    found = cache.features(PAIRS, progress=False)
    method = load_method(checkpoint)
    assert isinstance(method, CLaP)
    for pair, row in zip(PAIRS, found, strict=True):
        read = method.encoder(completion_tokens([method.causal_lm.completion(*pair)]))
        torch.testing.assert_close(row, torch.cat([read.mean, read.log_var], 1)[0], atol=1e-5, rtol=1e-4)
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(checkpoint.read_bytes())
    again = ClapLatents(str(copy))
    assert again.key() == backbone.key() and FeatureCache(again, tmp_path).folder == cache.folder
    again.encode = None  # type: ignore[assignment, method-assign]
    assert torch.equal(FeatureCache(again, tmp_path).features(PAIRS, progress=False), found)  # read, not computed
    with pytest.raises(ValueError, match="expected a prompt that leaves room for a response"):
        backbone.encode([backbone.render("x " * 100, " y")])


def test_prompt_features_are_of_another_width_and_cache(checkpoint: Path, tmp_path: Path) -> None:
    prompts = ClapLatents(str(checkpoint)).prompt_backbone
    assert prompts.feature_dim == 16
    found = FeatureCache(prompts, tmp_path).features([("", prompt) for prompt in PROMPTS], progress=False)
    method = load_method(checkpoint)
    assert isinstance(method, CLaP)
    for prompt, row in zip(PROMPTS, found, strict=True):
        tokens = completion_tokens([method.causal_lm.completion(prompt, " x")])
        alone = tokens.map(lambda value: value[:, : int((~tokens.completion_mask).sum())])  # noqa: B023
        torch.testing.assert_close(row, method.encoder(alone).hidden[0], atol=1e-5, rtol=1e-4)
    assert prompts.key() != ClapLatents(str(checkpoint)).key()


def test_another_model_is_refused(checkpoint: Path) -> None:
    """Its content is written into the spec, so that people are never served by, or tested on, other latents."""
    spec = ClapLatents(str(checkpoint)).spec()
    assert Backbone.from_spec(spec).key()["content"] == spec["init_args"]["content"]
    for other in (model(1), model(0, fix_entropy=True)):
        with saved(other) as path:
            moved = {**spec, "init_args": {**spec["init_args"], "checkpoint": str(path)}}
            with pytest.raises(ValueError, match="latents of one model mean nothing to another"):
                _ = Backbone.from_spec(moved).feature_dim
    newton = method_options("latent_dpo_newton")
    people = LatentDPO(1, 32, spec, **newton)
    with saved(model(1)) as path, saved(people) as learned:
        other = LatentDPO(1, 32, ClapLatents(str(path)).spec(), **newton)
        with pytest.raises(ValueError, match=r"trained on latents of the model .*, the data give those of"):
            other.on_load_checkpoint(torch.load(learned, weights_only=True))
    with (
        saved(people) as learned,
        pytest.raises(ValueError, match=r"expected a checkpoint of CLaP, got one of .*Latent"),
    ):
        _ = ClapLatents(str(learned)).feature_dim


def test_writing_from_latents(checkpoint: Path) -> None:
    """The backbone writes what the method does for users with these latents."""
    backbone = ClapLatents(str(checkpoint))
    latents = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    users = UserState({"latent": latents}, torch.zeros(3).long())
    expected = sample(backbone.method, PROMPTS, users, max_new_tokens=4, temperature=0)
    writing = backbone.writing(latents)
    lm = backbone.policy.backbone
    from plm.backbones import Completion

    read = [Completion(lm.prompt_tokens(prompt), []) for prompt in PROMPTS]
    token = writing.start(completion_tokens(read, left=True)).argmax(-1)
    assert token.tolist() == [row[0].token_ids[0] for row in expected]


@pytest.mark.parametrize("family", ["vector", "mlp"])
def test_people_are_learned_on_it_unchanged(checkpoint: Path, tmp_path: Path, family: str) -> None:
    """Samples, people, latents, Latent DPO, its checkpoint, and scores of texts: no part knows of another."""
    rows = [
        {"prompt": f"{prompt} {number}", "responses": [f" {'very ' * n}{word}" for n in range(3) for word in "ab"]}
        for number in range(8)
        for prompt in PROMPTS
    ]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    people = {"short": {"length": -1.0}, "long": {"length": 1.0}}
    source = SampledPairs(str(file), {"length": Length()}, people)
    options: dict[str, Any] = {"unseen_users": 0.0, "shots": [], "prompt_features": family == "mlp"}
    backbone = ClapLatents(str(checkpoint))
    data = PreferenceDataModule(source, backbone, cache_dir=str(tmp_path / "cache"), val_rows=0.2, **options)
    assert data.view == "latents" and data.prompt_dim == (16 if family == "mlp" else 0)
    method = LatentDPO(
        2, data.feature_dim, data.backbone_spec, prompt_dim=data.prompt_dim, family=family, num_steps=40, lr=0.05
    )
    trainer = quiet_trainer(tmp_path, max_epochs=40)
    trainer.fit(method, datamodule=data)
    (batch,) = data.train_dataloader()
    assert (method.margin(batch) > 0).float().mean() > 0.9
    method.trainer = None
    with saved(method) as path:
        loaded = load_method(path)
        pair = ["tell me 9", "tell me 9"], [" very very a", " b"]
        for user, sign in (("long", 1), ("short", -1)):
            with torch.no_grad():
                reward = loaded.score(pair[1], user_id=user, prompts=pair[0])
            assert (reward[0] - reward[1]) * sign > 0


@pytest.mark.parametrize("family", ["vector", "mlp", "full"])
def test_texts_that_do_not_fit_are_left_out_and_refused(checkpoint: Path, tmp_path: Path, family: str) -> None:
    """As for token methods: pairs are left out and counted, cut responses warned about, and a score names the row."""
    long, fits = "x " * 100, {"prompt": "hi", "rejected": " few", "user_id": "anna"}
    rows = [
        {**fits, "chosen": " kind words"},
        {**fits, "prompt": long, "chosen": " a", "user_id": "anna"},
        {**fits, "prompt": long, "chosen": " a", "user_id": "ben"},  # all that ben has
        {**fits, "chosen": " very" * 100, "user_id": "carl"},
        {**fits, "chosen": " y" * 100 + "a", "rejected": " y" * 100 + "b", "user_id": "dora"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbone = ClapLatents(str(checkpoint), prompts="tokens" if family == "full" else "hidden")
    table = read_pairs([str(file)])
    with pytest.warns(UserWarning) as caught:
        reader = CachedReader(backbone, str(tmp_path / "cache"))
        data = encode_pairs(table, backbone, reader, prompt_features=True)
    said = "\n".join(str(warning.message) for warning in caught)
    assert "2 of 5 pairs are left out: their prompts leave no room for a response" in said and "pairs.jsonl:2" in said
    assert "3 of 7 responses are cut off where the model can read no more" in said
    assert {name: data.table.dropped[name] for name in ("too_long", "same_when_cut")} == {
        "too_long": 2,
        "same_when_cut": 1,
    }
    used = torch.from_numpy(np.concatenate([data.table.chosen, data.table.rejected]))
    assert data.items.gather(used.numpy()).isfinite().all()  # type: ignore[union-attr]

    width = backbone.prompt_backbone.feature_dim
    method = LatentDPO(0, 32, backbone.spec(), prompt_dim=width, family=family, num_steps=2)  # type: ignore[arg-type]
    with saved(method) as learned:
        with pytest.warns(UserWarning, match="2 of 5 pairs are left out"):
            run(["--ckpt_path", str(learned), "--pairs", str(file)])
        assert UserStore(store_path(learned)).ids == ["anna", "carl"]
        loaded = load_method(learned)
        with pytest.raises(ValueError, match=r"^row 2 of 2: expected a prompt that leaves room .* shorten it"):
            loaded.score([" a", " b"], user_id="anna", prompts=["hi", long])


def test_a_language_model_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is kept whole; where it was moved, it is found beside the checkpoint, and else there is a message."""
    first, away = tmp_path / "first", tmp_path / "away"
    away.mkdir()
    shutil.copytree(tiny_causal_lm().model, first / "runs" / "tiny")
    monkeypatch.chdir(first)
    spec = CausalLM("runs/tiny").spec()
    assert spec["init_args"]["model"] == str(first / "runs" / "tiny")
    assert CausalLM("someone/tiny").spec()["init_args"]["model"] == "someone/tiny"  # an id on the hub
    assert FreshCausalLM("runs/later").spec()["init_args"]["model"] == str(first / "runs" / "later")
    with saved(model(backbone=spec)) as path:
        checkpoint = Path(shutil.copy(path, away / "clap.ckpt"))
    monkeypatch.chdir(away)
    latents = ClapLatents("clap.ckpt")
    found = latents.represent(PROMPTS[:1], [" a few words"])
    (first / "runs" / "tiny").rename(away / "moved")
    with pytest.raises(
        ValueError, match=r"runs/tiny', which does not exist; .*a checkpoint also finds the folder besid"
    ):
        load_method(checkpoint)
    (away / "moved").rename(away / "tiny")
    assert torch.equal(ClapLatents("clap.ckpt").represent(PROMPTS[:1], [" a few words"]), found)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=re.escape(f"'./gone', which does not exist in {str(away)!r}; correct the path")
    ):
        CausalLM("./gone").tokenizer  # noqa: B018
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=re.escape(f"there is no such folder in {str(away)!r}: give an absolute")):
        CausalLM("runs/gone").tokenizer  # noqa: B018
