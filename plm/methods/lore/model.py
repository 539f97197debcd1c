"""LoRe: every user's reward is a mixture of a few basis rewards shared by all users.

Paper: Bose, Xiong, Chi, Du, Xiao, Fazel, "LoRe: Personalizing LLMs via Low-Rank Reward Modeling" (arXiv 2504.14439).
Reference code: facebookresearch/LoRe (CC-BY-NC-4.0; nothing is taken from it).
Deviations: the estimator is ours: signed weights around the population, whose spread is learned, so that few pairs
    shrink to the population (see `evidence_losses`). `plm.methods.lore.PublishedLoRe` is the paper's.

Axes: B pairs in a batch, N pairs of several users, D feature width, K bases, U users.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.functional import (
    PairList,
    Posterior,
    bt_losses,
    fit_gaussian,
    flatten_context,
    per_user_sum,
    project,
    unit_mean_per_user,
    user_chunks,
)
from plm.messages import Problems
from plm.method.abilities import Explainable
from plm.method.linear import LinearMethod
from plm.method.strangers import NO_SPREAD, chance_of_difference, least_harmful_scale, meet_strangers
from plm.methods.lore.maths import (
    ProjectedPairs,
    basis_margins,
    effective_bases,
    evidence_losses,
    pair_counts,
    projected_pairs,
)
from plm.optimizer import with_decay
from plm.types import Context, PreferenceBatch, Tokens, UserState

PRIOR_SCALES = (NO_SPREAD, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3)
"""Candidates for the spread of users around the population, in units of the spread that training learned."""


class LoRe(LinearMethod, Explainable):
    """Low-rank reward: K basis rewards shared by all, K weights per user.

    The first basis is the population's reward, with weight one on average; users deviate from it along all bases, and
    how far they do is learned.

    Args:
        num_bases: Number of bases K. 0 = the backbone's own reward head, untrained; 1 = one reward for everybody.
        ridge: Precision of the normal prior on the population's reward; null = that of the Bradley-Terry model of all
            users with the lowest validation loss.
        basis_ridge: Precision of the normal prior on the other bases.
        temperature: What margins are divided by; null = the root mean square length of a training difference.
        lr: Learning rate, decaying linearly to zero.
        **options: See `PersonalizationMethod`.
    """

    user_tables: tuple[str, ...] = ("weights", "precision", "num_pairs")
    search_space: ClassVar[dict[str, list[Any]]] = {
        "num_bases": [4, 8, 16, 32],
        "ridge": [0.02, 0.06, 0.2],
        "basis_ridge": [0.3, 1.0, 3.0],
    }

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        *,
        num_bases: int = 8,
        ridge: float | None = None,
        basis_ridge: float = 1.0,
        temperature: float | None = None,
        lr: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(num_users, feature_dim, lr=lr, **options)
        problems = Problems("model.")
        problems.integers(0, num_bases=num_bases)
        problems.positive(temperature=temperature)
        problems.numbers(ridge=ridge, basis_ridge=basis_ridge, lr=lr)
        problems.check()
        self.num_bases, self.ridge, self.basis_ridge, self.temperature = num_bases, ridge, basis_ridge, temperature
        width = max(num_bases, 1)
        self.weights: Tensor
        self.precision: Tensor
        self.num_pairs: Tensor
        self.prior_scale: Tensor
        bases = torch.randn(feature_dim, width) * 0.3
        bases[:, 0] = 0.0
        self.bases = torch.nn.Parameter(bases, requires_grad=num_bases > 0)
        self.log_population_spread = torch.nn.Parameter(torch.tensor(-1.0), requires_grad=num_bases > 1)
        self.register_buffer("weights", self._population(num_users))
        self.register_buffer("precision", torch.eye(width).expand(num_users, width, width).clone())
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("prior_scale", torch.ones(()))
        self.automatic_optimization = num_bases > 0

    # ------------------------------------------------------------------ shared by training and use
    def _bases(self) -> Tensor:
        """``(D, K)`` directions whose product with features are rewards; the reference head at K = 0."""
        bases = self.bases if self.num_bases else self.reference_direction[:, None]
        if self.temperature is None:
            return bases / self.feature_scale if self.num_bases else bases
        return bases / self.temperature

    def _population(self, num_users: int) -> Tensor:
        """``(U, K)`` weight one on the first basis."""
        weights = torch.zeros(num_users, max(self.num_bases, 1), device=self.device)
        weights[:, 0] = 1.0
        return weights

    def _spread(self) -> Tensor:
        """``(K,)`` prior standard deviation of the weights; the bases carry their own, except the population's."""
        others = torch.ones(self.num_bases - 1, device=self.device)
        return torch.cat([self.log_population_spread.exp()[None], others])

    def _pairs(
        self, projected: Tensor, scale: Tensor, target: Tensor, weight: Tensor, user: Tensor, num_users: int
    ) -> PairList:
        """Pairs of a fit in units of the prior, from the margins along each basis ``(N, K)``."""
        return PairList(projected * (self._spread() * scale), projected[:, 0], target, weight, user, num_users)

    def _state(self, posterior: Posterior, scale: Tensor, num_pairs: Tensor) -> UserState:
        """Turn deviations in units of the prior into weights and their precision; the least spread is none."""
        unit = self._spread() * scale
        precision = posterior.precision / unit[:, None] / unit
        deviation = posterior.mean * unit * (scale > NO_SPREAD)
        return UserState({"weights": self._population(1) + deviation, "precision": precision}, num_pairs)

    @property
    def _is_personal(self) -> bool:
        return self.num_bases > 1

    # ------------------------------------------------------------------ training
    def setup(self, stage: str) -> None:
        """Check that there is a reference head where one is needed."""
        super().setup(stage)
        if self.num_bases == 0 and not self.reference.any():
            raise ValueError(
                "model.num_bases 0 needs the reward head of the backbone, but the backbone of these data has none; "
                "use a sequence-classification reward model as data.backbone"
            )

    def before_first_step(self) -> None:
        """Cross-fit the spread that unseen users are adapted with; then start from the Bradley-Terry model of all."""
        if self._is_personal:
            meet_strangers(self, self.prior_scale, PRIOR_SCALES)
            unit = self.feature_scale if self.temperature is None else self.temperature
            with torch.no_grad():
                if not self.bases[:, 0].any():  # else an earlier fit goes on
                    self.bases[:, 0] = self.bradley_terry * unit

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the evidence bound plus the priors of the bases; with one basis, its Bradley-Terry loss."""
        pairs = projected_pairs(batch, self._bases())
        if self._is_personal:
            nll = self._evidence(batch, pairs.margins, pairs.target)
        else:
            nll = (pairs.weight * bt_losses(pairs.margins[:, 0], pairs.target)).mean()
        return {"loss": nll + self._penalty(), "nll": nll}

    def _evidence(self, batch: PreferenceBatch, projected: Tensor, target: Tensor) -> Tensor:
        """Weighted mean of `evidence_losses` at the posteriors of the batch's users; their last ones are the start."""
        users, user = torch.unique(batch.user_index, return_inverse=True)
        weight = unit_mean_per_user(batch.weight, user, len(users))
        pairs = self._pairs(projected, torch.ones_like(self.prior_scale), target, weight, user, len(users))
        with torch.no_grad():
            start = (self.weights[users] - self._population(1)) / self._spread()
            detached = pairs._replace(design=pairs.design.detach(), offset=pairs.offset.detach())
            posterior = fit_gaussian(detached, start=start)
            self.weights[users] = self._population(1) + posterior.mean * self._spread()
        losses = evidence_losses(pairs.design, pairs.offset, target, posterior, user)
        return (batch.weight * losses).mean()

    def _penalty(self) -> Tensor:
        """The normal priors of the bases, divided by the number of pairs."""
        if not self.num_bases:
            return self.bases.new_zeros(())
        squares = self.bases.square().sum(0)
        ridge = self.bradley_terry_ridge if self.ridge is None else self.ridge
        return 0.5 * (ridge * squares[0] + self.basis_ridge * squares[1:].sum()) / self.num_train_pairs

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One step; without bases of size zero, for Lightning writes no checkpoint before the first step."""
        if not self.num_bases:
            optimizer: Any = self.optimizers()
            optimizer.step()
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, whose learning rate decays linearly to zero."""
        if not self.num_bases:
            return torch.optim.SGD([self.bases], lr=0.0)
        return with_decay(torch.optim.Adam(self.param_groups()), self.trainer.estimated_stepping_batches)

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Solve every seen user's weights at the present bases, at the spread that their validation pairs choose.

        The evidence of the training pairs overstates what they say where pairs of a user share responses or the bases
        have been fitted to these very users; validation pairs share nothing with them. Unseen users are adapted with
        the spread that was cross-fitted, where there are enough users for it.
        """
        train = [projected_pairs(batch, self._bases()) for batch in self.train_pass()]
        self.num_pairs.copy_(self.sum_over_processes(pair_counts(train, self.num_users, self.device)))
        if not self._is_personal:
            return
        val = [projected_pairs(batch, self._bases()) for batch in self.val_pass()]
        scales = map(self.prior_scale.new_tensor, PRIOR_SCALES)
        losses = torch.stack([self._val_losses(val, self._solve(train, scale)[0]) for scale in scales])
        scale = self.prior_scale.new_tensor(least_harmful_scale(PRIOR_SCALES, self.sum_over_processes(losses)))
        weights, precision = self._solve(train, scale)  # precisions of all candidates at once would be much to hold
        self.weights.copy_(weights)
        self.precision.copy_(precision)
        self.prior_scale.copy_(scale if self.stranger_scale < 0 else self.stranger_scale)
        self.precision[self.num_pairs == 0] = self.population_state(1).tensors["precision"]

    def _val_losses(self, val: list[ProjectedPairs], weights: Tensor) -> Tensor:
        """Summed loss of the validation pairs of every user with weights ``(U, K)``: ``(U,)``."""
        losses = torch.zeros(self.num_users, dtype=torch.float64, device=self.device)
        for projected, target, weight, user in val:
            loss = weight * bt_losses((projected * weights[user]).sum(-1), target)
            losses += per_user_sum(loss.double(), user, self.num_users)
        return losses

    def _solve(self, train: list[ProjectedPairs], scale: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(U, K)`` and precision ``(U, K, K)`` of all seen users; every process adds its own users.

        Users without pairs have the population's weights, and no precision yet.
        """
        weights, precision = torch.zeros_like(self.weights), torch.zeros_like(self.precision)
        for part in train:
            users, user = torch.unique(part.user, return_inverse=True)
            for chunk in user_chunks(user, len(users), self.num_bases, own=self.num_bases**2):
                projected, target, weight = (value[chunk.rows] for value in part[:3])
                weight = unit_mean_per_user(weight, chunk.user, len(chunk.users))
                pairs = self._pairs(projected, scale, target, weight, chunk.user, len(chunk.users))
                rows = users[chunk.users]
                state = self._state(fit_gaussian(pairs), scale, self.num_pairs[rows])
                weights[rows], precision[rows] = state.tensors["weights"], state.tensors["precision"]
        weights, precision = self.sum_over_processes(weights), self.sum_over_processes(precision)
        weights[self.num_pairs == 0] = self._population(1)
        return weights, precision

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """``effective_bases``: in how many directions the rewards of seen users differ."""
        if not self._is_personal:
            return {}
        return {"effective_bases": effective_bases(self.weights.double(), self._bases().double())}

    def prior_row(self, name: str, state_dict: Mapping[str, Tensor]) -> Tensor | None:
        """The population's row in the units of the checkpoint."""
        if name == "num_pairs" or not self._is_personal:
            return None
        if name == "weights":
            return torch.eye(self.num_bases)[0]
        spread = torch.ones(self.num_bases)
        spread[0] = state_dict["log_population_spread"].exp()
        return torch.diag((spread * state_dict["prior_scale"].cpu()) ** -2)

    # ------------------------------------------------------------------ use
    @property
    def mixes(self) -> bool:
        """No: weights have any sign, and their axes are arbitrary."""
        return False

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """Paper eq 7: ``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        return basis_margins(responses, self._bases(), users.tensors["weights"])

    def user_states(self, user_index: Tensor) -> UserState:
        """Weights and Laplace precision of seen users, as last refreshed."""
        tensors = {"weights": self.weights[user_index], "precision": self.precision[user_index]}
        return UserState(tensors, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The prior: weight one on the population's basis."""
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        precision = torch.eye(max(self.num_bases, 1), device=self.device)
        if self._is_personal:
            precision = precision / (self._spread() * self.prior_scale).square()
        tensors = {"weights": self._population(num_users), "precision": precision.repeat(num_users, 1, 1)}
        return UserState(tensors, num_pairs)

    def _adapt(self, context: Context) -> UserState:
        """The posterior mean, by Laplace's approximation, where a user may also be as the population is; fixed bases.

        The precision is that of a user who differs.
        """
        num_users, counts = context.num_users, context.mask.sum(-1)
        if not self._is_personal:
            return self.population_state(num_users)._replace(num_pairs=counts)
        with torch.no_grad():
            difference, target, weight, user = flatten_context(context)
            pairs = self._pairs(project(difference, self._bases()), self.prior_scale, target, weight, user, num_users)
            posterior = fit_gaussian(pairs)
            own = pairs.offset + (pairs.design * posterior.mean[user]).sum(-1)
            chance = chance_of_difference(posterior, own, pairs.offset, target, weight, user)
            posterior = posterior._replace(mean=chance[:, None] * posterior.mean)
            return self._state(posterior, self.prior_scale, counts)
