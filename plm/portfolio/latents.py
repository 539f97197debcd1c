"""Latent DPO for weight vectors: each member is one latent that a CLaP model writes from, solved exactly.

Axes: V weight vectors, R objectives, X prompts, C candidates of a prompt (padded), M members, B texts, Z latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from plm.arrays import Float64Array
from plm.backbones import Backbone, LatentBackbone, Policy, TextWriter
from plm.data.sources.population import CandidatePool, best_and_worst
from plm.messages import Problems
from plm.methods.latent_dpo.maths import gaussian
from plm.methods.latent_dpo.newton import fit_means
from plm.portfolio.writing import WritingPortfolio
from plm.types import Tokens, UserState


class LatentFit:
    """How members are found in the latent space: as `plm.methods.latent_dpo.LatentDPO` does with ``rule: newton``.

    Args:
        beta: Strength of the KL term that DPO implies.
        kl_coef: Weight of the KL to the prior in nats, per pair.
    """

    def __init__(self, beta: float = 0.1, kl_coef: float = 0.003) -> None:
        self.beta, self.kl_coef = beta, kl_coef
        problems = Problems("policies.latent_fit.")
        problems.positive(beta=beta, kl_coef=kl_coef)
        problems.check()


def pool_means(pool: CandidatePool, latents: LatentBackbone) -> Tensor:
    """Posterior means ``(X, C, Z)`` of all candidates of a pool; nan where there is none."""
    row, column = np.nonzero(pool.candidates >= 0)
    prompts = [pool.prompts[index] for index in row.tolist()]
    texts = [pool.responses[index] for index in pool.candidates[row, column].tolist()]
    read = latents.represent(prompts, texts)
    assert isinstance(read, Tensor)
    means = torch.full((*pool.candidates.shape, latents.latent_dim), torch.nan)
    means[torch.as_tensor(row), torch.as_tensor(column)] = gaussian(read).mean
    return means


def solve_latents(pool: CandidatePool, means: Tensor, weights: Float64Array, fit: LatentFit) -> Tensor:
    """The latent of each weight vector, by its best and worst candidate of each prompt: ``(V, R)`` -> ``(V, Z)``.

    Latent DPO of a user who is one point of the latent space is logistic regression on differences of latents, with
    a ridge towards 0, the prior's mean: that of weights by which all candidates are worth the same.

    Args:
        pool: What is compared.
        means: ``(X, C, Z)`` of the candidates, see `pool_means`.
        weights: Of the simulated users.
        fit: How they are solved.
    """
    shown = np.tile(np.arange(len(pool.prompts)), (len(weights), 1))
    columns = best_and_worst(pool.scores, weights, shown)  # (V, X, 2)
    user, prompt = np.nonzero(columns[..., 0] >= 0)
    best, worst = (means[prompt, columns[user, prompt, side]] for side in (0, 1))
    one = torch.ones(len(user))
    return fit_means(best - worst, one, one, torch.as_tensor(user), len(weights), fit.beta, fit.kl_coef)


class LatentPortfolio(WritingPortfolio):
    """Few points of the latent space of a CLaP model that serve everybody, as published Latent DPO writes: from means.

    A member is a row of Z numbers; the language model and what steers it stay as they are.

    Args:
        num_users: Number of users.
        feature_dim: Number of objectives R.
        backbone: What makes the objectives of a response, as ``{class_path, init_args}``.
        latents: The `LatentBackbone` that writes, as ``{class_path, init_args}``.
        sharpness: Nats by which the best value of an objective raises the log-odds that a user chooses a response over
            one of the worst; for users who are inferred from pairs.
        prior_precision: Pull of a new user's weights to the mean user, in nats per pair.
    """

    _of_any_length: ClassVar[tuple[str, ...]] = (*WritingPortfolio._of_any_length, "points")

    points: Tensor

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        backbone: dict[str, Any],
        latents: dict[str, Any],
        sharpness: float = 8.0,
        prior_precision: float = 0.1,
    ) -> None:
        super().__init__(num_users, feature_dim, backbone, lr=0.0)
        self.check_users(sharpness, prior_precision)
        self.sharpness, self.prior_precision = sharpness, prior_precision
        self.num_objectives = feature_dim
        self.objectives = Backbone.from_spec(backbone)
        self._latents = latents
        self.add_portfolio()
        self.register_buffer("points", torch.zeros(0, self.latents.latent_dim))

    @cached_property
    def latents(self) -> LatentBackbone:
        """What writes; its weights are read when needed.

        Raises:
            ValueError: If it is no such backbone.
        """
        backbone = Backbone.from_spec(self._latents)
        if not isinstance(backbone, LatentBackbone):
            raise ValueError(f"expected latents to be a plm.backbones.LatentBackbone, got {type(backbone).__name__}")
        return backbone

    # ------------------------------------------------------------------ members
    @torch.no_grad()
    def add(self, rows: Tensor) -> Tensor:
        """Add members at points ``(m, Z)``; returns their numbers ``(m,)``."""
        before = len(self.points)
        self.points = torch.cat([self.points, rows.to(self.points)])
        return torch.arange(before, len(self.points))

    def keep(self, members: Sequence[int]) -> None:
        """Forget all but these members, in this order."""
        self.points = self.points[list(members)]

    # ------------------------------------------------------------------ text
    @property
    def policy(self) -> Policy:
        """The language model that writes."""
        return self.latents.policy

    @property
    def unaligned(self) -> Policy:
        """The language model as it is, without a latent."""
        return self.latents.policy

    def writing(self, users: UserState, prompts: Sequence[str]) -> TextWriter:
        """A batch of texts, each from the latent of its user's member."""
        return self.latents.writing(self.points[users.tensors["member"].to(self.device)])

    def log_ratios(self, tokens: Tokens, member: int) -> Tensor:
        """How much likelier B responses are from a member's latent than without one, ``(B,)`` nats."""
        return self.latents.log_ratios(tokens, self.points[member].expand(tokens.num_rows, -1))
