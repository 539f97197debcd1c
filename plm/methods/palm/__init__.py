"""PALM: a few policies that serve everybody, chosen with a proof of how well.

Paper: Kim, Moondra, Nahavandi, Perrault, Tambe, Gupta, "Many Preferences, Few Policies" (arXiv 2604.04144). Not PAL.
Reference code: none published.
Deviations: the printed theorem and algorithm were not available. The grid is recovered from the published weights, its
    coverage proved anew (`grid.combined_grid`), constants are derived (`bounds`), and the lazy search is our own
    (`search.corner_search`). Members of `PALM` are best-of-n policies, those of `policies.PolicyPortfolio` write.

Axes: B pairs in a batch, D feature width, R objectives, M members, U users, F planes of the upper bound.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plm.arrays import Float64Array
from plm.functional import PairList, bt_losses, fit_simplex, flatten_context, project, targets, unit_mean_per_user
from plm.messages import Problems
from plm.methods.palm.oracle import BestOfN
from plm.methods.palm.routing import RoutedMethod
from plm.methods.palm.selection import Portfolio, build_portfolio
from plm.types import Context, PreferenceBatch, Tokens, UserState

MAX_OBJECTIVES = 6
"""Corners of cells are enumerated in as many dimensions; more take too long."""

_POOL_PAIRS = 2048  # pairs of one process that the best-of-two oracle picks from


class PALM(RoutedMethod):
    """A portfolio of few members, each made for one mix of objectives; every user is served by the best of them.

    Training learns R objectives and a point of the simplex for every user, as LoRe does (arXiv 2504.14439, eq 10). Then
    the portfolio is chosen: the pairs are prompts with two candidates, members pick one of two, and a search over the
    simplex certifies how much a user can lose. ``plm portfolio`` makes the same from given objectives.

    The reward of a user is that of the user's member. A state holds the user's weights and their precision, the member,
    and the certified regret at these weights, in units of the largest reward difference within a prompt.

    Args:
        num_users: Number of seen users; linked from the data.
        feature_dim: Width D of the features; linked from the data.
        backbone: What makes the features; linked from the data.
        num_objectives: Number of objectives R, 2 to 6.
        size: Most members.
        delta: Certified loss at which the search for members stops.
        ridge: Precision of the normal prior on the mean objective.
        spread_ridge: Precision of the normal prior on the deviations of the objectives from their mean.
        prior_precision: Pull of a new user's weights to the mean user, in nats per pair.
        lr: Learning rate of objectives and weights.
    """

    user_tables: tuple[str, ...] = ("logits", "weights", "precision", "num_pairs")

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        backbone: dict[str, Any] | None = None,
        num_objectives: int = 3,
        size: int = 5,
        delta: float = 0.02,
        ridge: float = 0.06,
        spread_ridge: float = 3.0,
        prior_precision: float = 0.1,
        lr: float = 0.2,
    ) -> None:
        super().__init__(num_users=num_users, feature_dim=feature_dim, backbone=backbone, lr=lr, conditioning="none")
        self.num_objectives, self.size, self.delta = num_objectives, size, delta
        self.ridge, self.spread_ridge, self.prior_precision = ridge, spread_ridge, prior_precision
        self._check_arguments()
        self.objectives = torch.nn.Parameter(0.05 * torch.randn(feature_dim, num_objectives))
        self.logits = torch.nn.Parameter(torch.zeros(num_users, num_objectives))
        self.add_portfolio()

    def _check_arguments(self) -> None:
        """Raise one error about all arguments."""
        problems = Problems("model.")
        problems.within(2, MAX_OBJECTIVES, num_objectives=self.num_objectives)
        if self.size < 1:
            problems.add("size", "at least one member", self.size)
        if not self.delta > 0:
            problems.add("delta", "a loss > 0", self.delta)
        for name in ("ridge", "spread_ridge", "prior_precision"):
            if not getattr(self, name) >= 0:
                problems.add(name, "a number >= 0", getattr(self, name))
        problems.positive(lr=self.lr)
        problems.check()

    # ------------------------------------------------------------------ the portfolio
    @torch.no_grad()
    def install(self, portfolio: Portfolio, users: Tensor | None = None, objectives: Tensor | None = None) -> None:
        """Serve from a portfolio chosen elsewhere.

        Args:
            portfolio: Members and solved weights.
            users: ``(U, R)`` weights of the seen users, as given or inferred elsewhere; their mean becomes the centre.
            objectives: ``(D, R)`` directions whose product with features are the objectives; default: those learned.
        """
        super().install(portfolio, users)
        if objectives is not None:
            self.objectives.copy_(objectives)
            self.feature_scale.fill_(1.0)
        if users is not None:
            self.logits.copy_(users.clamp_min(1e-6).log())

    # ------------------------------------------------------------------ training
    def _objectives(self) -> Tensor:
        """``(D, R)`` directions whose product with features are the objectives."""
        return self.objectives / self.feature_scale

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Bradley-Terry loss of each user's mix of objectives, plus the normal priors of objectives and weights."""
        projected = project(batch.difference, self._objectives())
        weights = torch.softmax(self.logits, -1)
        margin = (projected * weights[batch.user_index]).sum(-1)
        nll = (batch.weight * bt_losses(margin, targets(batch.tie).to(margin))).mean()
        mean = self.objectives.mean(1, keepdim=True)
        penalty = self.ridge * mean.square().sum() + self.spread_ridge * (self.objectives - mean).square().sum()
        apart = (weights - weights.mean(0)).square().sum(-1)[batch.user_index]
        prior = penalty / self.num_train_pairs + self.prior_precision * (batch.weight * apart).mean()
        return {"loss": nll + 0.5 * prior, "nll": nll}

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Solve every seen user's weights at the present objectives and choose the portfolio anew."""
        self.centre.copy_(torch.softmax(self.logits, -1).mean(0))
        weights, precision = torch.zeros_like(self.weights), torch.zeros_like(self.precision)
        counts, rows = torch.zeros_like(self.num_pairs), []
        for batch in self.train_pass():
            rewards = project(torch.stack(batch.features, 1), self._objectives())  # (B, 2, R)
            users, user = torch.unique(batch.user_index, return_inverse=True)
            weight = unit_mean_per_user(batch.weight, user, len(users))
            projected, target = rewards[:, 0] - rewards[:, 1], targets(batch.tie).to(rewards)
            pairs = PairList(projected, torch.zeros_like(target), target, weight, user, len(users))
            weights[users], precision[users] = fit_simplex(pairs, self.centre, self.prior_precision)
            counts += torch.bincount(batch.user_index, minlength=self.num_users)
            rows.append(rewards)
        weights, precision, counts = (self.sum_over_processes(value) for value in (weights, precision, counts))
        prior = self.population_state(self.num_users).tensors
        without = counts == 0
        self.weights.copy_(torch.where(without[:, None], prior["weights"], weights))
        self.precision.copy_(torch.where(without[:, None, None], prior["precision"], precision))
        self.num_pairs.copy_(counts)
        pool = self._shared_pool(torch.cat([*rows, self.centre.new_zeros(0, 2, self.num_objectives)]))
        if len(pool):
            self.install(build_portfolio(BestOfN(pool), self.size, self.delta))

    def _shared_pool(self, rewards: Tensor) -> Float64Array:
        """Normalised rewards of evenly spaced pairs of all processes, ``(B, 2, R)`` -> ``(X, 2, R)``.

        The worse of two has reward 0 in each objective, and one common scale brings the largest differences to 1: a
        scale of its own for each objective would change what the users' weights mean.
        """
        local = rewards[:: max(1, math.ceil(len(rewards) / _POOL_PAIRS))]
        shared = local.new_zeros(self.trainer.world_size, _POOL_PAIRS, *local.shape[1:])
        shared[self.trainer.global_rank, : len(local)] = local
        pool: Float64Array = self.sum_over_processes(shared).flatten(0, 1).double().cpu().numpy()
        pool = pool - pool.min(1, keepdims=True)
        pool = pool[pool.max((1, 2)) > 0]
        scaled: Float64Array = pool / np.quantile(pool.max(1), 0.99, axis=0).max() if len(pool) else pool
        return scaled

    # ------------------------------------------------------------------ use
    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """Reward of the user's member: ``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        return ((responses @ self._objectives()) * self.member_weights[users.tensors["member"]]).sum(-1)

    def _adapt(self, context: Context) -> UserState:
        """Solve LoRe's few-shot problem (eq 11) with the objectives fixed, then route; without pairs, to cold start."""
        with torch.no_grad():
            difference, target, weight, user = flatten_context(context)
            projected = project(difference, self._objectives())
            pairs = PairList(projected, torch.zeros_like(target), target, weight, user, context.num_users)
            return self.inferred(pairs, context.mask.sum(-1))
