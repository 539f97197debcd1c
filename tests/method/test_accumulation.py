"""A step that is spread over batches is the step of one batch, however many terms their losses are the mean of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plm.backbones import CausalLM
from plm.method.policy import PolicyMethod
from plm.methods.clap import CLaP
from plm.methods.lora_dpo import LoRADPO
from plm.methods.sft import SFT
from plm.testing import quiet_trainer
from plm.types import PreferenceBatch, Tokens
from tests.loaders import Loader

Folder = Callable[[str], Path]
LONG = " and then some more"
PAIRS = [
    ("hello", " a", " no" + LONG),
    ("hello", " my friend" + LONG, " b"),
    ("what is it?", " x" + LONG + LONG, " y"),
    ("what is it?", " a cat", " nothing" + LONG),
    ("count", " 1", " 2"),
    ("why", " so", " because" + LONG),
    ("why", " who knows" + LONG, " d"),
]
SPLITS: dict[str, tuple[list[list[int]], int]] = {
    "one batch": ([[0, 1, 2, 3, 4, 5, 6]], 1),
    "two": ([[0, 1, 2, 3, 4], [5, 6]], 2),
    "four": ([[4], [0, 1], [5, 6], [2, 3]], 4),
    "a last step of three": ([[4], [0, 1, 5, 6], [2, 3]], 4),
    "a last step of one": ([[0, 1, 2, 3, 4, 5, 6]], 4),
}
"""Rows of every batch, prompts in one piece, and ``trainer.accumulate_grad_batches``."""


def lora(folder: Path, **options: Any) -> LoRADPO:
    return LoRADPO(num_users=2, feature_dim=16, backbone=CausalLM(str(folder)).spec(), rank=2, **options)


METHODS: dict[str, Callable[[Path], PolicyMethod]] = {
    "sft": lambda folder: SFT(num_users=2, feature_dim=16, backbone=CausalLM(str(folder)).spec()),
    "dpo": lora,
    "dpo_basis": lambda folder: lora(folder, mode="basis", num_bases=2),
    "dpo_full": lambda folder: lora(folder, adapter="full", loss_type=["ipo", "robust"], label_smoothing=0.1),
    "dpo_sft": lambda folder: lora(folder, loss_type=["sft"]),
    # draws would differ from batch to batch
    "clap": lambda folder: CLaP(
        2,
        16,
        CausalLM(str(folder)).spec(),
        latent_dim=4,
        encoder_layers=1,
        deterministic=True,
        kl="ordinary",
        num_negatives=None,
    ),
}


def batch_of(method: PolicyMethod, rows: list[int]) -> PreferenceBatch:
    pairs, index = [PAIRS[row] for row in rows], torch.tensor(rows)
    sides = [method.causal_lm.represent([pair[0] for pair in pairs], [pair[side] for pair in pairs]) for side in (1, 2)]
    assert all(isinstance(side, Tokens) for side in sides)
    return PreferenceBatch(sides[0], sides[1], index % 2, 0.5 + index / 7, (index == 2) | (index == 4))


def gradients(method: PolicyMethod, name: str, folder: Path) -> list[Tensor]:
    """What the optimizer is given in the only step of a fit."""
    rows, accumulated = SPLITS[name]
    steps: list[list[Tensor]] = []

    def keep(*_: Any, **options: Any) -> None:
        steps.append([p.grad.to_dense().clone() for p in method.parameters() if p.grad is not None])

    method.configure_gradient_clipping = keep  # type: ignore[method-assign, assignment]  # called when all is summed
    trainer = quiet_trainer(folder, max_epochs=1, accumulate_grad_batches=accumulated)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(method, train_dataloaders=Loader([batch_of(method, part) for part in rows]))
    (step,) = steps
    return step


@pytest.mark.parametrize("case", METHODS)
def test_accumulated_gradients_are_those_of_one_batch(case: str, causal_lm: Folder, tmp_path: Path) -> None:
    found: dict[str, Tensor] = {}
    for name in SPLITS:
        torch.manual_seed(0)
        method = METHODS[case](causal_lm("gpt2"))
        method.configure_model()
        found[name] = torch.cat([gradient.flatten() for gradient in gradients(method, name, tmp_path)])
    whole = found.pop("one batch")
    assert whole.norm() > 1e-3
    for name, gradient in found.items():
        assert (gradient - whole).norm() < 1e-5 * whole.norm(), name


class Interrupted(Exception):
    """What stops a fit between two batches of one step."""


def test_a_fit_after_one_that_was_cut_off_weighs_its_own_batches(causal_lm: Folder, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise Interrupted

    torch.manual_seed(0)
    method = METHODS["sft"](causal_lm("gpt2"))
    method.configure_model()
    whole = torch.cat([gradient.flatten() for gradient in gradients(method, "one batch", tmp_path)])
    torch.manual_seed(0)
    method = METHODS["sft"](causal_lm("gpt2"))
    method.configure_model()
    original, method.on_train_batch_end = method.on_train_batch_end, interrupt  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        gradients(method, "two", tmp_path)
    method.on_train_batch_end = original  # type: ignore[method-assign]
    again = torch.cat([gradient.flatten() for gradient in gradients(method, "two", tmp_path)])
    assert (again - whole).norm() < 1e-5 * whole.norm()


def test_a_step_of_no_weight_is_none(causal_lm: Folder, tmp_path: Path) -> None:
    method = METHODS["sft"](causal_lm("gpt2"))
    method.configure_model()
    batches = [batch_of(method, rows)._replace(weight=torch.zeros(2)) for rows in ([0, 1], [2, 3])]
    before = [value.detach().clone() for value in method.parameters()]
    method.weight_decay = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2)
        trainer.fit(method, train_dataloaders=Loader(batches))
    assert trainer.global_step == 1
    assert all(torch.equal(one, two) for one, two in zip(before, method.parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [{"loss_type": ["aot"]}, {"loss_type": ["sigmoid", "sft"]}, {"loss_type": ["sft"], "mode": "basis"}],
    ids=["sorted", "two means", "by user"],
)
def test_losses_of_all_pairs_of_a_step_refuse_to_be_spread(
    options: dict[str, Any], causal_lm: Folder, tmp_path: Path
) -> None:
    method = lora(causal_lm("gpt2"), **options)
    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches: expected 1 with model.loss_type .* got 2: aot"):
        trainer.fit(method, train_dataloaders=Loader([]))
