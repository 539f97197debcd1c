"""A portfolio of policies that write passes the contract, but for its training: ``plm portfolio`` makes it, not a fit.

Portfolios of latents share its users and rewards (`plm.portfolio.writing`); the rest is in
``test_palm_latents``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plm.data.rewards import Length
from plm.method import PersonalizationMethod
from plm.methods.palm.oracle import PolicySet
from plm.methods.palm.selection import Portfolio
from plm.portfolio.features import RewardFeatures, reward_spec
from plm.portfolio.policies import PolicyPortfolio
from plm.testing import PlantedData, TokenContract, tiny_causal_lm

OBJECTIVES = {"long": "words", "short": "-words"}


class TestPolicyPortfolio(TokenContract):
    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        objectives = RewardFeatures({"words": reward_spec(Length())}, OBJECTIVES, [0.0, -8.0], [8.0, 8.0])
        return PolicyPortfolio(num_users, 2, tiny_causal_lm().spec(), objectives.spec(), rank=2)

    def fit(self, data: PlantedData, *callbacks: object, epochs: int | None = None) -> PersonalizationMethod:
        """Install two members and weights of the users, as ``plm portfolio`` does."""
        method = self.make(data.num_users, data.feature_dim)
        assert isinstance(method, PolicyPortfolio)
        method.user_ids = data.user_ids
        method.configure_model()
        method.add(torch.stack([method.shape.start(seed) for seed in (0, 1)]))
        members = PolicySet(np.eye(2), np.array([[0.9, 0.1], [0.4, 0.8]]), np.zeros(2))
        first = torch.linspace(0.1, 0.9, data.num_users)
        method.install(Portfolio(members, members, 0.0, 2), torch.stack([first, 1 - first], 1))
        return method

    def test_one_step_lowers_the_loss(self) -> None:
        """There is no step: a portfolio refuses to be trained."""
        with pytest.raises(ValueError, match="made by plm portfolio, not trained by plm fit"):
            self.fitted().loss(self.data().train_batch)
