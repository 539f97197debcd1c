"""FactoredMethod: users are weights of what is shared, with a normal prior whose spread validation pairs choose.

Axes: N pairs of several users, B responses, U users, D feature width, K weights of one user.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.functional import PairList, Posterior, fit_gaussian, held_out_losses, targets, unit_mean_per_user
from plm.method import PersonalizationMethod
from plm.method.abilities import Explainable
from plm.method.strangers import NO_SPREAD, least_harmful_scale
from plm.optimizer import with_decay
from plm.types import Context, PreferenceBatch, Tokens, UserState


class _Read(NamedTuple):
    """Pairs of a batch as they are solved for, kept while users are."""

    design: Tensor
    """``(N, K)``."""
    offset: Tensor
    """``(N,)`` margin of a user with weights zero."""
    batch: PreferenceBatch


class FactoredMethod(PersonalizationMethod, Explainable):
    """A method whose reward of a response x is ``offset(x) + factors(x) @ w`` for a user with weights w.

    Weights are the modes of posteriors under a normal prior around zero, the population; its standard deviation is
    ``prior_scale`` times the one of ``scales`` that has the lowest validation loss.

    A subclass says what is shared in `_read`, sets ``scales`` and calls `add_users` in its constructor. As a mixin it
    stands before the other bases of a class.
    """

    user_tables: tuple[str, ...] = ("weights", "precision", "num_pairs")
    scales: ClassVar[tuple[float, ...]]
    """Candidates for the spread of users, in units of the prior; the first is `NO_SPREAD`, one is 1."""

    prior_scale: float = 1.0
    weights: Tensor
    precision: Tensor
    num_pairs: Tensor
    scale: Tensor

    def add_users(self, width: int) -> None:
        """Make the tables of the seen users, who have no pairs yet, and K = ``width`` weights."""
        self.register_buffer("weights", torch.zeros(self.num_users, width))
        self.register_buffer("precision", torch.eye(width).repeat(self.num_users, 1, 1))
        self.register_buffer("num_pairs", torch.zeros(self.num_users, dtype=torch.long))
        self.register_buffer("scale", torch.ones(()))

    # ------------------------------------------------------------------ shared by training and use
    @abstractmethod
    def _read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Factors and offset: ``(..., D)`` -> ``(..., K)`` and ``(...)``.

        Also under autocast in the precision of the features, in which users are solved and kept.
        """

    def _differences(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """What `_read` gives of chosen less what it gives of rejected."""
        (factors, offset), (other_factors, other_offset) = map(self._read, (chosen, rejected))
        return factors - other_factors, offset - other_offset

    def _pairs(self, read: _Read, user: Tensor, num_users: int) -> PairList:
        """Pairs whose weights have mean one within each user."""
        weight = unit_mean_per_user(read.batch.weight, user, num_users)
        return PairList(read.design, read.offset, targets(read.batch.tie).to(weight), weight, user, num_users)

    def _solve(self, pairs: PairList, scale: Tensor) -> Posterior:
        """Modes ``(U, K)`` and precisions of the posteriors; ``scale`` is that of the prior, the least one is none."""
        spread = self.prior_scale * scale
        posterior = fit_gaussian(pairs._replace(design=pairs.design * spread))
        return Posterior(posterior.mean * spread * (scale > NO_SPREAD), posterior.precision / spread.square())

    # ------------------------------------------------------------------ training
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, whose learning rate decays linearly to zero."""
        return with_decay(torch.optim.Adam(self.param_groups()), self.trainer.estimated_stepping_batches)

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Solve all seen users' weights, what is shared fixed, with the spread that their validation pairs choose.

        Everybody is the population where no spread has a gain larger than its error.
        """
        train, val = (
            [_Read(*self._differences(*batch.features), _without_features(batch)) for batch in batches]
            for batches in (self.train_pass(), self.val_pass())
        )
        count = torch.zeros_like(self.num_pairs)
        for read in train:
            count += torch.bincount(read.batch.user_index, minlength=self.num_users)
        self.num_pairs.copy_(self.sum_over_processes(count))
        losses = torch.zeros(len(self.scales), self.num_users, dtype=torch.float64, device=self.device)
        for found, number in zip(losses, self.scales, strict=True):
            weights = self._solve_all(train, number)[0]
            for design, offset, batch in val:
                margin = offset + (design * weights[batch.user_index]).sum(-1)
                found += held_out_losses(margin, batch, self.num_users)
        number = least_harmful_scale(self.scales, self.sum_over_processes(losses))
        self.scale.fill_(number)
        weights, precision = self._solve_all(train, number)
        self.weights.copy_(weights)
        without_pairs = (self.num_pairs == 0)[:, None, None]
        self.precision.copy_(torch.where(without_pairs, self._prior_precision(), precision))

    def _solve_all(self, train: list[_Read], scale: float) -> tuple[Tensor, Tensor]:
        """Weights ``(U, K)`` and precision ``(U, K, K)`` of all seen users; every process adds its own users."""
        weights, precision = torch.zeros_like(self.weights), torch.zeros_like(self.precision)
        for read in train:
            users, user = torch.unique(read.batch.user_index, return_inverse=True)
            pairs = self._pairs(read, user, len(users))
            weights[users], precision[users] = self._solve(pairs, self.scale.new_tensor(scale))
        return self.sum_over_processes(weights), self.sum_over_processes(precision)

    def report(self) -> dict[str, float]:
        """``scale``: the spread of users in units of the prior, 0 = none."""
        return {"scale": float(self.scale) * float(self.scale > NO_SPREAD)}

    def prior_row(self, name: str, state_dict: Mapping[str, Tensor]) -> Tensor | None:
        """The prior of the checkpoint."""
        width = self.weights.shape[1]
        return torch.eye(width) / (self.prior_scale * state_dict["scale"].cpu()) ** 2 if name == "precision" else None

    # ------------------------------------------------------------------ use
    @property
    def mixes(self) -> bool:
        """No: weights have any sign, and their axes are arbitrary."""
        return False

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        factors, offset = self._read(responses)
        return offset + (factors * users.tensors["weights"]).sum(-1)

    @torch.no_grad()
    def _adapt(self, context: Context) -> UserState:
        """The modes of the users' posteriors, what is shared fixed, and their precisions."""
        batch = context.pairs
        read = _Read(*self._differences(*batch.features), batch)
        weights, precision = self._solve(self._pairs(read, batch.user_index, context.num_users), self.scale)
        return UserState({"weights": weights, "precision": precision}, context.mask.sum(-1))

    def user_states(self, user_index: Tensor) -> UserState:
        """Weights of seen users and the precision of their posteriors, as last refreshed."""
        tensors = {"weights": self.weights[user_index], "precision": self.precision[user_index]}
        return UserState(tensors, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The prior: weights zero, as precisely known as it is."""
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        weights = self.weights.new_zeros(num_users, self.weights.shape[1])
        precision = self._prior_precision().repeat(num_users, 1, 1)
        return UserState({"weights": weights, "precision": precision}, num_pairs)

    def _prior_precision(self) -> Tensor:
        """``(K, K)``."""
        return torch.eye(self.weights.shape[1], device=self.device) / (self.prior_scale * self.scale).square()


def _without_features(batch: PreferenceBatch) -> PreferenceBatch:
    """Who stated which pairs: features of all pairs at once would be much to hold."""
    none = batch.weight.new_zeros(batch.num_pairs, 0)
    return batch._replace(chosen=none, rejected=none, prompt=None)
