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

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.functional import PairList, bt_losses, fit_gaussian, flatten_context, per_user_sum, targets, unit_mean_per_user
from plm.messages import Problems
from plm.method import PersonalizationMethod
from plm.method.strangers import NO_SPREAD, Candidates
from plm.optimizer import with_decay
from plm.types import Context, PreferenceBatch, Tokens, UserState

SCALES = (NO_SPREAD, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
"""Candidates for the spread of users, in units of the prior, chosen on validation pairs."""


class UserEmbedding(PersonalizationMethod):
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

    view: ClassVar[Literal["features", "tokens", "latents"]] = "features"
    user_tables: tuple[str, ...] = ("vectors", "weights", "precision", "num_pairs")
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
        self.weights: Tensor
        self.precision: Tensor
        self.num_pairs: Tensor
        self.scale: Tensor
        self.hidden = torch.nn.Parameter(torch.randn(feature_dim, hidden_dim))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_dim))
        self.out = torch.nn.Parameter(torch.zeros(hidden_dim))
        self.mixing = torch.nn.Parameter(torch.randn(hidden_dim, embedding_dim) / hidden_dim**0.5)
        self.vectors = torch.nn.Parameter(torch.zeros(num_users, embedding_dim))
        self.register_buffer("weights", torch.zeros(num_users, embedding_dim))
        self.register_buffer("precision", torch.eye(embedding_dim).repeat(num_users, 1, 1))
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("scale", torch.ones(()))

    # ------------------------------------------------------------------ shared by training and use
    def _read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Reward of the generic user, and what a vector multiplies: ``(..., D)`` -> ``(...)`` and ``(..., E)``.

        Also under autocast in the precision of the features, in which users are solved and kept.
        """
        units = torch.tanh(features @ self.hidden / self.feature_scale + self.bias)
        generic = units @ self.out
        if self.residual:
            generic = generic + features @ self.bradley_terry
        return generic.to(features), (units @ self.mixing).to(features)

    def _differences(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """What `_read` gives of chosen less what it gives of rejected."""
        (generic, personal), (other_generic, other_personal) = map(self._read, (chosen, rejected))
        return generic - other_generic, personal - other_personal

    def _solve(
        self, pairs: tuple[Tensor, Tensor], target: Tensor, weight: Tensor, user: Tensor, num_users: int, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Modes ``(U, E)`` and precisions of the posteriors; ``scale`` is that of the prior, the least one is none."""
        (generic, personal), spread = pairs, self.prior_scale * scale
        posterior = fit_gaussian(PairList(personal * spread, generic, target, weight, user, num_users))
        return posterior.mean * spread * (scale > NO_SPREAD), posterior.precision / spread.square()

    # ------------------------------------------------------------------ training
    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the Bradley-Terry loss of users and generic user, plus the priors of vectors and network."""
        generic, personal = self._differences(*batch.features)
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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, whose learning rate decays linearly to zero."""
        return with_decay(torch.optim.Adam(self.param_groups()), self.trainer.estimated_stepping_batches)

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Solve all seen users' vectors, the network fixed, with the spread that their validation pairs choose.

        Everybody is the generic user where no spread has a gain larger than its error.
        """
        count = torch.zeros_like(self.num_pairs)
        train = []
        for batch in self.train_pass():
            weight = unit_mean_per_user(batch.weight, batch.user_index, self.num_users)
            target = targets(batch.tie).to(weight)
            train.append((self._differences(*batch.features), target, weight, batch.user_index))
            count += torch.bincount(batch.user_index, minlength=self.num_users)
        self.num_pairs.copy_(self.sum_over_processes(count))
        val = [(self._differences(*batch.features), batch) for batch in self.val_pass()]
        candidates: Candidates[tuple[float, Tensor, Tensor]] = Candidates(default=SCALES.index(1.0))
        for number in SCALES:
            weights, precision = torch.zeros_like(self.weights), torch.zeros_like(self.precision)
            for pairs, target, weight, index in train:
                users, user = torch.unique(index, return_inverse=True)
                scale = self.scale.new_tensor(number)
                weights[users], precision[users] = self._solve(pairs, target, weight, user, len(users), scale)
            solved = number, self.sum_over_processes(weights), self.sum_over_processes(precision)
            candidates.add(self.sum_over_processes(self._val_losses(val, solved[1])), solved)
        number, weights, precision = candidates.choose()[1]
        without_pairs = (self.num_pairs == 0)[:, None, None]
        self.scale.fill_(number)
        self.weights.copy_(weights)
        self.precision.copy_(torch.where(without_pairs, self._prior_precision(), precision))

    def _val_losses(self, val: list[tuple[tuple[Tensor, Tensor], PreferenceBatch]], vectors: Tensor) -> Tensor:
        """Summed loss of the validation pairs of every user with vectors ``(U, E)``: ``(U,)``."""
        losses = torch.zeros(self.num_users, dtype=torch.float64, device=self.device)
        for (generic, personal), batch in val:
            margin = generic + (personal * vectors[batch.user_index]).sum(-1)
            loss = batch.weight * bt_losses(margin, targets(batch.tie).to(margin))
            losses += per_user_sum(loss.double(), batch.user_index, self.num_users)
        return losses

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """``scale``: the spread of users in units of the prior, 0 = none; ``spread``: of their vectors, likewise."""
        scale = float(self.scale) * float(self.scale > NO_SPREAD)
        return {"scale": scale, "spread": float(self.weights.square().mean().sqrt()) / self.prior_scale}

    def prior_row(self, name: str, state_dict: Mapping[str, Tensor]) -> Tensor | None:
        """The generic user of the checkpoint."""
        width = self.weights.shape[1]
        return torch.eye(width) / (self.prior_scale * state_dict["scale"].cpu()) ** 2 if name == "precision" else None

    # ------------------------------------------------------------------ use
    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        generic, personal = self._read(responses)
        return generic + (personal * users.tensors["weights"]).sum(-1)

    @torch.no_grad()
    def _adapt(self, context: Context) -> UserState:
        """The modes of the users' posteriors, the network fixed."""
        _, target, weight, user = flatten_context(context)
        pairs = self._differences(*context.pairs.features)
        weights, precision = self._solve(pairs, target, weight, user, context.num_users, self.scale)
        return UserState({"weights": weights, "precision": precision}, context.mask.sum(-1))

    def user_states(self, user_index: Tensor) -> UserState:
        """Vectors of seen users and the precision of their posteriors, as last refreshed."""
        tensors = {"weights": self.weights[user_index], "precision": self.precision[user_index]}
        return UserState(tensors, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The generic user, as precisely known as the prior is."""
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        tensors = {
            "weights": self.weights.new_zeros(num_users, self.weights.shape[1]),
            "precision": self._prior_precision().repeat(num_users, 1, 1),
        }
        return UserState(tensors, num_pairs)

    def _prior_precision(self) -> Tensor:
        """``(E, E)``."""
        return torch.eye(self.weights.shape[1], device=self.device) / (self.prior_scale * self.scale).square()
