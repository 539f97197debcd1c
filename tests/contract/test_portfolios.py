"""Portfolios of policies that write pass the contract, but for training: ``plm portfolio`` makes them, not a fit."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from plm.data.rewards import Length
from plm.method import PersonalizationMethod
from plm.methods.clap import CLaP
from plm.methods.clap.latents import ClapLatents
from plm.methods.palm.oracle import PolicySet
from plm.methods.palm.selection import Portfolio
from plm.portfolio.features import RewardFeatures, reward_spec
from plm.portfolio.latents import LatentPortfolio
from plm.portfolio.policies import PolicyPortfolio
from plm.portfolio.writing import WritingPortfolio
from plm.testing import MethodContract, PlantedData, TinyBackbone, TokenContract, quiet_trainer, tiny_causal_lm


class WritingContract(MethodContract):
    """`MethodContract` of a portfolio: it is installed where other methods are fitted."""

    is_fitted = False

    @abstractmethod
    def rows(self, method: WritingPortfolio) -> Tensor:
        """What makes a member for each objective, ``(R, P)``."""

    def fit(self, data: PlantedData, *callbacks: object, epochs: int | None = None) -> PersonalizationMethod:
        """Install members and weights of the users, as ``plm portfolio`` does."""
        method = self.make(data.num_users, data.feature_dim)
        assert isinstance(method, WritingPortfolio)
        method.user_ids = data.user_ids
        method.configure_model()
        method.add(self.rows(method))
        vertices = np.eye(method.num_objectives)
        members = PolicySet(vertices, 0.3 + 0.4 * vertices, np.zeros(len(vertices)))
        users = torch.arange(1.0, 1 + data.num_users)[:, None] ** torch.linspace(-1, 1, method.num_objectives)
        method.install(Portfolio(members, members, 0.0, len(vertices)), users / users.sum(1, keepdim=True))
        return method

    def test_one_step_lowers_the_loss(self) -> None:
        """There is no step: a portfolio refuses to be trained."""
        with pytest.raises(ValueError, match="made by plm portfolio, not trained by plm fit"):
            self.fitted().loss(self.data().train_batch)


class TestPolicyPortfolio(WritingContract, TokenContract):
    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        objectives = RewardFeatures(
            {"words": reward_spec(Length())}, {"long": "words", "short": "-words"}, [0.0, -8.0], [8.0, 8.0]
        )
        return PolicyPortfolio(num_users, 2, tiny_causal_lm().spec(), objectives.spec(), rank=2)

    def rows(self, method: WritingPortfolio) -> Tensor:
        assert isinstance(method, PolicyPortfolio)
        return torch.stack([method.shape.start(seed) for seed in (0, 1)])


@cache
def clap_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder with the checkpoint of a tiny CLaP model, which lasts as long as the process."""
    folder = tempfile.TemporaryDirectory()
    clap = CLaP(1, 16, tiny_causal_lm().spec(), latent_dim=4, num_queries=2, encoder_layers=1)
    clap.configure_model()
    trainer = quiet_trainer(folder.name)
    trainer.strategy.connect(clap)
    trainer.save_checkpoint(f"{folder.name}/clap.ckpt", weights_only=True)
    return folder


class TestLatentPortfolio(WritingContract):
    feature_dim = 3

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        latents = ClapLatents(f"{clap_folder().name}/clap.ckpt")
        return LatentPortfolio(num_users, feature_dim, TinyBackbone(feature_dim).spec(), latents.spec())

    def rows(self, method: WritingPortfolio) -> Tensor:
        return torch.eye(method.num_objectives, 4)
