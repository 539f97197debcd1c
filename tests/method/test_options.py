"""Options of methods that write: declared once, listed whole, and each of them used by a line of the documentation."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

import plm
from plm.backbones import CausalLM
from plm.cli import main
from plm.method import PersonalizationMethod, constructor_arguments
from plm.method.policy import PolicyMethod
from plm.methods.clap import CLaP
from plm.methods.lora_dpo import LoRADPO
from plm.methods.lora_dpo.options import Divergence, LossType
from plm.methods.lora_dpo.tables import Adapter, Decoding, Mode
from plm.methods.pal.live import LivePAL
from plm.methods.sft import SFT
from plm.types import PreferenceBatch

Folder = Callable[[str], Path]
LINKED = {"num_users", "feature_dim", "backbone"}
"""Options that the data give."""
PAGE = (Path(plm.__file__).parents[1] / "docs/lora_dpo.md").read_text(encoding="utf-8")
LINES = re.findall(r"`(--model\.init_args\.[^`]+)`", PAGE)


def options_of(line: str) -> dict[str, Any]:
    words = [word.removeprefix("--model.init_args.") for word in shlex.split(line)]
    return {name: yaml.safe_load(value) for name, value in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (LoRADPO, 1e-4),
        (partial(LoRADPO, adapter="prefix"), 1e-3),
        (partial(LoRADPO, adapter="full"), 1e-6),  # TRL's for DPO
        (partial(LoRADPO, adapter="full", lr=1e-5), 1e-5),
        (SFT, 2e-5),  # TRL's
        (partial(CLaP, latent_dim=4), 1e-3),
        (partial(CLaP, latent_dim=4, unfreeze=True), 1e-5),
    ],
)
def test_the_learning_rate_goes_by_what_is_trained(
    causal_lm: Folder, make: Callable[..., PolicyMethod], rate: float
) -> None:
    method = make(num_users=2, feature_dim=16, backbone=CausalLM(str(causal_lm("gpt2"))).spec())
    method.configure_model()
    assert [group["lr"] for group in method.param_groups()] == [rate]
    assert getattr(method, "adapt_lr", rate) == rate  # of unseen users


@pytest.mark.parametrize("cls", [LoRADPO, SFT, LivePAL])
def test_help_lists_the_options_of_a_class_and_of_its_bases(
    cls: type[PersonalizationMethod], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its text, its type, and a default or that it is required."""
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["fit", "--model.help", f"{cls.__module__}.{cls.__qualname__}"]) == 0
    shown = capsys.readouterr().out.partition("\nHelp for ")[2]
    listed = dict(re.findall(r"^  --model\.(\w+)\b(.*?)(?=^  --|\Z)", shown, re.M | re.S))
    assert listed.keys() == constructor_arguments(cls) and {"warmup", "rank"} & listed.keys()
    for name, text in listed.items():
        words = " ".join(text.split())
        assert re.search(r"[a-z]\w* [\w ,`]*.*\. \((required, )?type: .+\)$", words), f"{name}: {words}"
        assert "required, " in words or "default: " in words, f"{name}: {words}"


def test_an_option_is_documented_by_the_class_that_declares_it_alone() -> None:
    """A class lists what it declares; what its bases take it hands on. Some defaults, and so their lines, differ."""
    for cls, repeated in (
        (LoRADPO, {"lr", "backbone"}),
        (SFT, {"lr", "backbone", "weight_decay", "warmup", "schedule"}),
    ):
        documented = [
            name
            for base in cls.__mro__
            if issubclass(base, PersonalizationMethod)
            for name in re.findall(
                r"^ {4}(\w+): ", (inspect.getdoc(base) or "").partition("Args:\n")[2].partition("\n\n")[0], re.M
            )
        ]
        assert sorted(documented) == sorted([*constructor_arguments(cls), *repeated])


def test_the_documentation_uses_every_option_and_every_name() -> None:
    used = [options_of(line) for line in LINES]
    assert {name for options in used for name in options} == constructor_arguments(LoRADPO) - LINKED - {"conditioning"}
    assert {name for options in used for name in options.get("loss_type", ())} == set(get_args(LossType))
    for option, names in (("f_divergence_type", Divergence), ("mode", Mode), ("adapter", Adapter)):
        assert {options.get(option) for options in used} - {None} == set(get_args(names))
    assert {options.get("decoding") for options in used} - {None} == set(get_args(Decoding))


@pytest.mark.filterwarnings("ignore:.*eval mode")
@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=pytest.mark.slow) if "compile" in line else line for line in LINES]
)
def test_every_line_of_the_documentation_trains(causal_lm: Folder, line: str) -> None:
    lm = CausalLM(str(causal_lm("gpt2")))
    method = LoRADPO(num_users=2, feature_dim=lm.feature_dim, backbone=lm.spec(), **options_of(line))
    method.configure_model()
    prompts = ["what is this?", "hello", "why"]
    chosen = lm.represent(prompts, [" a cat", " to you", " so"])
    rejected = lm.represent(prompts, [" nothing at all", " no", " because"])
    tie = torch.zeros(3, dtype=torch.bool)
    loss = method.loss(PreferenceBatch(chosen, rejected, torch.tensor([0, 0, 1]), torch.ones(3), tie))["loss"]
    loss.backward()
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    assert loss.isfinite() and gradients and all(gradient.to_dense().isfinite().all() for gradient in gradients)
