"""PReF: a user is weights of a few base rewards that start at the singular vectors of what users want.

Paper: Shenfeld, Faltings, Agrawal, Pacchiano, "Language Model Personalization via Reward Factorization" (arXiv
    2503.06358).
Reference code: idanshen/PReF_code (nothing is taken from it).
Deviations: base rewards are linear in frozen features instead of heads of a language model that is trained along. Real
    pairs rarely repeat, so that the published matrix of pairs by users is nearly empty: the decomposition is of one
    gradient step per user. Users are the exact modes of their posteriors, which also price how little is known of them
    while bases are trained. The prior is around the tuned Bradley-Terry model, since around zero, as published, a new
    user's reward is zero; validation pairs choose its spread.

Axes: N pairs of several users, B responses, U users, D feature width, K base rewards.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from plm.functional import PairList, expected_losses, fit_gaussian, per_user_sum, project, targets, unit_mean_per_user
from plm.messages import Problems
from plm.method.factored import FactoredMethod
from plm.method.linear import LinearMethod
from plm.method.strangers import NO_SPREAD
from plm.types import PreferenceBatch

Mean = Literal["population", "zero"]
Init = Literal["svd", "random"]

START_SPREAD = 0.3
"""Root mean square of a training pair's margin along each base before the first step."""

PULL = 4.0
"""How many pairs the population counts for in the step of a user that is decomposed."""


def leading_directions(steps: Tensor, count: Tensor, number: int) -> Tensor:
    """Leading right singular vectors of users' steps ``(U, D)`` less their mean, weighted by pairs: ``(D, number)``.

    >>> leading_directions(torch.tensor([[3.0, 1.0], [-3.0, 1.0]]), torch.ones(2), 1).abs().T
    tensor([[1., 0.]])
    """
    weight = count.double() / count.sum()
    centred = steps.double() - weight @ steps.double()
    values, vectors = torch.linalg.eigh(centred.T @ (weight[:, None] * centred))
    leading: Tensor = vectors[:, values.argsort(descending=True)[:number]].to(steps)
    return leading


class PReF(FactoredMethod, LinearMethod):
    """Reward factorization: Bradley-Terry plus signed weights of K base rewards, with a normal prior.

    Args:
        num_features: Number K of base rewards.
        mean: What a user without pairs wants: population = the tuned Bradley-Terry model of all users; zero = nothing,
            as published.
        init: Where bases start: svd = directions in which users differ; random.
        ridge: Precision of the normal prior on the bases.
        lr: Learning rate, decaying linearly to zero.
        **options: See `PersonalizationMethod`.
    """

    scales = (NO_SPREAD, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3)
    search_space: ClassVar[dict[str, list[Any]]] = {
        "num_features": [4, 8, 16],
        "ridge": [0.3, 1.0, 3.0],
        "lr": [0.02, 0.05, 0.1],
    }

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        *,
        num_features: int = 8,
        mean: Mean = "population",
        init: Init = "svd",
        ridge: float = 1.0,
        lr: float = 0.05,
        **options: Any,
    ) -> None:
        problems = Problems("model.")
        problems.integers(1, num_features=num_features)
        problems.choices(mean=(mean, get_args(Mean)), init=(init, get_args(Init)))
        problems.numbers(ridge=ridge, lr=lr)
        problems.check()
        super().__init__(num_users, feature_dim, lr=lr, **options)
        self.mean, self.init, self.ridge = mean, init, ridge
        self.bases = torch.nn.Parameter(START_SPREAD * torch.randn(feature_dim, num_features))
        self.add_users(num_features)

    # ------------------------------------------------------------------ shared by training and use
    def _read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features along the bases, and the reward of the population: ``(..., D)`` -> ``(..., K)`` and ``(...)``."""
        along = project(features, self.bases).to(features) / self.feature_scale
        if self.mean == "zero":
            return along, along.new_zeros(along.shape[:-1])
        return along, (features @ self.bradley_terry).to(features)

    def _differences(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base class, but each pair is read once: all is linear."""
        return self._read(chosen - rejected)

    # ------------------------------------------------------------------ training
    def on_train_start(self) -> None:
        """Also start the bases where users differ."""
        super().on_train_start()
        if self.trainer.global_step == 0 and self.init == "svd":
            self._start_bases()

    @torch.no_grad()
    def _start_bases(self) -> None:
        """Decompose one gradient step of each user's loss from the population's reward."""
        steps = self.bases.new_zeros(self.num_users, self.feature_dim)
        count = self.bases.new_zeros(self.num_users)
        for batch in self.train_pass():
            difference, target = batch.difference, targets(batch.tie).to(batch.weight)
            slope = target - torch.sigmoid(self._read(difference)[1])
            weight = unit_mean_per_user(batch.weight, batch.user_index, self.num_users)
            steps += per_user_sum((weight * slope)[:, None] * difference, batch.user_index, self.num_users)
            count += torch.bincount(batch.user_index, minlength=self.num_users)
        steps, count = self.sum_over_processes(steps), self.sum_over_processes(count)
        steps = steps / (count[:, None] + PULL) / self.feature_scale
        number = min(self.bases.shape[1], self.feature_dim)
        directions = leading_directions(steps, count, number)
        squares = sum(
            ((batch.difference @ directions / self.feature_scale).square().sum(0) for batch in self.train_pass()),
            torch.zeros(number, device=self.device),
        )
        length = (self.sum_over_processes(squares) / self.num_train_pairs).sqrt().clamp_min(1e-6)
        self.bases[:, :number] = START_SPREAD * directions / length

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the expected loss of the pairs under their users' posteriors, plus the prior of the bases."""
        users, user = torch.unique(batch.user_index, return_inverse=True)
        target, weight = targets(batch.tie).to(batch.weight), unit_mean_per_user(batch.weight, user, len(users))
        design, offset = self._read(batch.difference)
        with torch.no_grad():
            pairs = PairList(design.detach(), offset, target, weight, user, len(users))
            posterior = fit_gaussian(pairs, start=self.weights[users])
            self.weights[users] = posterior.mean
        margin = offset + (design * posterior.mean[user]).sum(-1)
        nll = (batch.weight * expected_losses(margin, design, target, posterior.precision, user)).mean()
        return {"loss": nll + 0.5 * self.ridge * self.bases.square().sum() / self.num_train_pairs, "nll": nll}
