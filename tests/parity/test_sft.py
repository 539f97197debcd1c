"""SFT against transformers' own loss, and what is left on disk after a fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from plm.backbones import CausalLM, completion_tokens
from plm.backbones.packing import first_fit
from plm.callbacks import PreferenceMetrics
from plm.data.datamodule import PreferenceDataModule
from plm.data.sources.synthetic import SyntheticPairs
from plm.methods.sft import SFT
from plm.types import PreferenceBatch, Tokens


def nats_per_token(folder: str | Path, texts: list[Tokens]) -> float:
    """Mean over the response tokens, by transformers' loss of one text at a time."""
    network = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    nats = count = 0.0
    for tokens in texts:
        for row in range(tokens.num_rows):
            one = tokens.take(torch.tensor([row])).trimmed()
            labels = one.input_ids.masked_fill(~one.completion_mask, -100)
            with torch.no_grad():
                loss = network(input_ids=one.input_ids, labels=labels).loss
            count += int(one.completion_mask.sum())
            nats += float(loss) * int(one.completion_mask.sum())
    return nats / count


def chosen(batches: list[PreferenceBatch]) -> list[Tokens]:
    return [batch.chosen for batch in batches if isinstance(batch.chosen, Tokens)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loss_is_that_of_transformers(kind: str, causal_lm: Callable[[str], Path]) -> None:
    lm = CausalLM(str(causal_lm(kind)))
    method = SFT(num_users=2, feature_dim=16, backbone=lm.spec())
    method.configure_model()
    tokens = lm.represent(["Tea or coffee?", "One"], [" Tea, please.", " Two three four five"])
    batch = PreferenceBatch(tokens, tokens, torch.zeros(2).long(), torch.ones(2), torch.zeros(2).bool())
    expected = nats_per_token(causal_lm(kind), [tokens])
    found = [method.loss(batch) for _ in range(2)]
    assert float(found[0]["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert [int(one["num_tokens"]) for one in found] == [tokens.attention_mask.sum(), 2 * tokens.attention_mask.sum()]


TEXTS = [
    ("Tea or coffee?", " Tea, please, and then some more tea"),
    ("One", " Two"),
    ("Why?", " So"),
    ("A long question, is it not?", " No"),
    ("Yes", " and no, as ever"),
]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "mistral"])
@pytest.mark.parametrize("left", [False, True])
def test_packed_texts_are_read_as_if_alone(kind: str, left: bool, causal_lm: Callable[[str], Path]) -> None:
    """The same loss and gradients from fewer rows; texts beyond a window, here of Mistral, are read apart."""
    lm, rows = CausalLM(str(causal_lm(kind))), []
    tokens = completion_tokens([lm.completion(*text) for text in TEXTS], left=left)
    weight = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0])
    batch = PreferenceBatch(tokens, tokens, torch.zeros(5).long(), weight, torch.zeros(5).bool())
    found = []

    def keep(_: object, args: tuple[Tensor, ...], given: dict[str, Tensor]) -> None:
        rows.append(tuple((args[0] if args else given["input_ids"]).shape))

    for packing in (False, True):
        method = SFT(num_users=2, feature_dim=16, backbone=lm.spec(), packing=packing)
        method.configure_model()
        method.policy._check_masks()
        method.policy.decoder.register_forward_pre_hook(keep, with_kwargs=True)
        loss = method.loss(batch)["loss"]
        loss.backward()
        found.append((loss.detach(), {name: value.grad for name, value in method.named_parameters()}))
    (loss, gradients), (packed, same) = found
    width = int(tokens.attention_mask.sum(-1).max())
    shapes = [(5, width)] * 2 if kind == "mistral" else [(5, width), (3, width)]
    assert [shape for shape in rows if shape[0] > 1] == shapes
    torch.testing.assert_close(packed, loss, atol=1e-6, rtol=1e-6)
    assert all(value is not None for value in gradients.values())
    for name, value in gradients.items():
        torch.testing.assert_close(same[name], value, atol=1e-5, rtol=1e-5)


def test_texts_go_into_the_first_row_with_room_the_longest_first() -> None:
    assert first_fit([3, 5, 2, 2, 3]) == [(1, 0), (0, 0), (1, 3), (2, 3), (2, 0)]
    assert first_fit([]) == []


def test_a_fit_reports_nats_and_writes_its_best_model(causal_lm: Callable[[str], Path], tmp_path: Path) -> None:
    data = PreferenceDataModule(
        SyntheticPairs(num_users=6, pairs_per_user=8),
        CausalLM(str(causal_lm("gpt2")), max_prompt_length=16),
        cache_dir=str(tmp_path),
        batch_size=4,
        shots=[0, 2],
        repeats=1,
    )
    method = SFT(
        num_users=data.num_users,
        feature_dim=data.feature_dim,
        backbone=data.backbone_spec,
        lr=3e-3,
        save_to=str(tmp_path / "trained"),
    )
    before = nats_per_token(causal_lm("gpt2"), chosen(list(data.val_dataloader()[0])))
    best = ModelCheckpoint(tmp_path, "best", monitor="val/method/nats_per_token", mode="min")
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[PreferenceMetrics(), best],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(method, datamodule=data)
    after = nats_per_token(tmp_path / "trained", chosen(list(data.val_dataloader()[0])))
    assert best.best_model_score is not None
    assert after == pytest.approx(float(best.best_model_score), rel=1e-5)
    assert after < before - 0.5
    (results,) = trainer.validate(method, datamodule=data, verbose=False)
    assert results["val/method/nats_per_token"] == pytest.approx(after, rel=1e-5)
    (tests,) = trainer.test(method, datamodule=data, verbose=False)[:1]
    assert math.isfinite(tests["test/method/nats_per_token"])
    assert CausalLM(str(tmp_path / "trained")).completion("a", "b")
