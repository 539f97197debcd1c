"""Every registered method passes the contract, in every mode it has."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

from plm.method import PersonalizationMethod
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.dpl import DPL
from plm.methods.fast_weights import FastWeights
from plm.methods.gpo import GPO
from plm.methods.lore import LoRe, PublishedLoRe
from plm.methods.mrm import MRM
from plm.methods.pal import PAL
from plm.methods.palm import PALM
from plm.methods.pref import PReF
from plm.methods.user_embedding import UserEmbedding
from plm.methods.vpl import VPL
from plm.testing import MethodContract, PlantedData
from tests.contract import test_latent_dpo, test_persona_judge, test_token_methods
from tests.groups import method_options


class TestBradleyTerry(MethodContract):
    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return BradleyTerry(num_users, feature_dim)


class TestLoRe(MethodContract):
    options: dict[str, Any] = {"num_bases": 3}  # noqa: RUF012 - read only

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return LoRe(num_users, feature_dim, **self.options)


class TestLoReGlobal(TestLoRe):
    options = {"num_bases": 1}  # noqa: RUF012


class TestPublishedLoRe(MethodContract):
    order_matters = True  # weights start at random, as published
    options: dict[str, Any] = {"num_bases": 3}  # noqa: RUF012 - read only

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return PublishedLoRe(num_users, feature_dim, **self.options)


class TestPublishedLoRePrior(TestPublishedLoRe):
    options = {"num_bases": 4, "prior_precision": 0.5}  # noqa: RUF012


class TestPublishedLoRePruned(TestPublishedLoRe):
    options = {"num_bases": 6, "prune_below": 0.5, "user_lr": 0.02}  # noqa: RUF012

    def test_some_basis_is_pruned_here(self) -> None:
        kept = self.fitted().population_state(1).tensors["weights"] > 0
        assert 1 <= kept.sum() < 6


class TestPublishedLoReAdam(TestPublishedLoRe):
    options = {"num_bases": 3, "adapt_solver": "adam"}  # noqa: RUF012


class WithHead(MethodContract):
    """The data come with a reward head, as from a reward model."""

    def data(self) -> PlantedData:
        data = super().data()
        data.reference_head = torch.linspace(-1, 1, self.feature_dim)
        return data


class TestLoReReference(WithHead, TestLoRe):
    options = {"num_bases": 0}  # noqa: RUF012


class TestPublishedLoReAlternating(WithHead, TestPublishedLoRe):
    options = {  # noqa: RUF012
        "num_bases": 3,
        "optimization": "alternating",
        "anchor": "cosine",
        "anchor_strength": 0.1,
    }


class TestPublishedLoReDistanceAnchor(WithHead, TestPublishedLoRe):
    options = {"num_bases": 2, "anchor": "l2", "anchor_strength": 0.01, "lr": 0.05}  # noqa: RUF012

    def test_units_names_and_order_of_users_change_nothing(self) -> None:
        """The published distance of bases to a head has the unit of the head."""


class TestPAL(MethodContract):
    options: dict[str, Any] = {"num_prototypes": 3}  # noqa: RUF012 - read only

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return PAL(num_users, feature_dim, **self.options)


class TestPALResidual(TestPAL):
    options = {"num_prototypes": 2, "residual": "bradley_terry", "partition": True}  # noqa: RUF012


class TestPALPublished(TestPAL):
    ignores = "nothing"
    options = {  # noqa: RUF012
        "num_prototypes": 3,
        "users": "table",
        "user_learner": "f(Pw)",
        "head": "dist",
        "loss": "hinge",
        "projector": "mlp1-relu-dropout0-residual",
        "bound": 4.0,
        "lr": 0.02,
    }


class TestPALGumbel(TestPAL):
    ignores, order_matters = "nothing", True
    options = {  # noqa: RUF012
        "num_prototypes": 2,
        "users": "table",
        "mixing": "gumbel",
        "user_learner": "|f(P)|w",
        "head": "angle",
        "loss": "cross_entropy",
        "projector": "mlp0-linear-dropout0",
        "lr": 0.02,
    }


class TestPALOfPrompts(TestPAL):
    ignores = "nothing"
    options = {  # noqa: RUF012
        "num_prototypes": 2,
        "variant": "B",
        "head": "angle",
        "projector": "mlp1-gelu-dropout0",
        "groups": {"projector": {"lr": 0.01}, "user_projectors": {"lr": 0.01}},
    }


class TestVPL(MethodContract):
    ignores = "a constant"
    options: dict[str, Any] = {"latent_dim": 3, "hidden_dim": 8}  # noqa: RUF012

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return VPL(num_users, feature_dim, **self.options)


class TestVPLPaper(TestVPL):
    ignores = "nothing"
    options = {**method_options("vpl_paper"), "latent_dim": 4, "hidden_dim": 8, "lr": 3e-3}  # noqa: RUF012


class TestVPLBilinear(TestVPL):
    ignores = "what a pair shares"
    options = {  # noqa: RUF012
        "latent_dim": 3,
        "hidden_dim": 8,
        "decoder": "bilinear",
        "posterior": "attention",
        "target_rule": "rest",
    }


class TestVPLGuided(TestVPL):
    ignores = "nothing"
    options = {  # noqa: RUF012
        "latent_dim": 3,
        "hidden_dim": 8,
        "pair_features": "concat",
        "swap_guide": 0.1,
        "latent_map": "sphere",
        "free_bits": 0.1,
    }


class TestFastWeights(MethodContract):
    options: dict[str, Any] = {"num_keys": 4}  # noqa: RUF012 - read only

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return FastWeights(num_users, feature_dim, **self.options)


class TestMRM(MethodContract):
    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return MRM(num_users, feature_dim, num_bases=3)


class TestUserEmbedding(MethodContract):
    ignores = "a constant"

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return UserEmbedding(num_users, feature_dim, embedding_dim=3, hidden_dim=8)


class TestDPL(MethodContract):
    ignores = "a constant"
    options: dict[str, Any] = {"kind": "mean_variance"}  # noqa: RUF012 - read only

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return DPL(num_users, feature_dim, **self.options)


class TestDPLOnAtoms(TestDPL):
    options = {"kind": "categorical", "risk": 0.01}  # noqa: RUF012


class TestGPO(MethodContract):
    ignores = "a constant"

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return GPO(num_users, feature_dim, width=8, layers=1, heads=2, max_context=4)


class TestPReF(MethodContract):
    options: dict[str, Any] = {"num_features": 3}  # noqa: RUF012 - read only

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return PReF(num_users, feature_dim, **self.options)


class TestPALM(MethodContract):
    options: dict[str, Any] = {"num_objectives": 3, "size": 3}  # noqa: RUF012 - read only

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return PALM(num_users, feature_dim, **self.options)


class TestPALMTwoObjectives(TestPALM):
    options = {"num_objectives": 2, "size": 2, "prior_precision": 0.0}  # noqa: RUF012


@pytest.mark.parametrize("entry", entry_points(group="plm.methods"), ids=lambda entry: entry.name)
def test_every_registered_method_has_a_tiny_factory(entry: Any) -> None:
    """A method without a contract class in this module, or in that of methods that read tokens, fails here."""
    if not entry.value.startswith("plm."):
        pytest.skip("a method of another package, tested there")
    others = (test_token_methods, test_latent_dpo, test_persona_judge)
    found = [*globals().values(), *(value for module in others for value in vars(module).values())]
    contracts = [value for value in found if isinstance(value, type) and value.__name__.startswith("Test")]
    made = {type(contract().make(2, 3)) for contract in contracts}
    assert entry.load() in made, f"add a MethodContract subclass for {entry.name} to {__name__}"


@pytest.mark.parametrize(
    ("method_class", "name"),
    [(LoRe, "ridge"), (LoRe, "temperature"), (PAL, "lr"), (PAL, "ridge"), (VPL, "lr"), (PALM, "ridge")],
)
def test_nan_is_no_option(method_class: type[PersonalizationMethod], name: str) -> None:
    """Comparisons with it are all false, so that ``value < 0`` would let it through."""
    with pytest.raises(ValueError, match=rf"{name}: expected a (finite )?number .*got nan"):
        method_class(2, 4, **{name: float("nan")})
