"""LoRe as published: weights on the simplex, trained together with the bases.

Paper: Bose, Xiong, Chi, Du, Xiao, Fazel, "LoRe: Personalizing LLMs via Low-Rank Reward Modeling" (arXiv 2504.14439).
Reference code: facebookresearch/LoRe (CC-BY-NC-4.0; nothing is taken from it).
Deviations: a correct reference head, a correct L2 anchor, renormalised pruning, factored logits, an exact few-shot
    solver; margins count in units of the training differences unless ``temperature`` says otherwise.

Axes: B pairs in a batch, D feature width, K bases, U users.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.functional import (
    PairList,
    Posterior,
    bt_losses,
    curvature,
    fit_simplex,
    fit_simplex_by_adam,
    flatten_context,
    project,
    unit_mean_per_user,
)
from plm.messages import Problems
from plm.method.abilities import Explainable
from plm.method.linear import LinearMethod
from plm.methods.lore.maths import (
    basis_margins,
    cosine_anchor,
    effective_bases,
    kept_bases,
    l2_anchor,
    pair_counts,
    projected_pairs,
    warm_up,
)
from plm.types import Context, PreferenceBatch, Tokens, UserState


class PublishedLoRe(LinearMethod, Explainable):
    """Low-rank reward as published: K basis rewards shared by all, a point of the simplex per user.

    Args:
        num_bases: Number of bases K; 1 = one reward for everybody.
        anchor: Pull bases to the backbone's own reward head, by cosine or by distance.
        anchor_strength: Strength of the pull, reached by a warm-up over training.
        optimization: joint = bases and weights in one step; alternating = weights, then bases.
        prune_below: Leave out bases whose largest weight over users is lower, and renormalise.
        temperature: What margins are divided by; null = the root mean square length of a training difference. The
            paper's code uses 100.
        prior_precision: Pull of a new user's weights to the mean user; 0 as published.
        adapt_solver: newton = exact; adam = the published few-shot loop, for parity.
        lr: Learning rate of the bases.
        user_lr: Learning rate of the user weights; null = ``lr``.
        **options: See `PersonalizationMethod`.
    """

    user_tables: tuple[str, ...] = ("weight_logits", "precision", "num_pairs")

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        *,
        num_bases: int = 8,
        anchor: Literal["none", "cosine", "l2"] = "none",
        anchor_strength: float = 0.0,
        optimization: Literal["joint", "alternating"] = "joint",
        prune_below: float = 0.0,
        temperature: float | None = None,
        prior_precision: float = 0.0,
        adapt_solver: Literal["newton", "adam"] = "newton",
        lr: float = 0.2,
        user_lr: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_users, feature_dim, lr=lr, **options)
        problems = Problems("model.")
        problems.integers(1, num_bases=num_bases)
        problems.positive(temperature=temperature)
        problems.numbers(anchor_strength=anchor_strength, prune_below=prune_below, prior_precision=prior_precision)
        problems.numbers(lr=lr, user_lr=user_lr)
        problems.say(
            f"model.anchor and model.anchor_strength go together, got {anchor!r} and {anchor_strength!r}",
            when=(anchor == "none") != (anchor_strength == 0),
        )
        problems.check()
        self.num_bases, self.anchor, self.anchor_strength = num_bases, anchor, anchor_strength
        self.optimization, self.prune_below, self.temperature = optimization, prune_below, temperature
        self.prior_precision, self.adapt_solver = prior_precision, adapt_solver
        self.user_lr = lr if user_lr is None else user_lr
        self.precision: Tensor
        self.num_pairs: Tensor
        self.mean_weights: Tensor
        self.kept: Tensor
        self.bases = torch.nn.Parameter(torch.randn(feature_dim, num_bases))
        self.weight_logits = torch.nn.Parameter(torch.randn(num_users, num_bases), requires_grad=num_bases > 1)
        self.register_buffer("precision", torch.eye(num_bases).expand(num_users, num_bases, num_bases).clone())
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("mean_weights", torch.full((num_bases,), 1.0 / num_bases))
        self.register_buffer("kept", torch.ones(num_bases, dtype=torch.bool))
        self.automatic_optimization = optimization == "joint"

    def _bases(self) -> Tensor:
        """``(D, K)`` directions whose product with features are rewards."""
        return self.bases / (self.feature_scale if self.temperature is None else self.temperature)

    # ------------------------------------------------------------------ training
    def setup(self, stage: str) -> None:
        """Check that there is a reference head where one is needed."""
        super().setup(stage)
        if self.anchor != "none" and not self.reference.any():
            raise ValueError(
                f"model.anchor {self.anchor} needs the reward head of the backbone, but the backbone of these data has "
                "none; use a sequence-classification reward model as data.backbone"
            )

    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Paper eq 10, plus the anchor."""
        pairs = projected_pairs(batch, self._bases())
        margin = (pairs.margins * torch.softmax(self.weight_logits[pairs.user], -1)).sum(-1)
        nll = (pairs.weight * bt_losses(margin, pairs.target)).mean()
        return {"loss": nll + self._pull(), "nll": nll}

    def _pull(self) -> Tensor:
        """The anchor, as strong as it is at this step; an alternating batch is a step of every optimizer."""
        if self.anchor == "none":
            return self.bases.new_zeros(())
        num_steps = max(float(self.trainer.estimated_stepping_batches), 1.0)
        step = self.trainer.global_step // len(self.trainer.optimizers)
        distance = cosine_anchor if self.anchor == "cosine" else l2_anchor
        return self.anchor_strength * warm_up(step / num_steps) * distance(self.bases, self.reference_direction)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One step; with ``alternating`` weights first, then bases at the new weights."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        batch = self.training_batch(batch)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:  # no weights to fit at K = 1
            out = self.loss(batch)
            # the anchor has no gradient in the weights: only the step of the bases feels it
            optimizer.zero_grad()
            self.manual_backward(out["loss"], inputs=optimizer.param_groups[0]["params"])
            optimizer.step()
        self.log_dict({f"train/{key}": value.detach() for key, value in out.items()}, batch_size=batch.num_pairs)
        return out["loss"].detach()

    def param_groups(self) -> list[dict[str, Any]]:
        """Weights at ``user_lr``, then bases at ``lr``."""
        rates = ((self.weight_logits, self.user_lr), (self.bases, self.lr))
        return [{"params": [value], "lr": lr} for value, lr in rates if value.requires_grad]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam; with ``alternating`` one each for weights and bases."""
        if self.optimization == "alternating":
            return [torch.optim.Adam([group]) for group in self.param_groups()]
        return torch.optim.Adam(self.param_groups())

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Mean user, bases in use, and the curvature of every seen user's loss at its trained weights."""
        parts = [projected_pairs(batch, self._bases()) for batch in self.train_pass()]
        self.num_pairs.copy_(self.sum_over_processes(pair_counts(parts, self.num_users, self.device)))
        weights = torch.softmax(self.weight_logits, -1)
        self.kept.copy_(kept_bases(weights, self.prune_below))
        weights = self._renormalised(weights)
        self.mean_weights.copy_(weights.mean(0))
        precision = torch.zeros_like(self.precision)
        for margins, target, weight, user in parts:
            weight = unit_mean_per_user(weight, user, self.num_users)
            pairs = PairList(margins, torch.zeros_like(target), target, weight, user, self.num_users)
            precision += curvature(pairs, weights)
        eye = torch.eye(self.num_bases, device=self.device)
        pull = self.prior_precision * self.num_pairs.clamp_min(1)[:, None, None] * eye
        self.precision.copy_(self.sum_over_processes(precision) + pull)

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """``effective_bases``: in how many directions the rewards of seen users differ; nothing of one base."""
        if self.num_bases == 1:
            return {}
        weights = self._renormalised(torch.softmax(self.weight_logits, -1))
        return {"effective_bases": effective_bases(weights.double(), self._bases().double())}

    def prior_row(self, name: str, state_dict: Mapping[str, Tensor]) -> Tensor | None:
        """The mean user of the checkpoint."""
        if name == "weight_logits":
            return state_dict["mean_weights"].clamp_min(1e-30).log()
        return torch.eye(self.num_bases) * self.prior_precision if name == "precision" else None

    # ------------------------------------------------------------------ use
    @property
    def mixes(self) -> bool:
        """Yes: weights are a point of the simplex."""
        return True

    def _renormalised(self, weights: Tensor) -> Tensor:
        """Simplex weights without the pruned bases."""
        weights = weights * self.kept
        return weights / weights.sum(-1, keepdim=True)

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """Paper eq 7: ``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        return basis_margins(responses, self._bases(), users.tensors["weights"])

    def user_states(self, user_index: Tensor) -> UserState:
        """Weights of seen users, and the curvature of their losses as last refreshed."""
        weights = self._renormalised(torch.softmax(self.weight_logits[user_index], -1))
        return UserState({"weights": weights, "precision": self.precision[user_index]}, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The mean seen user."""
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        precision = self.prior_precision * torch.eye(self.num_bases, device=self.device)
        weights = self.mean_weights.expand(num_users, -1).clone()
        return UserState({"weights": weights, "precision": precision.repeat(num_users, 1, 1)}, num_pairs)

    def _adapt(self, context: Context) -> UserState:
        """Paper eq 11; bases stay fixed."""
        num_users, kept = context.num_users, self.kept
        with torch.no_grad():
            difference, target, weight, user = flatten_context(context)
            margins = project(difference, self._bases())[:, kept]
            pairs = PairList(margins, torch.zeros_like(target), target, weight, user, num_users)
            centre = self.population_state(1).tensors["weights"][0, kept]
            fitted = fit_simplex(pairs, centre, self.prior_precision)
            if self.adapt_solver == "adam":
                mean, count = fit_simplex_by_adam(pairs, centre), context.mask.sum(-1).clamp_min(1)
                pull = self.prior_precision * count[:, None, None] * torch.eye(len(centre), device=self.device)
                fitted = Posterior(mean, curvature(pairs, mean) + pull)
            state = self.population_state(num_users)
            weights, precision = torch.zeros_like(state.tensors["weights"]), state.tensors["precision"]
            weights[:, kept] = fitted.mean
            precision[:, kept.nonzero(), kept.nonzero()[:, 0]] = fitted.precision
            return UserState({"weights": weights, "precision": precision}, context.mask.sum(-1))
