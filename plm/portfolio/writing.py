"""WritingPortfolio: what portfolios share whose members are policies of a language model.

Axes: B texts, U users, S pairs of a user, R objectives, M members, P numbers of one member.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from plm.backbones import Backbone, Policy
from plm.functional import PairList, flatten_context
from plm.messages import Problems
from plm.method.abilities import Writer
from plm.methods.palm.routing import RoutedMethod
from plm.types import Context, PreferenceBatch, Tokens, UserState


class WritingPortfolio(RoutedMethod, Writer):
    """Few policies that serve everybody; ``plm portfolio`` makes it.

    A user writes with the member that is best for the user's weights. The reward of a user is the mix of objectives
    that the user's member was made for.

    A subclass keeps its members and sets ``objectives``, a backbone whose features are the objectives of a response,
    and ``sharpness``: nats by which the best value of an objective raises the log-odds that a user chooses a response
    over one of the worst.
    """

    objectives: Backbone
    sharpness: float

    @staticmethod
    def check_users(sharpness: float, prior_precision: float) -> None:
        """Check the options by which users are inferred.

        Raises:
            ValueError: If one of them is out of range.
        """
        problems = Problems()
        if not 0 < sharpness < math.inf:
            problems.add("sharpness", "a finite number of nats > 0", sharpness)
        problems.numbers(prior_precision=prior_precision)
        problems.check()

    # ------------------------------------------------------------------ members
    @abstractmethod
    def add(self, rows: Tensor) -> Tensor:
        """Add members, each described by a row ``(m, P)``; returns their numbers ``(m,)``."""

    @abstractmethod
    def keep(self, members: Sequence[int]) -> None:
        """Forget all but these members, in this order."""

    @property
    @abstractmethod
    def unaligned(self) -> Policy:
        """The language model as it is, where no member writes."""

    @abstractmethod
    def log_ratios(self, tokens: Tokens, member: int) -> Tensor:
        """Log-likelihood ratio ``(B,)`` of B responses, a member against the unaligned policy, in nats."""

    # ------------------------------------------------------------------ users
    def read(self, responses: Tensor | Tokens) -> Tensor:
        """Objectives ``(B, R)`` of B responses."""
        assert isinstance(responses, Tensor)  # they come as such
        return responses

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """The objectives, mixed as the user's member mixes them: ``(B,)``."""
        return (self.read(responses) * self.member_weights[users.tensors["member"]]).sum(-1)

    def _adapt(self, context: Context) -> UserState:
        """Weights by the convex fit to the objectives of both responses, then routed."""
        with torch.no_grad():
            context = context._replace(
                chosen=self._padded(context.chosen, context.mask), rejected=self._padded(context.rejected, context.mask)
            )
            difference, target, weight, user = flatten_context(context)
            design = self.sharpness * difference
            pairs = PairList(design, torch.zeros_like(target), target, weight, user, context.num_users)
            return self.inferred(pairs, context.mask.sum(-1))

    def _padded(self, texts: Tensor | Tokens, mask: Tensor) -> Tensor:
        """Objectives ``(U, S, R)`` of texts of a context."""
        if isinstance(texts, Tensor):
            return texts
        values = torch.zeros(*mask.shape, self.num_objectives, device=self.device)
        if mask.any():
            values[mask] = self.read(texts.take(mask))
        return values

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Refuse to be trained.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a portfolio of policies is made by plm portfolio, not trained by plm fit")
