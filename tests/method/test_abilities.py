"""What a method can do besides scoring is a fact about its class."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from plm.backbones import Backbone, Policy
from plm.method import abilities
from plm.methods.latent_dpo import LatentDPO
from plm.methods.lora_dpo import LoRADPO

ABILITIES = [
    value for value in vars(abilities).values() if inspect.isclass(value) and value.__module__ == abilities.__name__
]


def test_there_are_abilities() -> None:
    assert {ability.__name__ for ability in ABILITIES} >= {
        "Writer",
        "LatentWriter",
        "Mixable",
        "Exporter",
        "Explainable",
    }


@pytest.mark.parametrize("ability", ABILITIES)
def test_asking_for_an_ability_reads_nothing(ability: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent DPO model whose language model is gone still answers what it can do."""
    spec = {
        "class_path": "plm.methods.clap.latents.ClapLatents",
        "init_args": {"checkpoint": str(tmp_path / "gone.ckpt")},
    }
    method = LatentDPO(1, 32, spec, family="vector", rule="newton")

    def read(*_: object) -> None:
        raise AssertionError("a backbone was made")

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "from_spec", read)
        can = isinstance(method, ability)
    assert can == (ability not in (abilities.Exporter, abilities.Explainable))
    with pytest.raises(ValueError, match=r"gone\.ckpt"):
        _ = method.policy.backbone


def test_a_writer_with_a_network_is_a_writer() -> None:
    """Torch keeps modules where a static look at attributes misses them; the class is asked, not the attribute."""
    method = LoRADPO(
        num_users=1,
        feature_dim=16,
        backbone={"class_path": "plm.backbones.CausalLM", "init_args": {"model": "/nowhere"}},
    )
    assert isinstance(method, abilities.Writer) and not hasattr(method, "policy")
    method.policy = Policy.__new__(Policy)
    assert isinstance(method, abilities.Writer)
