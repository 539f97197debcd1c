"""LoRADPO against TRL's DPOTrainer with the same PEFT adapter over the same model, and its other modes against it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from plm.backbones import CausalLM
from plm.methods.lora_dpo import LoRADPO
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
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "two losses": {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.3]},
    "ld": {"ld_alpha": 0.4},
    "wpo": {"use_weighting": True, "beta": 0.5},
}


class Peer(NamedTuple):
    """TRL's trainer with a PEFT adapter that is none of ours, and the batch it made."""

    folder: Path
    """Of the base model."""
    trainer: Any
    batch: dict[str, Tensor]
    adapter: Tensor
    """``(P,)`` the same adapter as one of our rows."""


def make(folder: Path, **options: Any) -> LoRADPO:
    method = LoRADPO(2, 16, CausalLM(str(folder)).spec(), **{"rank": 4, "alpha": 6.0, **options})
    method.configure_model()
    return method


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
    return Peer(folder, trainer, trainer.data_collator(list(trainer.train_dataset)), adapter)


class Theirs(NamedTuple):
    loss: float
    metrics: dict[str, float]
    reference: tuple[Tensor, Tensor]


def theirs(peer: Peer, method: LoRADPO) -> Theirs:
    """TRL's own loss with the options of a method; gradients are left on its model."""
    trainer, options = peer.trainer, method.options
    trainer.loss_types = list(options.loss_type)
    trainer.loss_weights = list(options.loss_weights or [1.0] * len(options.loss_type))
    trainer.beta, trainer.ld_alpha, trainer.use_weighting = options.beta, options.ld_alpha, options.use_weighting
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    loss = trainer.compute_loss(trainer.model, dict(peer.batch))
    loss.backward()
    metrics = {name: value[0] for name, value in trainer._metrics["train"].items()}
    return Theirs(loss.item(), metrics, trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, peer.batch))


def batch_of(peer: Peer, side: str = "right", reference: tuple[Tensor, Tensor] | None = None) -> PreferenceBatch:
    """TRL's batch as ours, padded right as it is, or left."""
    parts = []
    for half in range(2):
        ids, kept, completion = (
            peer.batch[name].chunk(2)[half] for name in ("input_ids", "attention_mask", "completion_mask")
        )
        if side == "left":
            order = torch.argsort(kept, dim=1, stable=True)
            ids, kept, completion = (value.gather(1, order) for value in (ids, kept, completion))
        known = None if reference is None else reference[half]
        parts.append(Tokens(ids, kept.bool(), completion.bool(), known))
    size = len(ROWS)
    none = torch.zeros(size, dtype=torch.bool)
    return PreferenceBatch(parts[0], parts[1], torch.zeros(size, dtype=torch.long), torch.ones(size), none)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("case", LOSSES)
def test_loss_metrics_and_gradients_are_trls(peer: Peer, case: str, share_prompts: bool) -> None:
    """To 1e-5 in float32, padded on either side, with the reference read by the batch or before."""
    method = make(peer.folder, share_prompts=share_prompts, **LOSSES[case])
    with torch.no_grad():
        method.shared.copy_(peer.adapter)
    expected = theirs(peer, method)
    weights = dict(peer.trainer.model.named_parameters())
    assert method.policy.lora is not None
    assert abs(expected.metrics["rewards/margins"]) > 1e-2, "the adapter must do something"
    for side in ("right", "left"):
        for reference in (None, expected.reference):
            method.shared.grad, method.num_tokens = None, 0
            out = method.loss(batch_of(peer, side, reference))
            out["loss"].backward()  # type: ignore[no-untyped-call]
            found = {name: value.item() for name, value in out.items()}
            assert found.pop("loss") == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)
            assert found == pytest.approx(expected.metrics, rel=1e-5, abs=1e-5)
            assert method.shared.grad is not None
            gradients = method.policy.lora.matrices(method.shared.grad[0])
            for index, place in enumerate(method.policy.lora.places):
                for letter, gradient in zip("AB", gradients[2 * index : 2 * index + 2], strict=True):
                    value = weights[f"base_model.model.{place.name}.lora_{letter}.default.weight"].grad
                    torch.testing.assert_close(gradient, value, rtol=1e-5, atol=1e-5)
                    assert value.abs().max() > 1e-4


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
