"""MRM: a shared initial weight vector over a few base rewards, from which a user is a few gradient steps away.

Paper: Cai et al., "Meta Reward Modeling" (arXiv 2601.18731).
Reference code: ModalityDance/MRM (MIT; nothing is taken from it).
Deviations: ``conf/method/mrm_paper.yaml`` is the published model and its steps: two bases, one step of Adam of 0.001.
    Adam's first step is its learning rate along the sign of the gradient: it moves the weights of two bases by 0.0005,
    whatever the user's pairs say. The defaults are steps of gradient descent of learned sizes, of signed weights of
    bases that are added to the tuned Bradley-Terry model. Support and query share no response, any share of a user's
    pairs is drawn as support, bases have a normal prior, and validation pairs choose how far users move.

Axes: N pairs of several users, B responses, U users, D feature width, K bases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.distributed import summed, world_size
from plm.functional import (
    PairList,
    bt_losses,
    flatten_context,
    held_out_losses,
    per_user_sum,
    project,
    targets,
    unit_mean_per_user,
)
from plm.messages import Problems
from plm.method.abilities import Explainable
from plm.method.episodes import Arranged, arrange, draw_episodes, pairs_that_count
from plm.method.linear import LinearMethod
from plm.method.strangers import least_harmful_scale
from plm.optimizer import rate_factor, with_decay
from plm.types import Context, PreferenceBatch, Tokens, UserState

Inner = Literal["sgd", "adam_sign"]

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Candidates for how far users move, in units of their steps, chosen on validation pairs."""

WARM_UP = 0.05
"""Share of the steps in which the learning rate of the schedule ``cosine`` rises, as published."""

MAX_PAIRS = 64
"""Most support and most query pairs of a user in a training step."""


def robust_weights(losses: Tensor, worst: float, temperature: float) -> Tensor:
    """How much the loss of each user counts: ``(U,)`` -> ``(U,)``, more for those who are served worst.

    ``sigmoid((L_u - tau) / temperature)`` with tau the ``1 - worst`` quantile of the losses; at temperature 0 one for
    losses above it and zero for the others.

    >>> robust_weights(torch.tensor([0.5, 0.9]), 0.5, 0.5)
    tensor([0.4013, 0.5987])
    """
    excess = losses - torch.quantile(losses, 1 - worst)
    return torch.sigmoid(excess / temperature) if temperature > 0 else (excess > 0).to(losses)


def pairs_of_users(pairs: PairList) -> Tensor:
    """How many pairs of each user weigh something, at least 1: ``(U,)``."""
    return per_user_sum((pairs.weight > 0).to(pairs.weight), pairs.user, pairs.num_users).clamp_min(1)


def user_losses(pairs: PairList, weights: Tensor) -> Tensor:
    """Mean Bradley-Terry loss of each user at weights ``(U, K)``: ``(U,)``, zero without pairs."""
    margin = (pairs.design * weights[pairs.user]).sum(-1) + pairs.offset
    losses = per_user_sum(pairs.weight * bt_losses(margin, pairs.target), pairs.user, pairs.num_users)
    return losses / pairs_of_users(pairs)


def weight_gradients(pairs: PairList, weights: Tensor) -> Tensor:
    """Gradient of `user_losses` in the weights: ``(U, K)`` -> ``(U, K)``, differentiable in the design."""
    margin = (pairs.design * weights[pairs.user]).sum(-1) + pairs.offset
    slope = pairs.weight * (torch.sigmoid(margin) - pairs.target)
    total = per_user_sum(slope[:, None] * pairs.design, pairs.user, pairs.num_users)
    return total / pairs_of_users(pairs)[:, None]


