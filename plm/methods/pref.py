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

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.functional import (
    PairList,
    Posterior,
    bt_losses,
    expected_losses,
    fit_gaussian,
    flatten_context,
    per_user_sum,
    project,
    targets,
    unit_mean_per_user,
)
from plm.messages import Problems
from plm.method.linear import LinearMethod
from plm.method.strangers import NO_SPREAD, Candidates
from plm.optimizer import with_decay
from plm.types import Context, PreferenceBatch, Tokens, UserState

Mean = Literal["population", "zero"]
Init = Literal["svd", "random"]

SCALES = (NO_SPREAD, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3)
"""Candidates for the spread of users, in units of the prior, chosen on validation pairs."""

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


class Read(NamedTuple):
    """Pairs of a batch along the bases, kept while users are solved."""

    design: Tensor
    """``(B, K)``."""
    offset: Tensor
    """``(B,)`` margin of a user with weights zero."""
    batch: PreferenceBatch


class PReF(LinearMethod):
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

    view: ClassVar[Literal["features", "tokens", "latents"]] = "features"
    user_tables: tuple[str, ...] = ("weights", "precision", "num_pairs")
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
        self.weights: Tensor
        self.precision: Tensor
        self.num_pairs: Tensor
        self.scale: Tensor
        self.bases = torch.nn.Parameter(START_SPREAD * torch.randn(feature_dim, num_features))
        self.register_buffer("weights", torch.zeros(num_users, num_features))
        self.register_buffer("precision", torch.eye(num_features).repeat(num_users, 1, 1))
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("scale", torch.ones(()))

    # ------------------------------------------------------------------ shared by training and use
    def _along_bases(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What weights multiply, and what they do not: ``(..., D)`` -> ``(..., K)`` and ``(...)``.

        Also under autocast in the precision of the features, in which users are solved and kept.
        """
        along = project(features, self.bases).to(features) / self.feature_scale
        if self.mean == "zero":
            return along, along.new_zeros(along.shape[:-1])
        return along, (features @ self.bradley_terry).to(features)

    def _solve(self, pairs: PairList, scale: Tensor) -> Posterior:
        """Weights and their precision under a prior of this spread; the least spread is none."""
        posterior = fit_gaussian(pairs._replace(design=pairs.design * scale))
        return Posterior(posterior.mean * scale * (scale > NO_SPREAD), posterior.precision / scale.square())

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
            slope = target - torch.sigmoid(self._along_bases(difference)[1])
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
        design, offset = self._along_bases(batch.difference)
        with torch.no_grad():
            pairs = PairList(design.detach(), offset, target, weight, user, len(users))
            posterior = fit_gaussian(pairs, start=self.weights[users])
            self.weights[users] = posterior.mean
        margin = offset + (design * posterior.mean[user]).sum(-1)
        nll = (batch.weight * expected_losses(margin, design, target, posterior.precision, user)).mean()
        return {"loss": nll + 0.5 * self.ridge * self.bases.square().sum() / self.num_train_pairs, "nll": nll}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, whose learning rate decays linearly to zero."""
        return with_decay(torch.optim.Adam(self.param_groups()), self.trainer.estimated_stepping_batches)

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Solve all seen users' weights, with the spread that their validation pairs choose.

        Everybody is the population where no spread has a gain larger than its error.
        """
        train, val = (
            [Read(*self._along_bases(batch.difference), batch) for batch in batches]
            for batches in (self.train_pass(), self.val_pass())
        )
        count = sum(
            (torch.bincount(part.batch.user_index, minlength=self.num_users) for part in train),
            torch.zeros_like(self.num_pairs),
        )
        self.num_pairs.copy_(self.sum_over_processes(count))
        candidates: Candidates[tuple[float, Tensor, Tensor]] = Candidates(default=SCALES.index(1.0))
        for number in SCALES:
            weights, precision = torch.zeros_like(self.weights), torch.zeros_like(self.precision)
            for design, offset, batch in train:
                users, user = torch.unique(batch.user_index, return_inverse=True)
                weight = unit_mean_per_user(batch.weight, user, len(users))
                pairs = PairList(design, offset, targets(batch.tie).to(weight), weight, user, len(users))
                weights[users], precision[users] = self._solve(pairs, self.scale.new_tensor(number))
            solved = number, self.sum_over_processes(weights), self.sum_over_processes(precision)
            candidates.add(self.sum_over_processes(self._val_losses(val, solved[1])), solved)
        number, weights, precision = candidates.choose()[1]
        self.scale.fill_(number)
        self.weights.copy_(weights)
        without_pairs = (self.num_pairs == 0)[:, None, None]
        self.precision.copy_(torch.where(without_pairs, self._prior_precision(), precision))

    def _val_losses(self, val: list[Read], weights: Tensor) -> Tensor:
        """Summed loss of the validation pairs of every user with weights ``(U, K)``: ``(U,)``."""
        losses = torch.zeros(self.num_users, dtype=torch.float64, device=self.device)
        for design, offset, batch in val:
            margin = offset + (design * weights[batch.user_index]).sum(-1)
            loss = batch.weight * bt_losses(margin, targets(batch.tie).to(margin))
            losses += per_user_sum(loss.double(), batch.user_index, self.num_users)
        return losses

    def report(self) -> dict[str, float]:
        """``scale``: the spread of users in units of the prior, 0 = none."""
        return {"scale": float(self.scale) * float(self.scale > NO_SPREAD)}

    def prior_row(self, name: str, state_dict: Mapping[str, Tensor]) -> Tensor | None:
        """The prior of the checkpoint."""
        width = self.weights.shape[1]
        return torch.eye(width) / state_dict["scale"].cpu().square() if name == "precision" else None

    # ------------------------------------------------------------------ use
    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        along, offset = self._along_bases(responses)
        return offset + (along * users.tensors["weights"]).sum(-1)

    @torch.no_grad()
    def _adapt(self, context: Context) -> UserState:
        """The mode of each user's posterior, bases fixed, and its precision."""
        difference, target, weight, user = flatten_context(context)
        pairs = PairList(*self._along_bases(difference), target, weight, user, context.num_users)
        weights, precision = self._solve(pairs, self.scale)
        return UserState({"weights": weights, "precision": precision}, context.mask.sum(-1))

    def user_states(self, user_index: Tensor) -> UserState:
        """Weights of seen users and their precision, as last refreshed."""
        tensors = {"weights": self.weights[user_index], "precision": self.precision[user_index]}
        return UserState(tensors, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The prior."""
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        weights = self.weights.new_zeros(num_users, self.weights.shape[1])
        precision = self._prior_precision().repeat(num_users, 1, 1)
        return UserState({"weights": weights, "precision": precision}, num_pairs)

    def _prior_precision(self) -> Tensor:
        """``(K, K)``."""
        return torch.eye(self.weights.shape[1], device=self.device) / self.scale.square()
