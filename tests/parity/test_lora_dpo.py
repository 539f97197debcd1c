"""LoRADPO against TRL's DPOTrainer with the same PEFT adapter over the same model, and its other modes against it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import lightning as L
import pytest
import torch
from torch import Tensor

from plm.backbones import CausalLM
from plm.data.datamodule import PreferenceDataModule
from plm.data.sources.pairs import PairFiles
from plm.methods.lora_dpo import LoRADPO
from plm.methods.lora_dpo.options import LossType
from plm.testing.contract import quiet_trainer
from plm.types import PreferenceBatch, Tokens

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl", minversion="1.16", reason="needs trl >= 1.16 of the test extra (Python >= 3.11)")
datasets = pytest.importorskip("datasets", reason="comes with trl")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
]

Folder = Callable[[str], Path]
ROWS = [  # prompt, chosen, rejected: the longer response is now one, now the other
    ("what is this?", " a cat", " nothing at all"),
    ("hello", " to you, my friend", " no"),
    ("count", " one", " two three"),
    ("a long question about it", " why", " so it is"),
]
SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.1, "aot_unpaired": 0.1}
"""Losses of TRL that read it."""
LOSSES: dict[str, dict[str, Any]] = {
    **{
        name: {"loss_type": [name], "label_smoothing": SMOOTHING.get(name, 0.0)}
        for name in get_args(LossType)
        if name != "conservative"  # not one of TRL's
    },
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence", "beta": 0.3},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "two losses": {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.3]},
    "ld": {"ld_alpha": 0.4},
    "wpo": {"use_weighting": True, "beta": 0.5},
}


class Peer(NamedTuple):
    """TRL's trainer with a PEFT adapter that is none of ours, and the same pairs as each made a batch of them."""

    folder: Path
    """Of the base model."""
    trainer: Any
    batch: dict[str, Tensor]
    """By TRL's collator."""
    ours: dict[bool, PreferenceBatch]
    """Of our training loader; True: with the cached log-probabilities of the reference."""
    adapter: Tensor
    """``(P,)`` the same adapter as one of our rows."""


def make(folder: Path, **options: Any) -> LoRADPO:
    method = LoRADPO(
        num_users=2, feature_dim=16, backbone=CausalLM(str(folder)).spec(), **{"rank": 4, "alpha": 6.0, **options}
    )
    method.configure_model()
    return method


