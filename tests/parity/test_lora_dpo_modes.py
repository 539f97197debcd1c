"""A basis of policies, prefixes and exports of LoRADPO: against transcriptions in float64, planted truth and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plm.backbones import CausalLM, Completion, LoRA, PrefixShape, completion_tokens
from plm.methods.lora_dpo import LoRADPO
from plm.types import Context, PreferenceBatch, Tokens, UserState

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Folder = Callable[[str], Path]
KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama"])
PAIRS = [
    ("what is this?", " a cat", " nothing at all"),
    ("hello", " to you", " no"),
    ("count", " one", " two three"),
    ("why", " so", " because"),
]


def make(folder: Path, num_users: int = 3, **options: Any) -> LoRADPO:
    """A method whose adapters, bases, weights or prefixes are far from where they start."""
    method = LoRADPO(
        num_users=num_users,
        feature_dim=16,
        backbone=CausalLM(str(folder)).spec(),
        **{"rank": 2, "alpha": 5.0, **options},
    )
    method.configure_model()
    torch.manual_seed(3)
    with torch.no_grad():
        for name in ("shared", "adapters", "bases", "weight_logits"):
            if (value := getattr(method, name, None)) is not None:
                value.add_((1.0 if name == "weight_logits" else 0.2) * torch.randn_like(value))
    return method


def batch_of(method: LoRADPO) -> PreferenceBatch:
    chosen = method.causal_lm.represent([prompt for prompt, _, _ in PAIRS], [chosen for _, chosen, _ in PAIRS])
    rejected = method.causal_lm.represent([prompt for prompt, _, _ in PAIRS], [rejected for _, _, rejected in PAIRS])
    tie = torch.tensor([False, False, True, False])
    return PreferenceBatch(chosen, rejected, torch.tensor([2, 0, 2, 1]), torch.tensor([0.5, 2.0, 0.7, 0.8]), tie)


def logps(network: Any, weights: dict[str, Tensor], tokens: Tokens) -> Tensor:
    """Of each response, one text at a time, from the whole network's logits."""
    totals = []
    for ids, kept, completion in zip(*tokens[:3], strict=True):
        text, response = ids[kept][None], completion[kept]
        logits = torch.func.functional_call(network, weights, (text,)).logits[0].log_softmax(-1)
        place = response.nonzero()[:, 0]
        totals.append(logits[place - 1, text[0, place]].sum())
    return torch.stack(totals)


def adapted_weights(lora: LoRA, network: Any, adapter: Tensor) -> dict[str, Tensor]:
    """The network's weights with ``scale * B A`` added."""
    weights = {name: value.detach() for name, value in network.named_parameters()}
    for place in lora.places:
        size = lora.rank * place.width_in
        a = adapter[place.start : place.start + size].view(lora.rank, place.width_in)
        b = adapter[place.start + size :][: lora.rank * place.width_out].view(place.width_out, lora.rank)
        change = lora.scale * b @ a
        weights[f"{place.name}.weight"] = weights[f"{place.name}.weight"] + (change.T if place.is_conv else change)
    return weights


# ---------------------------------------------------------------------- basis
@KINDS
@pytest.mark.parametrize("share_prompts", [True, False])
def test_basis_loss_is_the_logistic_loss_of_mixed_log_ratios(causal_lm: Folder, kind: str, share_prompts: bool) -> None:
    """Mean over pairs of weight times -log sigmoid of beta sum_k w_k (log-ratios), in float64; gradients, too."""
    method = make(causal_lm(kind), mode="basis", num_bases=3, beta=0.4, share_prompts=share_prompts).double()
    batch = batch_of(method)
    out = method.loss(batch._replace(weight=batch.weight.double()))
    out["loss"].backward()  # type: ignore[no-untyped-call]

    network = transformers.AutoModelForCausalLM.from_pretrained(causal_lm(kind)).double()
    bases = method.bases.detach().clone().requires_grad_()
    logits = method.weight_logits.detach().clone().requires_grad_()
    plain = {name: value.detach() for name, value in network.named_parameters()}
    assert method.policy.lora is not None
    margins = []
    for base in [None, *bases]:
        weights = plain if base is None else adapted_weights(method.policy.lora, network, base)
        margins.append(logps(network, weights, batch.chosen) - logps(network, weights, batch.rejected))
    users = logits[batch.user_index].softmax(-1)
    margin = 0.4 * (users * (torch.stack(margins[1:], 1) - margins[0][:, None])).sum(1)
    losses = torch.where(batch.tie, (F.softplus(-margin) + F.softplus(margin)) / 2, F.softplus(-margin))
    expected = (batch.weight.double() * losses).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-8)
    assert margin.detach().abs().max() > 0.1
    torch.testing.assert_close(method.bases.grad, bases.grad, rtol=1e-4, atol=1e-7)  # Llama norms in float32
    torch.testing.assert_close(method.weight_logits.grad.to_dense(), logits.grad, rtol=1e-4, atol=1e-7)


