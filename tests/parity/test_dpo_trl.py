"""Losses, gradients, log-probabilities and metrics against TRL's DPOTrainer on one batch of tiny random models."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor, nn

from plm.backbones import TokenFacts, token_facts
from plm.functional import SequenceLogps
from plm.methods.lora_dpo.losses import preference_losses
from plm.methods.lora_dpo.metrics import reward_metrics, token_metrics
from plm.methods.lora_dpo.options import REVERSE_KL_ONLY, Divergence, LossOptions, LossType
from plm.methods.lora_dpo.pairs import PairLogps, pair_totals, wpo_weights
from plm.types import Tokens
from tests.logps import sequence_logps

trl = pytest.importorskip("trl", minversion="1.16", reason="needs trl >= 1.16 of the test extra (Python >= 3.11)")
datasets = pytest.importorskip("datasets", reason="comes with trl")
tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

WORDS = [f"w{i}" for i in range(97)]
ROWS = [  # prompt, chosen, rejected: the longer response is now one, now the other
    ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9"),
    ("w10", "w11 w12 w13 w14 w15 w16", "w17"),
    ("w18 w19 w20 w21 w22", "w23", "w24 w25"),
    ("w26 w27", "w28 w29 w30", "w31 w32 w33"),
    ("w34 w35 w36 w37", "w38 w39 w40 w41", "w42 w43 w51 w52"),
    ("w44", "w46 w47", "w45 w53"),
]


class Peer(NamedTuple):
    """Our copies of two models, and TRL's trainer with its own."""

    policy: nn.Module
    reference: nn.Module
    trainer: Any
    batch: dict[str, Tensor]


def build(kind: str) -> nn.Module:
    """A random model whose weights are large enough that its next-token distributions are not flat."""
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS) + 2, "initializer_range": 0.2, "eos_token_id": 1, "bos_token_id": 1}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **size)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        **size,
    )
    return transformers.LlamaForCausalLM(config).eval()


