"""RoutedMethod: what every portfolio that serves users shares: members, routing, and certificates.

Axes: U users, R objectives, M members, F planes of the upper bound.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from plm.arrays import Float64Array
from plm.functional import PairList, fit_simplex
from plm.method import PersonalizationMethod
from plm.methods.palm.search import solved_values, upper_planes
from plm.methods.palm.selection import Portfolio
from plm.types import UserState


def _row_products(weights: Tensor, vectors: Tensor) -> Tensor:
    """``(U, R)``, ``(F, R)`` -> ``(U, F)``: a matrix product of which no bit depends on who shares the batch."""
    products = weights[:, :1] * vectors[:, 0]
    for index in range(1, weights.shape[1]):
        products = products + weights[:, index : index + 1] * vectors[:, index]
    return products


class RoutedMethod(PersonalizationMethod):
    """A method whose users are points of a simplex, each served by the best member of a portfolio.

    A state holds the user's weights and their precision, the member, and the regret certified at these weights: a bound
    on the loss to what the portfolio's oracle can make, see `plm.methods.palm.selection.Portfolio.certificate`. Scores
    are by the mix that the user's member was made for, so that whoever chooses by them chooses as that member does.

    A subclass sets ``num_objectives`` and ``prior_precision``, the pull of a new user's weights to the mean user in
    nats per pair, and calls `add_portfolio` in its constructor.
    """

    user_tables: tuple[str, ...] = ("weights", "precision", "num_pairs")
    _of_any_length: ClassVar[tuple[str, ...]] = ("member_weights", "member_rewards", "member_costs", "planes")

    num_objectives: int
    prior_precision: float
    member_weights: Tensor
    member_rewards: Tensor
    member_costs: Tensor
    planes: Tensor
    centre: Tensor
    weights: Tensor
    precision: Tensor
    num_pairs: Tensor

    def add_portfolio(self) -> None:
        """Make the tables of one member and of users who have no pairs yet."""
        uniform, eye = torch.full((1, self.num_objectives), 1.0 / self.num_objectives), torch.eye(self.num_objectives)
        self.register_buffer("centre", uniform[0].clone())
        self.register_buffer("weights", uniform.repeat(self.num_users, 1))
        self.register_buffer("precision", eye.repeat(self.num_users, 1, 1) * self.prior_precision)
        self.register_buffer("num_pairs", torch.zeros(self.num_users, dtype=torch.long))
        self.register_buffer("member_weights", uniform.clone())
        self.register_buffer("member_rewards", torch.zeros(1, self.num_objectives))
        self.register_buffer("member_costs", torch.zeros(1))
        self.register_buffer("planes", torch.zeros(1, self.num_objectives))

    @torch.no_grad()
    def install(self, portfolio: Portfolio, users: Tensor | None = None) -> None:
        """Serve from a portfolio chosen elsewhere.

        Args:
            portfolio: Members and solved weights.
            users: ``(U, R)`` weights of the seen users, as given or inferred elsewhere; their mean becomes the centre.
        """
        if users is not None:
            self.weights.copy_(users)
            self.centre.copy_(users.mean(0))
        members, solved = portfolio.members, portfolio.solved
        self.member_weights = self._tensor(members.weights)
        self.member_rewards = self._tensor(members.rewards)
        self.member_costs = self._tensor(members.costs)
        self.planes = self._tensor(upper_planes(solved.weights, solved_values(solved) + portfolio.error))

    def _tensor(self, values: Float64Array) -> Tensor:
        return torch.as_tensor(values).to(self.centre)

    # ------------------------------------------------------------------ who is served by whom
    @property
    def net(self) -> Tensor:
        """``(M, R)`` rewards minus cost of each member, see `plm.methods.palm.oracle.PolicySet`."""
        return self.member_rewards - self.member_costs[:, None]

    @property
    def cold_start(self) -> int:
        """The member of an unknown user: the one whose worst regret is smallest if it serves everybody."""
        return int(self._single_regret().argmin())

    def _single_regret(self) -> Tensor:
        """``(M,)`` worst regret of each member alone; it is reached at a vertex of the simplex."""
        return (self.planes.max(0).values - self.net).max(1).values

    def route(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Best member and certified regret of each user: ``(U, R)`` -> ``(U,)`` int64 and ``(U,)``."""
        value, member = _row_products(weights, self.net).max(1)
        bound = _row_products(weights, self.planes).max(1).values
        return member, (bound - value).clamp_min(0)

    # ------------------------------------------------------------------ users
    def state_of(self, weights: Tensor, precision: Tensor, num_pairs: Tensor) -> UserState:
        """States of users with these weights ``(U, R)``, routed."""
        member, regret = self.route(weights)
        tensors = {"weights": weights, "precision": precision, "member": member, "regret": regret}
        return UserState(tensors, num_pairs)

    def user_states(self, user_index: Tensor) -> UserState:
        """Weights of seen users, as last solved or given, their member and certified regret."""
        users, row = torch.unique(user_index, return_inverse=True)
        return self.state_of(self.weights[users], self.precision[users], self.num_pairs[users]).take(row)

    def population_state(self, num_users: int) -> UserState:
        """The mean user's weights, served by the cold-start member, with the worst regret of that member."""
        device = self.centre.device
        tensors = {
            "weights": self.centre.repeat(num_users, 1),
            "precision": (torch.eye(self.num_objectives, device=device) * self.prior_precision).repeat(num_users, 1, 1),
            "member": torch.full((num_users,), self.cold_start, device=device),
            "regret": self._single_regret().min().repeat(num_users),
        }
        return UserState(tensors, torch.zeros(num_users, dtype=torch.long, device=device))

    def inferred(self, pairs: PairList, num_pairs: Tensor) -> UserState:
        """Users inferred from pairs and routed by their posterior mode; the cold-start member for those without.

        Args:
            pairs: Differences of the objectives, ``(N, R)``, of U users.
            num_pairs: ``(U,)`` int64.
        """
        fitted = fit_simplex(pairs, self.centre, self.prior_precision)
        state, prior = self.state_of(fitted.mean, fitted.precision, num_pairs), self.population_state(len(num_pairs))
        known = num_pairs > 0
        tensors = {
            name: torch.where(known.view(-1, *[1] * (value.dim() - 1)), value, prior.tensors[name])
            for name, value in state.tensors.items()
        }
        return UserState(tensors, num_pairs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Make room for as many members and planes as were saved."""
        for name in self._of_any_length:
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