def test_a_basis_of_one_is_the_shared_adapter(causal_lm: Folder) -> None:
    shared, basis = make(causal_lm("gpt2")), make(causal_lm("gpt2"), mode="basis", num_bases=1)
    with torch.no_grad():
        basis.bases.copy_(shared.shared)
    batch = batch_of(shared)
    losses = [method.loss(batch)["loss"] for method in (shared, basis)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(basis.bases.grad, shared.shared.grad, rtol=1e-4, atol=1e-6)
    assert basis.weight_logits.grad.to_dense().abs().max() < 1e-6, "one weight has nowhere to go"


def test_adapting_recovers_planted_weights(causal_lm: Folder) -> None:
    """Users who answer by the mixture of the bases' rewards; the more pairs, the closer."""
    method = make(causal_lm("gpt2"), mode="basis", num_bases=3, beta=2.0)
    truth = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0], [0.1, 0.6, 0.3]])
    random = torch.Generator().manual_seed(0)
    num_pairs = 500
    ids = torch.randint(5, 95, (2, 3 * num_pairs, 7), generator=random)
    ids[1, :, :2] = ids[0, :, :2]  # the same prompt
    attended = torch.ones(3 * num_pairs, 7, dtype=torch.bool)
    response = attended & (torch.arange(7) >= 2)
    sides = [Tokens(ids[half], attended, response) for half in range(2)]
    nobody = torch.zeros(3 * num_pairs, dtype=torch.long)
    one_hot = torch.eye(3)
    rewards = [
        torch.stack([method.score(side, UserState({"weights": w.expand(len(nobody), 3)}, nobody)) for w in one_hot], 1)
        for side in sides
    ]
    margin = ((rewards[0] - rewards[1]).view(3, num_pairs, 3) * truth[:, None]).sum(-1)
    assert margin.std() > 1.0
    first = torch.rand(3, num_pairs, generator=random) < margin.sigmoid()

    def ordered(swap: Tensor) -> Tokens:
        def pick(one: Tensor, two: Tensor) -> Tensor:
            return torch.where(swap.view(-1, 1), two, one).view(3, num_pairs, 7)

        return Tokens(*(pick(one, two) for one, two in zip(sides[0][:3], sides[1][:3], strict=True)))

    errors = []
    for shots in (20, num_pairs):
        mask = torch.arange(num_pairs).expand(3, -1) < shots
        context = Context(ordered(~first), ordered(first), mask, mask.float())
        weights = method.adapt(context).tensors["weights"]
        torch.testing.assert_close(weights.sum(1), torch.ones(3))
        errors.append((weights - truth).abs().max())
    assert errors[1] < 0.12 and errors[1] < errors[0]


def logits_of(method: LoRADPO, users: UserState, prompts: list[str]) -> Tensor:
    """Of the tokens after the prompts and after one more token, as text is written."""
    read = [Completion(method.causal_lm.prompt_tokens(prompt), []) for prompt in prompts]
    writing = method.writing(users, prompts)
    first = writing.start(completion_tokens(read, left=True))
    writing.take(torch.arange(len(prompts)))
    return torch.stack([first, writing.step(torch.full((len(prompts),), 70))])