def data_of(folder: Path, out: Path, reference_logps: bool) -> PreferenceDataModule:
    """All pairs as one training batch."""
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True), user_id="u") for row in ROWS]
    (out / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return PreferenceDataModule(
        PairFiles(str(out / "pairs.jsonl")), CausalLM(str(folder)), str(out / "cache"), unseen_users=0.0, val_rows=0.0,
        test_rows=0.0, batch_size=len(ROWS), reference_logps=reference_logps,
    )  # fmt: skip


def batch_from(data: PreferenceDataModule) -> PreferenceBatch:
    data.setup("fit")
    [batch] = data.train_dataloader()
    return batch


def trainer_of(folder: Path, out: Path, model: Any, **options: Any) -> Any:
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ROWS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(
                output_dir=str(out),
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                disable_tqdm=True,
                use_weighting=True,  # so that its model returns what WPO needs; set per case below
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            **options,
        )


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def peer(request: pytest.FixtureRequest, causal_lm: Folder, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    folder, out = causal_lm(request.param), tmp_path_factory.mktemp("peft")
    method = make(folder)
    lora = method.policy.lora
    assert lora is not None
    noise = torch.randn(lora.num_parameters, generator=torch.Generator().manual_seed(1))
    adapter = lora.start(0) + 0.2 * noise
    lora.save([adapter], out, str(folder))
    config = peft.LoraConfig.from_pretrained(str(out))
    config.inference_mode = False
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    trainer = trainer_of(folder, out, model, peft_config=config)
    peft.set_peft_model_state_dict(trainer.model, peft.load_peft_weights(str(out)))
    ours = {known: batch_from(data_of(folder, out, known)) for known in (False, True)}
    assert isinstance(ours[False].chosen, Tokens)
    order = [ids[kept].tolist() for ids, kept, *_ in zip(*ours[False].chosen[:3], strict=True)]
    rows = sorted(trainer.train_dataset, key=lambda row: order.index(row["prompt_ids"] + row["chosen_ids"]))
    return Peer(folder, trainer, trainer.data_collator(rows), ours, adapter)


class Theirs(NamedTuple):
    loss: float
    metrics: dict[str, float]


def theirs(peer: Peer, method: LoRADPO) -> Theirs:
    """TRL's own loss with the options of a method; gradients are left on its model."""
    trainer, options = peer.trainer, method.options
    trainer.loss_types = list(options.loss_type)
    trainer.loss_weights = list(options.loss_weights or [1.0] * len(options.loss_type))
    for name in (
        "beta", "ld_alpha", "use_weighting", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef"
    ):  # fmt: skip
        setattr(trainer, name, getattr(options, name))
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    loss = trainer.compute_loss(trainer.model, dict(peer.batch))
    loss.backward()
    return Theirs(loss.item(), {name: value[0] for name, value in trainer._metrics["train"].items()})


def turned(tokens: Tokens, side: str) -> Tokens:
    """Padded on the right, as they are, or on the left."""
    if side == "right":
        return tokens
    order = torch.argsort(tokens.attention_mask.long(), dim=1, stable=True)
    ids, kept, completion = (value.gather(1, order) for value in tokens[:3])
    assert not kept[:, 0].all() and kept[:, -1].all()
    return Tokens(ids, kept, completion, tokens.ref_logps)


def batch_of(peer: Peer, side: str = "right", precomputed: bool = False) -> PreferenceBatch:
    batch = peer.ours[precomputed]
    assert isinstance(batch.chosen, Tokens) and isinstance(batch.rejected, Tokens)
    return batch._replace(chosen=turned(batch.chosen, side), rejected=turned(batch.rejected, side))


def gradients_are_equal(method: LoRADPO, peer: Peer) -> None:
    """Of every A and B; those of a method are in ``shared.grad``."""
    weights = dict(peer.trainer.model.named_parameters())
    assert method.policy.lora is not None and method.shared.grad is not None
    gradients = method.policy.lora.matrices(method.shared.grad[0])
    for index, place in enumerate(method.policy.lora.places):
        for letter, gradient in zip("AB", gradients[2 * index : 2 * index + 2], strict=True):
            value = weights[f"base_model.model.{place.name}.lora_{letter}.default.weight"].grad
            largest = value.abs().max().item()  # above 1 for ipo and sppo_hard, whose targets are 1 / (2 beta)
            torch.testing.assert_close(gradient, value, rtol=1e-5, atol=1e-5 * max(1.0, largest))
            assert largest > 1e-5


def test_our_loader_makes_the_batch_of_trls_collator(peer: Peer) -> None:
    """Token for token, and so the cached log-probabilities under the reference."""
    for precomputed in (False, True):
        batch = batch_of(peer, precomputed=precomputed)
        assert isinstance(batch.chosen, Tokens) and isinstance(batch.rejected, Tokens)
        together = Tokens.cat([batch.chosen, batch.rejected])
        kept = peer.batch["attention_mask"].bool()
        assert torch.equal(together.attention_mask, kept)
        assert torch.equal(together.input_ids[kept], peer.batch["input_ids"][kept])
        assert torch.equal(together.completion_mask, peer.batch["completion_mask"].bool())
        assert torch.equal(batch.weight, torch.ones(len(ROWS))) and not batch.tie.any()
        expected = torch.cat(peer.trainer.compute_ref_log_probs(peer.trainer.model, peer.batch))
        if precomputed:
            torch.testing.assert_close(together.ref_logps, expected, rtol=1e-5, atol=1e-5)
        else:
            assert together.ref_logps is None


@pytest.mark.parametrize("case", LOSSES)
def test_loss_metrics_and_gradients_are_trls(peer: Peer, case: str) -> None:
    """To 1e-5 in float32, padded on either side, with the reference read by the batch or before, prompts shared or not.

    Metrics are log-probabilities and rewards of both sides, margins, accuracies, logits, entropy and token counts.
    """
    expected: Theirs | None = None
    for share_prompts in (True, False):
        method = make(peer.folder, share_prompts=share_prompts, **LOSSES[case])
        with torch.no_grad():
            method.shared.copy_(peer.adapter)
        expected = expected or theirs(peer, method)
        assert abs(expected.metrics["rewards/margins"]) > 1e-2, "the adapter must do something"
        for side in ("right", "left"):
            for precomputed in (False, True):
                method.shared.grad, method.num_tokens = None, 0
                out = method.loss(batch_of(peer, side, precomputed))
                out["loss"].backward()  # type: ignore[no-untyped-call]
                found = {name: value.item() for name, value in method.logged(out).items() if name != "count"}
                assert found.pop("loss") == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)
                assert found == pytest.approx(expected.metrics, rel=1e-5, abs=1e-5)
                gradients_are_equal(method, peer)


def test_log_probabilities_and_rewards_of_each_response_are_trls(peer: Peer) -> None:
    """Of policy and reference, not only their means."""
    method = make(peer.folder, beta=0.3)
    with torch.no_grad():
        method.shared.copy_(peer.adapter)
        batch = {name: peer.batch[name] for name in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(peer.batch["completion_mask"] == 0, -100)
        logps = peer.trainer.model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1)
        reference = torch.cat(peer.trainer.compute_ref_log_probs(peer.trainer.model, peer.batch))
    assert (logps - reference).abs().min() > 1e-3
    for side in ("right", "left"):
        for precomputed in (False, True):
            ours = batch_of(peer, side, precomputed)
            assert isinstance(ours.chosen, Tokens) and isinstance(ours.rejected, Tokens)
            tokens = Tokens.cat([ours.chosen, ours.rejected])
            with torch.no_grad():
                torch.testing.assert_close(method.logps(tokens, method.shared).total, logps, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(method.logps(tokens).total, reference, rtol=1e-5, atol=1e-5)
            rewards = method.score(tokens, method.population_state(tokens.num_rows))
            torch.testing.assert_close(rewards, 0.3 * (logps - reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reference_logps", [False, True])
def test_the_training_step_of_a_fit_is_trls(peer: Peer, reference_logps: bool, tmp_path: Path) -> None:
    """Through Lightning and the data module: what is logged, and the gradient that reaches the optimizer."""
    method = make(peer.folder, beta=0.2, label_smoothing=0.1, loss_type=["robust", "sft"], loss_weights=[1.0, 0.5])
    with torch.no_grad():
        method.shared.copy_(peer.adapter)
    expected = theirs(peer, method)

    class Check(L.Callback):
        checked = False

        def on_before_optimizer_step(
            self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
        ) -> None:
            gradients_are_equal(method, peer)
            self.checked = True

    check = Check()
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[check], log_every_n_steps=1)
    trainer.fit(method, datamodule=data_of(peer.folder, tmp_path, reference_logps))
    logged = {name.removeprefix("train/"): value.item() for name, value in trainer.callback_metrics.items()}
    assert logged.pop("loss") == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)
    assert logged == pytest.approx(expected.metrics, rel=1e-5, abs=1e-5)
    assert check.checked


def test_without_adapter_the_policy_is_the_base_bit_for_bit(peer: Peer) -> None:
    """So a fresh method starts at ln 2, whatever the batch, and the reference is the model as transformers loads it."""
    base = transformers.AutoModelForCausalLM.from_pretrained(peer.folder)
    batch = batch_of(peer)
    assert isinstance(batch.chosen, Tokens)
    tokens = batch.chosen
    method = make(peer.folder)
    with torch.no_grad():
        method.shared.copy_(peer.adapter)
        expected = base(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask.long()).logits
        found = method.policy.logits(method.policy.hidden(tokens))
        out = make(peer.folder).loss(batch)
    assert torch.equal(found[tokens.attention_mask], expected[tokens.attention_mask])
    assert out["loss"].item() == pytest.approx(0.6931472)
    assert out["rewards/chosen"].item() == out["rewards/margins"].item() == 0.0


def test_full_fine_tuning_is_trls_with_a_copy_as_reference(peer: Peer, tmp_path: Path) -> None:
    method = make(peer.folder, adapter="full", beta=0.3)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in method.policy.network.parameters():
            value.add_(0.03 * torch.randn_like(value))
    model = copy.deepcopy(method.policy.network)
    reference = transformers.AutoModelForCausalLM.from_pretrained(peer.folder)
    trainer = trainer_of(peer.folder, tmp_path, model, ref_model=reference)
    expected = theirs(peer._replace(trainer=trainer), method)
    out = method.loss(batch_of(peer))
    out["loss"].backward()  # type: ignore[no-untyped-call]
    found = {name: value.item() for name, value in out.items()}
    assert found.pop("loss") == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)
    assert found == pytest.approx(expected.metrics, rel=1e-5, abs=1e-5)
    ours = dict(method.policy.network.named_parameters())
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(ours[name].grad, value.grad, rtol=1e-5, atol=1e-5)