def moved(model: nn.Module) -> nn.Module:
    """A copy whose responses differ from the model's by a nat or so."""
    copied = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in copied.parameters():
            value.add_(0.06 * torch.randn_like(value))
    return copied


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    policy = build(request.param)
    reference = moved(policy)
    vocabulary = {word: row for row, word in enumerate(["[pad]", "[eos]", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[pad]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", eos_token="[eos]")
    rows = [
        {"prompt": prompt, "chosen": f" {chosen} [eos]", "rejected": f" {rejected} [eos]"}
        for prompt, chosen, rejected in ROWS
    ]
    folder: Path = tmp_path_factory.mktemp("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.DPOTrainer(
            model=copy.deepcopy(policy),
            ref_model=copy.deepcopy(reference),
            args=trl.DPOConfig(
                output_dir=str(folder),
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                disable_tqdm=True,
                use_weighting=True,  # so that its model returns what WPO needs; set per case below
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["completion_mask"].sum(-1).tolist() == [3, 7, 2, 4, 5, 3, 5, 2, 3, 4, 5, 3]
    return Peer(policy, reference, trainer, batch)


class Theirs(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def theirs(peer: Peer, options: LossOptions, precomputed: bool = False) -> Theirs:
    """TRL's own `_compute_loss`; its options live on the trainer."""
    trainer = peer.trainer
    trainer.loss_types = list(options.loss_type)
    trainer.loss_weights = list(options.loss_weights or [1.0] * len(options.loss_type))
    for name in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha"):
        setattr(trainer, name, getattr(options, name))
    trainer.use_weighting = options.use_weighting
    trainer.args.discopop_tau = options.discopop_tau
    trainer.precompute_ref_logps = precomputed
    batch = dict(peer.batch)
    if precomputed:
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in trainer.model.named_parameters()}
    return Theirs(loss.item(), gradients, {name: value[0] for name, value in trainer._metrics["train"].items()})


def tokens_of(batch: dict[str, Tensor], side: str) -> tuple[Tokens, Tokens]:
    """TRL's batch as ours, chosen and rejected, padded right as it is, or left."""
    parts = []
    for half in range(2):
        ids, kept, completion = (
            batch[name].chunk(2)[half] for name in ("input_ids", "attention_mask", "completion_mask")
        )
        if side == "left":
            order = torch.argsort(kept, dim=1, stable=True)
            ids, kept, completion = (value.gather(1, order) for value in (ids, kept, completion))
        parts.append(Tokens(ids, kept.bool(), completion.bool()))
    return parts[0], parts[1]


def read(model: nn.Module, tokens: Tokens) -> tuple[SequenceLogps, TokenFacts]:
    """One forward pass; positions count real tokens, on whichever side the padding is."""
    position = (tokens.attention_mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(tokens.input_ids, attention_mask=tokens.attention_mask.long(), position_ids=position).logits
    is_response = tokens.completion_mask[:, 1:]
    flat, token = logits[:, :-1][is_response], tokens.input_ids[:, 1:][is_response]
    row = is_response.nonzero()[:, 0]
    return sequence_logps(flat, token, row, tokens.num_rows), token_facts(flat, token)


class Ours(NamedTuple):
    losses: Tensor
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def ours(peer: Peer, options: LossOptions, side: str) -> Ours:
    chosen_tokens, rejected_tokens = tokens_of(peer.batch, side)
    (chosen, chosen_facts), (rejected, rejected_facts) = (
        read(peer.policy, tokens) for tokens in (chosen_tokens, rejected_tokens)
    )
    with torch.no_grad():
        reference = [read(peer.reference, tokens)[0] for tokens in (chosen_tokens, rejected_tokens)]
    weighed = (chosen, rejected, chosen_facts.log_sum_sq, rejected_facts.log_sum_sq)
    pairs = PairLogps(
        *pair_totals(chosen, rejected, options.ld_alpha),
        *pair_totals(reference[0], reference[1], options.ld_alpha),
        chosen.length,
        rejected.length,
        chosen_nll=-chosen.total,
        wpo_weight=wpo_weights(*weighed) if options.use_weighting else None,
    )
    losses = preference_losses(pairs, options)
    peer.policy.zero_grad()
    losses.mean().backward()
    num_tokens = chosen_tokens.attention_mask.sum() + rejected_tokens.attention_mask.sum()
    logged = reward_metrics(pairs, options.beta) | token_metrics(chosen_facts, rejected_facts, num_tokens)
    gradients = {name: value.grad.clone() for name, value in peer.policy.named_parameters() if value.grad is not None}
    return Ours(losses.detach(), gradients, {name: value.item() for name, value in logged.items()})


SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.1, "aot_unpaired": 0.1}
"""Losses of TRL that read it."""

BY_DIVERGENCE = [name for name in get_args(LossType) if name not in REVERSE_KL_ONLY | {"conservative", "sft"}]


def one(name: LossType, **more: Any) -> LossOptions:
    return LossOptions((name,), label_smoothing=SMOOTHING.get(name, 0.0), **more)


CASES = {name: one(name) for name in get_args(LossType) if name != "conservative"}
CASES |= {
    f"{name}-{divergence}": one(name, f_divergence_type=divergence, beta=0.2)
    for name in BY_DIVERGENCE
    for divergence in get_args(Divergence)
    if divergence != "reverse_kl"
}
CASES |= {
    "alpha-0.3": one("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
    "alpha-1": one("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
    "beta": one("sigmoid", beta=0.7),
    "hinge-clipped": one("hinge", beta=2.0),
    "tau": one("discopop", discopop_tau=0.5),
    "aot-unsmoothed": LossOptions(("aot",)),
    "robust-unsmoothed": LossOptions(("robust",)),
    "several": LossOptions(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)),
    "several-unweighted": LossOptions(("ipo", "apo_zero", "sigmoid_norm")),
    "ld": one("sigmoid", ld_alpha=0.4),
    "ld-ipo": one("ipo", ld_alpha=0.0),
    "ld-sft": LossOptions(("hinge", "sft"), ld_alpha=0.4),
    "ld-divergence": one("sigmoid", ld_alpha=0.6, f_divergence_type="js_divergence"),
    "wpo": one("sigmoid", use_weighting=True),
    "wpo-several": LossOptions(("ipo", "nca_pair"), (0.3, 2.0), use_weighting=True),
    "wpo-ld": one("apo_down", use_weighting=True, ld_alpha=0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_are_trls(peer: Peer, case: str) -> None:
    """To 1e-5 in float32, padded right as TRL does and left, its reference computed with the batch and before."""
    options = CASES[case]
    assert options.problems() == []
    expected = theirs(peer, options)
    before = theirs(peer, options, precomputed=True)
    assert before.loss == pytest.approx(expected.loss, rel=1e-6)
    assert max(value.abs().max() for value in expected.gradients.values()) > 1e-3
    for side in ("right", "left"):
        found = ours(peer, options, side)
        assert found.losses.shape == (len(ROWS),)
        assert found.losses.mean().item() == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-5, abs=1e-5)
        assert found.gradients.keys() == expected.gradients.keys()
        for name, value in found.gradients.items():
            torch.testing.assert_close(value, expected.gradients[name], rtol=1e-5, atol=1e-5)


def test_log_probabilities_of_each_response_are_trls(peer: Peer) -> None:
    """Of policy and reference, not only their means."""
    peer.trainer.ld_alpha = None
    for model, their_model in ((peer.policy, peer.trainer.model), (peer.reference, peer.trainer.ref_model)):
        expected = torch.stack(peer.trainer.compute_ref_log_probs(their_model, peer.batch))
        for side in ("right", "left"):
            with torch.no_grad():
                found = torch.stack([read(model, tokens)[0].total for tokens in tokens_of(peer.batch, side)])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_batch_tells_losses_apart(peer: Peer) -> None:
    """Else parity would say little: sorting changes something, and so do lengths, tails and WPO's weights."""
    names = ("sigmoid", "sigmoid_norm", "hinge", "aot-unsmoothed", "aot_unpaired", "bco_pair", "apo_zero", "ld", "wpo")
    values = sorted(ours(peer, CASES[name], "right").losses.mean().item() for name in names)
    assert all(upper - lower > 1e-4 for lower, upper in pairwise(values))


def test_the_cases_cover_what_trl_offers() -> None:
    """A loss or divergence that TRL adds, or drops, is noticed here."""
    fields = trl.DPOConfig.__dataclass_fields__
    quoted = fields["loss_type"].metadata["help"].split("If multiple")[0].split("`'")[1:]
    assert {part.split("'`")[0] for part in quoted} == set(get_args(LossType)) - {"conservative"}
    listed = fields["f_divergence_type"].metadata["help"].split("Possible values are: ")[1].split(". ")[0]
    assert all(f"`{name}`" in listed for name in get_args(Divergence)) and listed.count("`") == 8
