"""LoRe: every user's reward is a mixture of a few basis rewards shared by all users.

Paper: Bose, Xiong, Chi, Du, Xiao, Fazel, "LoRe: Personalizing LLMs via Low-Rank Reward Modeling" (arXiv 2504.14439).
Reference code: facebookresearch/LoRe (CC-BY-NC-4.0; nothing is taken from it).
Deviations: ``simplex: true`` is the paper's model, with a correct reference head, a correct L2 anchor, renormalised
    pruning, factored logits and an exact few-shot solver. ``simplex: false``, the default, is our estimator: signed
    weights around the population, whose spread is learned, so that few pairs shrink to the population (see
    `evidence_losses`).

Axes: B pairs in a batch, N pairs of several users, D feature width, K bases, U users.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.functional import (
    PairList,
    Posterior,
    bt_losses,
    fit_gaussian,
    fit_simplex,
    fit_simplex_by_adam,
    flatten_context,
    padded_users,
    targets,
    unit_mean_per_user,
)
from plm.method import PersonalizationMethod
from plm.methods.lore.maths import (
    basis_margins,
    cosine_anchor,
    evidence_losses,
    kept_bases,
    l2_anchor,
    warm_up,
)
from plm.types import Context, PreferenceBatch, Tokens, UserState

PRIOR_SCALES = (1e-3, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3)
"""Candidates for the spread of users around the population, in units of the spread that training learned."""


class LoRe(PersonalizationMethod):
    """Low-rank reward: K basis rewards shared by all, K weights per user.

    Args:
        num_users: Number of seen users; linked from the data.
        feature_dim: Width D of the features; linked from the data.
        backbone: What makes the features; linked from the data.
        num_bases: Number of bases K. 0 = the backbone's own reward head, untrained; 1 = one reward for everybody.
        simplex: True = weights on the simplex, as published. False = the first basis is the population's reward, with
            weight one on average, and users deviate from it along all bases; the spread is learned.
        ridge: Precision of the normal prior on the population's reward (not with ``simplex``).
        basis_ridge: Precision of the normal prior on the other bases (not with ``simplex``).
        anchor: Pull bases to the backbone's own reward head, by cosine or by distance (only with ``simplex``).
        anchor_strength: Strength of the pull, reached by a warm-up over training.
        optimization: joint = bases and weights in one step; alternating = weights, then bases (with ``simplex``).
        prune_below: Leave out bases whose largest weight over users is lower, and renormalise (with ``simplex``).
        temperature: What margins are divided by; null = the root mean square length of a training difference. The
            paper's code uses 100.
        prior_precision: Pull of a new user's weights to the mean user (with ``simplex``); 0 as published.
        adapt_solver: newton = exact; adam = the published few-shot loop, for parity (with ``simplex``).
        lr: Learning rate of the bases.
        user_lr: Learning rate of the user weights (with ``simplex``); null = ``lr``.
    """

    view: ClassVar[Literal["features", "tokens", "latents"]] = "features"
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
        backbone: dict[str, Any] | None = None,
        num_bases: int = 8,
        simplex: bool = False,
        ridge: float = 0.06,
        basis_ridge: float = 1.0,
        anchor: Literal["none", "cosine", "l2"] = "none",
        anchor_strength: float = 0.0,
        optimization: Literal["joint", "alternating"] = "joint",
        prune_below: float = 0.0,
        temperature: float | None = None,
        prior_precision: float = 0.0,
        adapt_solver: Literal["newton", "adam"] = "newton",
        lr: float = 0.2,
        user_lr: float | None = None,
    ) -> None:
        super().__init__(num_users=num_users, feature_dim=feature_dim, backbone=backbone, lr=lr)
        self.num_bases, self.simplex, self.ridge, self.basis_ridge = num_bases, simplex, ridge, basis_ridge
        self.anchor, self.anchor_strength, self.optimization = anchor, anchor_strength, optimization
        self.prune_below, self.temperature, self.prior_precision = prune_below, temperature, prior_precision
        self.adapt_solver, self.user_lr = adapt_solver, lr if user_lr is None else user_lr
        self._check_arguments()
        width = max(num_bases, 1)
        self.weights: Tensor
        self.precision: Tensor
        self.num_pairs: Tensor
        self.prior_scale: Tensor
        self.mean_weights: Tensor
        self.kept: Tensor
        self.bases = torch.nn.Parameter(torch.randn(feature_dim, width), requires_grad=num_bases > 0)
        self.log_population_spread = torch.nn.Parameter(torch.tensor(-1.0), requires_grad=not simplex and num_bases > 1)
        if simplex:
            self.weights = torch.nn.Parameter(torch.randn(num_users, width), requires_grad=num_bases > 1)  # logits
        else:
            self.bases.data *= 0.3
            self.bases.data[:, 0] = 0.0
            self.register_buffer("weights", self._population(num_users))
        self.register_buffer("precision", torch.eye(width).expand(num_users, width, width).clone())
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("prior_scale", torch.ones(()))
        self.register_buffer("mean_weights", torch.full((width,), 1.0 / width))
        self.register_buffer("kept", torch.ones(width, dtype=torch.bool))
        self.automatic_optimization = num_bases > 0 and optimization == "joint"

    def _check_arguments(self) -> None:
        """Raise one error about everything that does not fit together."""
        problems = []
        if not self.num_bases >= 0:
            problems.append(f"model.num_bases: expected an integer >= 0, got {self.num_bases!r}")
        if self.temperature is not None and not self.temperature > 0:
            problems.append(f"model.temperature: expected a number > 0 or null, got {self.temperature!r}")
        for name in ("ridge", "basis_ridge", "anchor_strength", "prune_below", "prior_precision"):
            if not getattr(self, name) >= 0:
                problems.append(f"model.{name}: expected a number >= 0, got {getattr(self, name)!r}")
        published = {
            "anchor": self.anchor != "none",
            "optimization": self.optimization != "joint",
            "prune_below": self.prune_below > 0,
            "prior_precision": self.prior_precision > 0,
            "adapt_solver": self.adapt_solver != "newton",
        }
        if not self.simplex:
            problems += [
                f"model.{name}: acts only with model.simplex true, got {getattr(self, name)!r} with simplex false"
                for name, is_set in published.items()
                if is_set
            ]
        if (self.anchor == "none") != (self.anchor_strength == 0):
            problems.append(
                f"model.anchor and model.anchor_strength go together, got {self.anchor!r} and {self.anchor_strength!r}"
            )
        if problems:
            raise ValueError("\n".join(problems))

    # ------------------------------------------------------------------ shared by training and use
    def _bases(self) -> Tensor:
        """``(D, K)`` directions whose product with features are rewards; the reference head at K = 0."""
        bases = self.bases if self.num_bases else self.reference[:, None]
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
        self, projected: Tensor, scale: Tensor, target: Tensor, weight: Tensor, user: Tensor, num: int
    ) -> PairList:
        """The few-weights problem in units of the prior: ``projected`` ``(N, K)`` are margins along each basis."""
        return PairList(projected * (self._spread() * scale), projected[:, 0], target, weight, user, num)

    def _state(self, posterior: Posterior, scale: Tensor, num_pairs: Tensor) -> UserState:
        """Deviations in units of the prior -> weights and their precision."""
        unit = self._spread() * scale
        precision = posterior.precision / unit[:, None] / unit
        return UserState({"weights": self._population(1) + posterior.mean * unit, "precision": precision}, num_pairs)

    @property
    def _is_personal(self) -> bool:
        return self.num_bases > 1

    # ------------------------------------------------------------------ training
    def setup(self, stage: str) -> None:
        """Check that there is a reference head where one is needed."""
        super().setup(stage)
        if (self.num_bases == 0 or self.anchor != "none") and not self.reference.any():
            what = "model.num_bases 0" if self.num_bases == 0 else f"model.anchor {self.anchor}"
            raise ValueError(
                f"{what} needs the reward head of the backbone, but the backbone of these data has none; "
                "use a sequence-classification reward model as data.backbone"
            )

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Paper eq 10 with ``simplex``; else the evidence bound plus the priors of the bases."""
        assert isinstance(batch.chosen, Tensor) and isinstance(batch.rejected, Tensor)
        difference, target = batch.chosen - batch.rejected, targets(batch.tie).to(batch.chosen)
        if not self._is_personal or self.simplex:
            weights = self._seen_weights(batch.user_index) if self.simplex else self._population(batch.num_pairs)
            margin = basis_margins(difference, self._bases(), weights)
            nll = (batch.weight * bt_losses(margin, target)).mean()
        else:
            nll = self._evidence(batch, difference @ self._bases(), target)
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
        """The anchor with ``simplex``, else the normal priors of the bases, divided by the number of pairs."""
        if self.simplex or not self.num_bases:
            if self.anchor == "none":
                return self.bases.new_zeros(())
            pull = cosine_anchor if self.anchor == "cosine" else l2_anchor
            steps = max(float(self.trainer.estimated_stepping_batches), 1.0)
            return self.anchor_strength * warm_up(self._step_count() / steps) * pull(self.bases, self.reference)
        squares = self.bases.square().sum(0)
        return 0.5 * (self.ridge * squares[0] + self.basis_ridge * squares[1:].sum()) / self.num_train_pairs

    def _step_count(self) -> int:
        """Training batches so far; an alternating batch is two optimizer steps."""
        return self.trainer.global_step // (2 if self.optimization == "alternating" else 1)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One step; with ``alternating`` weights first, then bases at the new weights."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        found: Any = self.optimizers()
        if not self.num_bases:
            found.step()  # of size zero: Lightning writes no checkpoint before the first step
            return super().training_step(batch, batch_idx)
        for optimizer in found if isinstance(found, list) else [found]:  # no weights to fit at K = 1
            out = self.loss(batch)
            # the anchor has no gradient in the weights: only the step of the bases feels it
            optimizer.zero_grad()
            self.manual_backward(out["loss"], inputs=optimizer.param_groups[0]["params"])
            optimizer.step()
        self.log_dict({f"train/{key}": value.detach() for key, value in out.items()}, batch_size=batch.num_pairs)
        return out["loss"].detach()

    def param_groups(self) -> list[dict[str, Any]]:
        """Weights (with ``simplex``) at ``user_lr``, everything else at ``lr``."""
        users = [self.weights] if isinstance(self.weights, torch.nn.Parameter) and self.weights.requires_grad else []
        shared = [p for p in self.parameters() if p.requires_grad and not any(p is u for u in users)]
        groups = [{"params": users, "lr": self.user_lr}, {"params": shared, "lr": self.lr}]
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam; with ``alternating`` one each for weights and bases; our estimator decays linearly to zero."""
        if not self.num_bases:
            return torch.optim.SGD([self.bases], lr=0.0)
        if self.optimization == "alternating":
            return [torch.optim.Adam([group]) for group in self.param_groups()]
        optimizer = torch.optim.Adam(self.param_groups())
        if self.simplex:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            return optimizer
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1.0 - step / max(steps, 1), 0.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Solve every seen user's weights at the present bases; choose the spread with the lowest validation loss.

        The evidence of the training pairs overstates what they say where pairs of a user share responses or the bases
        have been fitted to these very users; validation pairs share nothing with them.
        """
        train = [self._project(batch) for batch in self.train_pass()]
        self.num_pairs.zero_()
        for _, _, _, index in train:
            self.num_pairs += torch.bincount(index, minlength=self.num_users)
        self.num_pairs.copy_(self.sum_over_processes(self.num_pairs))
        if not self._is_personal:
            return
        if self.simplex:
            self._refresh_simplex(train)
            return
        val = [self._project(batch) for batch in self.val_pass()]
        num_val = self.sum_over_processes(self.prior_scale.new_tensor(float(sum(len(part[-1]) for part in val))))
        best: tuple[float, Tensor, Tensor, Tensor] | None = None
        for number in PRIOR_SCALES:
            scale = self.prior_scale.new_tensor(number)
            weights, precision = self._solve(train, scale)
            losses = [
                (weight * bt_losses((projected * weights[index]).sum(-1), target)).double().sum()
                for projected, target, weight, index in val
            ]
            total = float(
                self.sum_over_processes(sum(losses, torch.zeros((), dtype=torch.float64, device=self.device)))
            )
            if best is None or total < best[0] or (num_val == 0 and number == 1.0):
                best = (total, scale, weights, precision)
        assert best is not None
        self.prior_scale.copy_(best[1])
        self.weights.copy_(best[2])
        self.precision.copy_(best[3])

    def _refresh_simplex(self, train: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        """Mean user, bases in use, and the curvature of every seen user's loss at its trained weights."""
        weights = torch.softmax(self.weights, -1)
        self.kept.copy_(kept_bases(weights, self.prune_below))
        weights = self._renormalised(weights)
        self.mean_weights.copy_(weights.mean(0))
        precision = torch.zeros_like(self.precision)
        for projected, target, weight, index in train:
            weight = unit_mean_per_user(weight, index, self.num_users)
            pairs = PairList(projected, torch.zeros_like(target), target, weight, index, self.num_users)
            for part in padded_users(pairs):
                precision[part.users] += part.derivatives(weights[part.users].double())[1].to(precision)
        eye = torch.eye(self.num_bases, device=self.device)
        pull = self.prior_precision * self.num_pairs.clamp_min(1)[:, None, None] * eye
        self.precision.copy_(self.sum_over_processes(precision) + pull)

    def _project(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Margins along each basis ``(B, K)``, target, weight and user of each pair."""
        assert isinstance(batch.chosen, Tensor) and isinstance(batch.rejected, Tensor)
        projected = (batch.chosen - batch.rejected) @ self._bases()
        return projected, targets(batch.tie).to(projected), batch.weight, batch.user_index

    def _solve(self, train: list[tuple[Tensor, Tensor, Tensor, Tensor]], scale: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(U, K)`` and precision ``(U, K, K)`` of all seen users; every process adds its own users."""
        weights, precision = torch.zeros_like(self.weights), torch.zeros_like(self.precision)
        known = torch.zeros(self.num_users, device=self.device)
        for projected, target, weight, index in train:
            users, user = torch.unique(index, return_inverse=True)
            weight = unit_mean_per_user(weight, user, len(users))
            posterior = fit_gaussian(self._pairs(projected, scale, target, weight, user, len(users)))
            state = self._state(posterior, scale, self.num_pairs[users])
            weights[users], precision[users] = state.tensors["weights"], state.tensors["precision"]
            known[users] = 1.0
        weights, precision, known = (self.sum_over_processes(value) for value in (weights, precision, known))
        prior = self.population_state(self.num_users)
        missing = known == 0
        weights = torch.where(missing[:, None], prior.tensors["weights"], weights)
        return weights, torch.where(missing[:, None, None], prior.tensors["precision"], precision)

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """``effective_bases``: participation ratio of the directions in which rewards of seen users differ."""
        if not self._is_personal:
            return {}
        weights, bases = (
            self.user_states(torch.arange(self.num_users)).tensors["weights"].double(),
            self._bases().double(),
        )
        spread = torch.cov(weights.T, correction=0) @ (bases.T @ bases)  # eigenvalues: variance along each direction
        total, squares = spread.trace(), (spread @ spread).trace()
        return {"effective_bases": float(total**2 / squares) if squares > 0 else 0.0}

    def prior_row(self, name: str, state_dict: Mapping[str, Tensor]) -> Tensor | None:
        """The population's row in the units of the checkpoint."""
        width = max(self.num_bases, 1)
        if name == "num_pairs" or not self._is_personal:
            return None
        if self.simplex:
            eye = torch.eye(width) * self.prior_precision
            return state_dict["mean_weights"].clamp_min(1e-30).log() if name == "weights" else eye
        spread = torch.ones(width)
        spread[0] = state_dict["log_population_spread"].exp()
        return (
            torch.eye(width)[0] if name == "weights" else torch.diag((spread * state_dict["prior_scale"].cpu()) ** -2)
        )

    # ------------------------------------------------------------------ use
    def _seen_weights(self, user_index: Tensor) -> Tensor:
        """``(B, K)`` weights of seen users."""
        rows = self.weights[user_index]
        return torch.softmax(rows, -1) if self.simplex else rows

    def _renormalised(self, weights: Tensor) -> Tensor:
        """Simplex weights without the pruned bases."""
        weights = weights * self.kept
        return weights / weights.sum(-1, keepdim=True)

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """Paper eq 7: ``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        return basis_margins(responses, self._bases(), users.tensors["weights"])

    def user_states(self, user_index: Tensor) -> UserState:
        """Weights and Laplace precision of seen users, as last refreshed."""
        weights = self._seen_weights(user_index)
        if self.simplex and self._is_personal:
            weights = self._renormalised(weights)
        tensors = {"weights": weights, "precision": self.precision[user_index]}
        return UserState(tensors, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The prior: with ``simplex`` the mean seen user, else weight one on the population's basis."""
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        width = max(self.num_bases, 1)
        precision = torch.eye(width, device=self.device)
        if not self._is_personal:
            weights = self._population(num_users)
        elif self.simplex:
            weights = self.mean_weights.expand(num_users, -1).clone()
            precision = precision * self.prior_precision
        else:
            weights = self._population(num_users)
            precision = precision / (self._spread() * self.prior_scale).square()
        return UserState({"weights": weights, "precision": precision.expand(num_users, -1, -1).clone()}, num_pairs)

    def _adapt(self, context: Context) -> UserState:
        """Paper eq 11 with ``simplex``; else the posterior mode under the learned prior. Bases stay fixed."""
        num_users, counts = context.num_users, context.mask.sum(-1)
        if not self._is_personal:
            return self.population_state(num_users)._replace(num_pairs=counts)
        with torch.no_grad():
            difference, target, weight, user = flatten_context(context)
            projected = difference @ self._bases()
            if not self.simplex:
                pairs = self._pairs(projected, self.prior_scale, target, weight, user, num_users)
                return self._state(fit_gaussian(pairs), self.prior_scale, counts)
            kept = self.kept
            pairs = PairList(projected[:, kept], torch.zeros_like(target), target, weight, user, num_users)
            centre = self.population_state(1).tensors["weights"][0, kept]
            fitted = fit_simplex(pairs, centre, self.prior_precision)
            if self.adapt_solver == "adam":
                fitted = fitted._replace(mean=fit_simplex_by_adam(pairs, centre))
            weights = projected.new_zeros(num_users, len(kept))
            weights[:, kept] = fitted.mean
            precision = self.prior_precision * torch.eye(len(kept), device=self.device).repeat(num_users, 1, 1)
            precision[:, kept.nonzero(), kept.nonzero()[:, 0]] = fitted.precision
            return UserState({"weights": weights, "precision": precision}, counts)