def test_a_mixture_with_all_weight_on_one_policy_writes_as_it_does(causal_lm: Folder) -> None:
    """And any other as the normalised geometric mean of all."""
    method = make(causal_lm("llama"), mode="basis", num_bases=3)
    prompts = [prompt for prompt, _, _ in PAIRS[:3]]
    count = torch.zeros(3, dtype=torch.long)
    mixed = logits_of(method, UserState({"weights": torch.eye(3)}, count), prompts).log_softmax(-1)
    parts = []
    for base in range(3):
        writing = method.policy.write(method.bases[base][None].detach())
        read = [Completion(method.causal_lm.prompt_tokens(prompt), []) for prompt in prompts]
        first = writing.start(completion_tokens(read, left=True))
        parts.append(torch.stack([first, writing.step(torch.full((3,), 70))]).log_softmax(-1))
        torch.testing.assert_close(mixed[:, base], parts[-1][:, base], rtol=1e-5, atol=1e-5)
    weights = torch.tensor([0.2, 0.5, 0.3])
    found = logits_of(method, UserState({"weights": weights.expand(3, 3)}, count), prompts).log_softmax(-1)
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(found, expected.log_softmax(-1), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- PEFT
EXPORTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "per_user": {"mode": "per_user"},
    "shared_and_user": {"mode": "shared_and_user"},
    "basis, merged": {"mode": "basis", "num_bases": 3, "decoding": "merged"},
    "prefix": {"adapter": "prefix", "num_virtual_tokens": 3},
    "prefix per_user": {"adapter": "prefix", "mode": "per_user", "num_virtual_tokens": 3},
    "full": {"adapter": "full"},
}


@KINDS
@pytest.mark.parametrize("case", EXPORTS)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT hands on a prefix so
def test_an_exported_user_writes_the_same_with_peft_alone(
    causal_lm: Folder, kind: str, case: str, tmp_path: Path
) -> None:
    """The logits of the base model with the folder's adapter are those we write with, for every user."""
    method = make(causal_lm(kind), **EXPORTS[case])
    if case == "full":
        with torch.no_grad():
            method.policy.network.lm_head.weight += 0.1
    prompts = ["what is this?", "hello", "hello"]
    states = method.user_states(torch.arange(3))
    ours = logits_of(method, states, prompts)
    base = transformers.AutoModelForCausalLM.from_pretrained(causal_lm(kind)).eval()
    for row, prompt in enumerate(prompts):
        folder = tmp_path / str(row)
        method.export(folder, states.take(torch.tensor([row])))
        if case == "full":
            model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        else:
            model = peft.PeftModel.from_pretrained(base, folder).eval()
        ids = torch.tensor([[*method.causal_lm.prompt_tokens(prompt), 70]])
        with torch.no_grad():
            theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -2:]
        torch.testing.assert_close(ours[:, row], theirs, rtol=1e-5, atol=1e-5)
        if case not in ("full", "prefix", "prefix per_user"):
            base = model.unload()
    if method.mode != "shared":
        assert (ours[:, 1] - ours[:, 2]).abs().max() > 1e-2, "two users on one prompt write differently"


@KINDS
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT hands on a prefix so
def test_training_reads_a_prefix_as_peft_does(causal_lm: Folder, kind: str, tmp_path: Path) -> None:
    """P-Tuning v2: the loss from PEFT's logits over the exported folder, and its gradient in the keys and values."""
    method = make(causal_lm(kind), adapter="prefix", num_virtual_tokens=3, beta=0.5)
    batch = batch_of(method)
    out = method.loss(batch)
    out["loss"].backward()  # type: ignore[no-untyped-call]
    method.export(tmp_path, method.population_state(1))
    network = transformers.AutoModelForCausalLM.from_pretrained(causal_lm(kind)).eval()
    plain = [logps(network, {}, side).detach() for side in (batch.chosen, batch.rejected)]
    model = peft.PeftModel.from_pretrained(network, tmp_path).eval()
    model.prompt_encoder.requires_grad_(True)
    totals = [peft_logps(model, side) for side in (batch.chosen, batch.rejected)]
    margin = 0.5 * (totals[0] - plain[0] - totals[1] + plain[1])
    losses = torch.where(batch.tie, (F.softplus(-margin) + F.softplus(margin)) / 2, F.softplus(-margin))
    expected = (batch.weight * losses).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert out["loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert out["rewards/chosen"].item() == pytest.approx(0.5 * (totals[0] - plain[0]).mean().item(), abs=1e-5)
    [theirs] = [value.grad for value in model.parameters() if value.grad is not None]
    assert isinstance(method.shape, PrefixShape) and method.shared.grad is not None
    layers, _, heads, count, width = method.shape.shape
    ours = method.shared.grad.view(layers, 2, heads, count, width).permute(3, 0, 1, 2, 4).reshape(count, -1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert theirs.abs().max() > 1e-3


def peft_logps(model: Any, tokens: Tokens) -> Tensor:
    totals = []
    for ids, kept, completion in zip(*tokens[:3], strict=True):
        text, place = ids[kept][None], completion[kept].nonzero()[:, 0]
        logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0].log_softmax(-1)
        totals.append(logits[place - 1, text[0, place]].sum())
    return torch.stack(totals)
