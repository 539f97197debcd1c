"""Latent DPO passes the contract, in each of its kinds of people."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plm.method import PersonalizationMethod
from plm.methods.latent_dpo import LatentDPO
from plm.testing import MethodContract, PlantedData
from plm.types import PreferenceBatch
from tests.groups import method_options

PROMPT_DIM = 3


class PlantedLatents(PlantedData):
    """`PlantedData` whose responses are posteriors: planted points as means, and log-variances that vary."""

    view = "latents"

    def __init__(self, num_users: int, latent_dim: int) -> None:
        super().__init__(num_users, feature_dim=latent_dim)
        self.feature_dim = 2 * latent_dim
        for name in ("train_batch", "val_batch", "test_batch", "unseen_batch"):
            batch: PreferenceBatch = getattr(self, name)
            setattr(self, name, self._with_latents(batch)._replace(context=None))
        self.context = self._with_latents(self.context)
        self.unseen_batch = self.unseen_batch._replace(context=self.context)

    def _with_latents(self, pairs: Any) -> Any:
        chosen, rejected = (torch.cat([side, -2 + 0.1 * side], -1) for side in (pairs.chosen, pairs.rejected))
        return pairs._replace(chosen=chosen, rejected=rejected, prompt=self._normal(*chosen.shape[:-1], PROMPT_DIM))


class TestLatentDPO(MethodContract):
    options: dict[str, Any] = {"family": "vector", "lr": 0.1, "num_steps": 20}  # noqa: RUF012 - read only
    prompt_dim = 0

    def data(self) -> PlantedData:
        return PlantedLatents(self.num_users, self.feature_dim // 2)

    def make(self, num_users: int, feature_dim: int) -> PersonalizationMethod:
        return LatentDPO(num_users, 2 * (feature_dim // 2 or 1), prompt_dim=self.prompt_dim, **self.options)


class TestNewton(TestLatentDPO):
    options = method_options("latent_dpo_newton")


class TestPaper(TestLatentDPO):
    options = {  # noqa: RUF012
        **method_options("latent_dpo_paper"),
        "num_samples": 4,
        "family": "vector",
        "lr": 0.05,
        "batch_size": 16,
    }


class TestOfPrompts(TestLatentDPO):
    options = {"hidden_dim": 5, "lr": 0.05, "num_steps": 20, "weight_decay": 0.01}  # noqa: RUF012
    prompt_dim = PROMPT_DIM

    def test_score_is_finite_and_refuses_other_features(self) -> None:
        """As in the contract, with prompts; without them there is a message."""
        method, batch = self.fitted(), self.data().test_batch
        assert isinstance(batch.prompt, Tensor)
        with torch.no_grad():
            users = method.user_states(batch.user_index)
            reward = method.score(batch.chosen, users, prompt_features=batch.prompt)
            assert reward.shape == (batch.num_pairs,) and reward.isfinite().all()
        for prompt in (None, batch.prompt[:, 1:]):
            try:
                method.score(batch.chosen, users, prompt_features=prompt)
            except ValueError as error:
                assert "data.prompt_features" in str(error)
            else:
                raise AssertionError("expected a ValueError about missing prompts")


class TestLinear(TestOfPrompts):
    # Adam's division by small second moments carries the rounding of batched products on, 1.1e-5 on some processors
    company_tolerance = 5e-5
    options = {  # noqa: RUF012
        **{"family": "linear", "variance": "fixed_entropy", "rule": "topk", "num_samples": 4},
        **{"lr": 0.05, "num_steps": 40},
    }