class MRM(LinearMethod, Explainable):
    """Meta-learned reward: weights of a few base rewards, which follow from shared ones by a few gradient steps.

    Bases, shared weights and step sizes are trained on how well users are served after their steps, through the steps.

    Args:
        num_bases: Number of bases K; 1 = one reward for everybody.
        inner: What a step is: sgd = gradient descent with a learned size for each base; adam_sign = as published,
            ``inner_lr`` along the sign of the gradient.
        inner_steps: Steps from the shared logits to a user's.
        inner_lr: Size of a step, with sgd before training.
        simplex: Whether weights are a softmax of the logits, as published, or the logits themselves.
        residual: Whether bases are added to the tuned Bradley-Terry model of all users, trained before; false = as
            published.
        worst: Share of users that the robust objective stresses.
        robustness: Nats in which its stress falls off; 0 = users below are left out.
        temperature: What margins are divided by; null = the root mean square length of a training difference. The
            paper's code uses 100.
        ridge: Precision of the normal prior on the bases; 0 as published.
        calibrate: Whether steps are multiplied by the number of the lowest validation loss.
        schedule: How the learning rate decays to zero: linear, or cosine after a warm-up, as published.
        lr: Learning rate.
        **options: See `PersonalizationMethod`.
    """

    user_tables: tuple[str, ...] = ("logits", "num_pairs")
    search_space: ClassVar[dict[str, list[Any]]] = {
        "num_bases": [4, 8, 16],
        "inner_steps": [1, 3, 5],
        "simplex": [True, False],
        "lr": [0.01, 0.03, 0.1],
    }

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        *,
        num_bases: int = 8,
        inner: Inner = "sgd",
        inner_steps: int = 3,
        inner_lr: float = 1.0,
        simplex: bool = False,
        residual: bool = True,
        worst: float = 0.5,
        robustness: float = 0.5,
        temperature: float | None = None,
        ridge: float = 1.0,
        calibrate: bool = True,
        schedule: Literal["linear", "cosine"] = "linear",
        lr: float = 0.03,
        **options: Any,
    ) -> None:
        problems = Problems("model.")
        problems.integers(1, num_bases=num_bases, inner_steps=inner_steps)
        problems.positive(inner_lr=inner_lr, temperature=temperature)
        problems.numbers(robustness=robustness, ridge=ridge, lr=lr)
        problems.say(f"model.worst: expected a share in (0, 1], got {worst!r}", when=not 0 < worst <= 1)
        problems.choices(inner=(inner, get_args(Inner)), schedule=(schedule, ("linear", "cosine")))
        problems.check()
        super().__init__(num_users, feature_dim, lr=lr, **options)
        self.inner, self.inner_steps, self.simplex, self.ridge = inner, inner_steps, simplex, ridge
        self.residual = residual
        self.worst, self.robustness, self.temperature = worst, robustness, temperature
        self.calibrate, self.schedule = calibrate, schedule
        self.logits: Tensor
        self.num_pairs: Tensor
        self.scale: Tensor
        self.bases = torch.nn.Parameter(0.3 * torch.randn(feature_dim, num_bases))
        start = torch.randn(num_bases) if simplex else torch.full((num_bases,), 1 / num_bases)
        self.start = torch.nn.Parameter(start)
        log_steps = torch.full((num_bases,), inner_lr).log()
        self.log_steps = torch.nn.Parameter(log_steps, requires_grad=inner == "sgd")
        self.register_buffer("logits", start.repeat(num_users, 1))
        self.register_buffer("num_pairs", torch.zeros(num_users, dtype=torch.long))
        self.register_buffer("scale", torch.ones(()))
        self._batch: tuple[PreferenceBatch, Arranged] | None = None  # the last training batch

    # ------------------------------------------------------------------ shared by training and use
    def _along_bases(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What weights multiply, and what they do not: ``(..., D)`` -> ``(..., K)`` and ``(...)``."""
        along = project(features, self.bases) / (self.feature_scale if self.temperature is None else self.temperature)
        return along, features @ self.bradley_terry if self.residual else along.new_zeros(along.shape[:-1])

    def _pairs(self, difference: Tensor, target: Tensor, weight: Tensor, user: Tensor, num_users: int) -> PairList:
        """Pairs ``(N, D)`` along the bases; their weights have mean one within each user."""
        weight = unit_mean_per_user(weight, user, num_users)
        return PairList(*self._along_bases(difference), target, weight, user, num_users)

    def _weights(self, logits: Tensor) -> Tensor:
        """``(..., K)`` -> ``(..., K)``."""
        return torch.softmax(logits, -1) if self.simplex else logits

    def _steps(self, pairs: PairList) -> Tensor:
        """Where the steps lead from the shared logits, less these: ``(U, K)``."""
        moved = pairs.design.new_zeros(pairs.num_users, pairs.design.shape[1])
        for _ in range(self.inner_steps):
            weights = self._weights(self.start + moved)
            gradient = weight_gradients(pairs, weights)
            if self.simplex:  # through the softmax, whose Jacobian is diag(w) - w w'
                gradient = weights * (gradient - (weights * gradient).sum(-1, keepdim=True))
            if self.inner == "adam_sign":
                gradient = gradient / (gradient.abs() + 1e-8)
            moved = moved - self.log_steps.exp() * gradient
        return moved

    # ------------------------------------------------------------------ training
    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the robust mean over users of the loss of their query pairs, after steps on their support pairs."""
        batch, user, nodes = self._arranged(batch)
        num_users = int(user.max()) + 1
        support, query = draw_episodes(user, nodes, "response", 0, MAX_PAIRS, MAX_PAIRS)
        difference, target = batch.difference, targets(batch.tie).to(batch.weight)
        read, held = (
            self._pairs(difference[rows], target[rows], batch.weight[rows], user[rows], num_users)
            for rows in (support, query)
        )
        losses = user_losses(held, self._weights(self.start + self._steps(read)))[torch.unique(user[query])]
        total = summed(losses.new_tensor(float(len(losses)))) / world_size()
        nll = losses.sum() / total.clamp_min(1e-12)  # so that the mean over processes is the mean over all users
        if len(losses):  # else nobody has a query pair, and the sum keeps all parameters in the graph
            losses = robust_weights(losses, self.worst, self.robustness) * losses
        robust = losses.sum() / total.clamp_min(1e-12)
        return {"loss": robust + self._penalty(), "nll": nll, "count": total * world_size()}

    def _arranged(self, batch: PreferenceBatch) -> Arranged:
        """The pairs in an order of their own content, once while the same batch comes again."""
        if self._batch is None or self._batch[0] is not batch:
            self._batch = (batch, arrange(pairs_that_count(batch), with_nodes=True))
        return self._batch[1]

    def _penalty(self) -> Tensor:
        """The normal prior of the bases, divided by the number of pairs."""
        return 0.5 * self.ridge * self.bases.square().sum() / self.num_train_pairs

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, whose learning rate decays to zero as ``schedule`` says."""
        total = torch.tensor(float(self.trainer.estimated_stepping_batches))
        warm_up = WARM_UP if self.schedule == "cosine" else 0.0

        def factor(step: int) -> float:
            return float(rate_factor(self.schedule, warm_up, torch.tensor(step), total))

        return with_decay(torch.optim.Adam(self.param_groups()), float(total), factor)

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Take the steps of all seen users from their training pairs, as far as their validation pairs say.

        Nobody moves where no length of the steps has a gain larger than its error.
        """
        moved, count = torch.zeros_like(self.logits), torch.zeros_like(self.num_pairs)
        for batch in self.train_pass():
            users, user = torch.unique(batch.user_index, return_inverse=True)
            target = targets(batch.tie).to(batch.weight)
            moved[users] = self._steps(self._pairs(batch.difference, target, batch.weight, user, len(users)))
            count[users] = torch.bincount(user)
        moved = self.sum_over_processes(moved)
        self.num_pairs.copy_(self.sum_over_processes(count))
        scales = SCALES if self.calibrate else (1.0,)
        losses = torch.stack([self._val_losses(self.start + number * moved) for number in scales])
        self.scale.fill_(least_harmful_scale(scales, self.sum_over_processes(losses)))
        self.logits.copy_(self.start + self.scale * moved)

    def _val_losses(self, logits: Tensor) -> Tensor:
        """Summed loss of the validation pairs of every user with logits ``(U, K)``: ``(U,)``."""
        losses = torch.zeros(self.num_users, dtype=torch.float64, device=self.device)
        for batch in self.val_pass():
            along, offset = self._along_bases(batch.difference)
            margin = (along * self._weights(logits)[batch.user_index]).sum(-1) + offset
            losses += held_out_losses(margin, batch, self.num_users)
        return losses

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """``scale``: how far users move, 0 = not at all; ``moved``: largest change of a weight, mean over users."""
        apart = (self._weights(self.logits) - self._weights(self.start)).abs().max(-1).values
        return {"scale": float(self.scale), "moved": float(apart.mean())}

    def prior_row(self, name: str, state_dict: Mapping[str, Tensor]) -> Tensor | None:
        """The shared logits of the checkpoint."""
        return state_dict["start"] if name == "logits" else None

    # ------------------------------------------------------------------ use
    @property
    def mixes(self) -> bool:
        """Whether weights are a softmax."""
        return self.simplex

    def basis_weights(self, users: UserState) -> Tensor:
        """The weights that users are served with, ``(U, K)``."""
        return self._weights(users.tensors["logits"])

    def with_weights(self, weights: Tensor) -> UserState:
        """States of users with weights ``(U, K)``."""
        logits = weights.clamp_min(1e-30).log() if self.simplex else weights
        state = self.population_state(len(weights))
        return state._replace(tensors={"logits": logits.to(state.tensors["logits"])})

    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """``(B, D)`` -> ``(B,)``."""
        assert isinstance(responses, Tensor)
        along, offset = self._along_bases(responses)
        return (along * self._weights(users.tensors["logits"])).sum(-1) + offset

    def _adapt(self, context: Context) -> UserState:
        """The steps; all that is shared stays fixed."""
        with torch.no_grad():
            moved = self._steps(self._pairs(*flatten_context(context), context.num_users))
            return UserState({"logits": self.start + self.scale * moved}, context.mask.sum(-1))

    def user_states(self, user_index: Tensor) -> UserState:
        """Logits of seen users, as last refreshed."""
        return UserState({"logits": self.logits[user_index]}, self.num_pairs[user_index])

    def population_state(self, num_users: int) -> UserState:
        """The shared logits."""
        num_pairs = torch.zeros(num_users, dtype=torch.long, device=self.device)
        return UserState({"logits": self.start.repeat(num_users, 1)}, num_pairs)
