"""UserEmbedding: a learned vector per user enters the last layer of a shared network, the plain neural baseline.

Paper: none of its own; vectors around that of a generic user, who is trained along, are those of Li et al.,
    "Personalized Language Modeling from Personalized Human Feedback" (P-RLHF, arXiv 2402.05133).
Reference code: HumainLab/Personalized_RLHF (nothing is taken from it).
Deviations: a reward on frozen features instead of soft tokens of a policy. The paper serves a new user as the generic
    one; here the new user's vector is the mode of its posterior, the network fixed, and so are those of seen users once
    the network is trained. The network is added to the tuned Bradley-Terry model, and validation pairs choose the
    spread of users.

Axes: N pairs of several users, B responses, U users, D feature width, H hidden units, E width of a user's vector.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from plm.functional import bt_losses, targets
from plm.messages import Problems
from plm.method.factored import FactoredMethod
from plm.method.strangers import NO_SPREAD
from plm.types import PreferenceBatch


class UserEmbedding(FactoredMethod):
    """Bradley-Terry plus a network with a user's vector: ``w0 @ x + (out + F e_u) @ tanh(P x + bias)``.

    Vectors have a normal prior around zero, the generic user, and are trained along with the network.

    Args:
        embedding_dim: Width E of a user's vector.
        hidden_dim: Number H of hidden units.
        prior_scale: Standard deviation of the prior of the vectors.
        user_share: Share of the loss in which pairs are those of their users, instead of the generic user's; 0 =
            nothing is personal.
        residual: Whether the network is added to the tuned Bradley-Terry model of all users, trained before.
        ridge: Precision of the normal prior on the weights of the network.
        lr: Learning rate, decaying linearly to zero.
        **options: See `PersonalizationMethod`.
    """

    user_tables: tuple[str, ...] = ("vectors", *FactoredMethod.user_tables)
    scales = (NO_SPREAD, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
    search_space: ClassVar[dict[str, list[Any]]] = {
        "embedding_dim": [8, 16, 32],
        "prior_scale": [0.03, 0.1, 0.3],
        "ridge": [0.3, 1.0, 3.0],
        "lr": [0.003, 0.01, 0.03],
    }

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        *,
        embedding_dim: int = 16,
        hidden_dim: int = 64,
        prior_scale: float = 0.1,
        user_share: float = 0.5,
        residual: bool = True,
        ridge: float = 0.3,
        lr: float = 0.01,
        **options: Any,
    ) -> None:
        problems = Problems("model.")
        problems.integers(1, embedding_dim=embedding_dim, hidden_dim=hidden_dim)
        problems.positive(prior_scale=prior_scale)
        problems.numbers(ridge=ridge, lr=lr)
        problems.say(f"model.user_share: expected a share in [0, 1], got {user_share!r}", when=not 0 <= user_share <= 1)
        problems.check()
        super().__init__(num_users, feature_dim, lr=lr, **options)
        self.prior_scale, self.user_share, self.ridge, self.residual = prior_scale, user_share, ridge, residual
        self.hidden = torch.nn.Parameter(torch.randn(feature_dim, hidden_dim))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_dim))
        self.out = torch.nn.Parameter(torch.zeros(hidden_dim))
        self.mixing = torch.nn.Parameter(torch.randn(hidden_dim, embedding_dim) / hidden_dim**0.5)
        self.vectors = torch.nn.Parameter(torch.zeros(num_users, embedding_dim))
        self.add_users(embedding_dim)

    # ------------------------------------------------------------------ shared by training and use
    def _read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What a vector multiplies, and the reward of the generic user: ``(..., D)`` -> ``(..., E)`` and ``(...)``."""
        units = torch.tanh(features @ self.hidden / self.feature_scale + self.bias)
        generic = units @ self.out
        if self.residual:
            generic = generic + features @ self.bradley_terry
        return (units @ self.mixing).to(features), generic.to(features)

    # ------------------------------------------------------------------ training
    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the Bradley-Terry loss of users and generic user, plus the priors of vectors and network."""
        personal, generic = self._differences(*batch.features)
        vectors, target = self.vectors[batch.user_index], targets(batch.tie).to(generic)
        own, of_generic = (
            (batch.weight * bt_losses(margin, target)).mean()
            for margin in (generic + (personal * vectors).sum(-1), generic)
        )
        prior = self.vectors[torch.unique(batch.user_index)].square().sum() / (
            2 * self.prior_scale**2 * batch.num_pairs
        )
        squares = sum(value.square().sum() for value in (self.hidden, self.out, self.mixing))
        nll = self.user_share * (own + prior) + (1 - self.user_share) * of_generic
        return {"loss": nll + 0.5 * self.ridge * squares / self.num_train_pairs, "nll": own}

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """``scale``: the spread of users in units of the prior, 0 = none; ``spread``: of their vectors, likewise."""
        return {**super().report(), "spread": float(self.weights.square().mean().sqrt()) / self.prior_scale}
