"""Per-user Bradley-Terry: every user alone, from nothing but their own pairs; what a personal method must beat too.

Paper: Bradley & Terry, "Rank analysis of incomplete block designs" (Biometrika 39, 1952), fitted user by user.
Reference code: none.
Deviations: the directions are the leading principal components of training differences, which no label enters, so that
    a thousand users at D = 384 need 64 numbers each; one ridge for all, picked on validation pairs.

Axes: B pairs, N pairs of several users, D feature width, K components, U users.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.functional import (
    PairList,
    bt_losses,
    fit_gaussian,
    flatten_context,
    targets,
    unit_mean_per_user,
    user_chunks,
)
from plm.method import PersonalizationMethod
from plm.types import Context, PreferenceBatch, Tokens, UserState

NUM_COMPONENTS = 64
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Candidate precisions of the normal prior, in units of the root mean square training difference."""


class PerUserBradleyTerry(PersonalizationMethod):
    """A ridge logistic model per user; the population knows nothing and calls every pair even."""

    user_tables: tuple[str, ...] = ("weights", "num_pairs")

    def __init__(self, num_users: int, feature_dim: int, backbone: dict[str, Any] | None = None) -> None:
        super().__init__(num_users, feature_dim, backbone, lr=0.0)
        width = min(feature_dim, NUM_COMPONENTS)
        self.components: Tensor
        self.ridge: Tensor
        self.num_pairs: Tensor
        self.register_buffer("components", torch.eye(feature_dim)[:, :width])
        self.register_buffer("ridge", torch.ones(()))
        self.weights = torch.nn.Parameter(torch.zeros(num_users, width))
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """The loss of the users as they were solved last."""
        return {"loss": bt_losses(self.margin(batch), targets(batch.tie).to(batch.weight)).mean()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Users are solved, not stepped: a step of size zero lets Lightning count one and write a checkpoint."""
        return torch.optim.SGD([self.weights], lr=0.0)

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Find the components, then fit every user at every ridge and keep the ridge that validation likes best.

        Raises:
            ValueError: If there are no validation pairs.
        """
        num_val = sum(len(batch.weight) for batch in self.val_pass())
        if not float(self.sum_over_processes(self.reference.new_tensor(float(num_val)))):
            raise ValueError("expected validation pairs to pick the ridge by, got none; raise data.val_rows")
        batches = list(self.train_pass())
        cross = self.reference.new_zeros(self.feature_dim, self.feature_dim, dtype=torch.float64)
        for batch in batches:
            difference = batch.difference.double()
            cross += difference.T @ difference
        cross = self.sum_over_processes(cross)
        self.components.copy_(torch.linalg.eigh(cross).eigenvectors.flip(-1)[:, : self.components.shape[1]])
        fits = {ridge: self._solve(batches, ridge) for ridge in RIDGES}
        losses = {ridge: self._val_loss(weights) for ridge, weights in fits.items()}
        best = min(losses, key=losses.__getitem__)
        self.ridge.fill_(best)
        self.weights.copy_(fits[best])
        users = torch.cat([batch.user_index for batch in batches])
        self.num_pairs.copy_(torch.bincount(users, minlength=self.num_users))

    def _solve(self, batches: list[PreferenceBatch], ridge: float) -> Tensor:
        """Weights ``(U, K)`` of all seen users."""
        weights = torch.zeros_like(self.weights)
        for batch in batches:
            users, user = torch.unique(batch.user_index, return_inverse=True)
            weight = unit_mean_per_user(batch.weight, user, len(users))
            weights[users] = self._fit(batch.difference, targets(batch.tie), weight, user, len(users), ridge)
        return self.sum_over_processes(weights)

    def _fit(
        self, difference: Tensor, target: Tensor, weight: Tensor, user: Tensor, num_users: int, ridge: float
    ) -> Tensor:
        """Posterior modes ``(U, K)`` of users under a normal prior of precision ``ridge``."""
        design = difference @ self.components / self.feature_scale / math.sqrt(ridge)
        width = design.shape[1]
        modes = design.new_zeros(num_users, width)
        for chunk in user_chunks(user, num_users, width, own=width**2):
            rows, size = chunk.rows, len(chunk.users)
            zero = torch.zeros_like(weight[rows])
            pairs = PairList(design[rows], zero, target.to(weight)[rows], weight[rows], chunk.user, size)
            modes[chunk.users] = fit_gaussian(pairs, tolerance=1e-6).mean
        return modes / math.sqrt(ridge)

    def _val_loss(self, weights: Tensor) -> float:
        total = self.reference.new_zeros(())
        for batch in self.val_pass():
            margin = self._margins(batch.difference, weights[batch.user_index])
            total += (batch.weight * bt_losses(margin, targets(batch.tie).to(margin))).sum()
        return float(self.sum_over_processes(total))

    def _margins(self, features: Tensor, weights: Tensor) -> Tensor:
        margins: Tensor = (features @ self.components / self.feature_scale * weights).sum(-1)
        return margins

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        return self._margins(responses, users.tensors["weights"])

    def _adapt(self, context: Context) -> UserState:
        """The same fit at the ridge of the seen users."""
        with torch.no_grad():
            difference, target, weight, user = flatten_context(context)
            weights = self._fit(difference, target, weight, user, context.num_users, float(self.ridge))
        return UserState({"weights": weights}, context.mask.sum(-1))

    def user_states(self, user_index: Tensor) -> UserState:
        """Rows of the table."""
        return UserState({"weights": self.weights[user_index]}, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """Zero weights."""
        zero = torch.zeros(num_users, dtype=torch.long, device=self.device)
        return UserState({"weights": self.weights.new_zeros(num_users, self.weights.shape[1])}, zero)
