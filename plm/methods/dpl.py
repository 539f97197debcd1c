"""DPL: a distribution of utilities for every response, so that people who are not told apart show as variance.

Paper: Siththaranjan, Laidlaw, Hadfield-Menell, "Distributional Preference Learning: Understanding and Accounting for
    Hidden Context in RLHF" (arXiv 2312.08358).
Reference code: cassidylaidlaw/hidden-context (nothing is taken from it).
Deviations: heads are linear in frozen features, with a normal prior. The normal distribution function is exact, where
    the code takes a logistic one of another slope. The spread of the mean response is fixed, since only ratios of means
    and spreads are ever seen. Pairs are judged by the difference of the scores that are served, not by the chance of
    the pair. As published, means of atoms are those of points from 0 to 1, and quantiles those of bins of width 1 / A.

Axes: B pairs or responses, D feature width, A atoms.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from plm.functional import project, targets
from plm.messages import Problems
from plm.method.shared import SharedMethod
from plm.optimizer import with_decay
from plm.types import PreferenceBatch, Tokens, UserState

Kind = Literal["mean_variance", "categorical"]

LEAST_SPREAD = 1e-3
LEAST_CHANCE = 1e-6
MEAN_SPREAD = 0.5**0.5
"""Spread of the mean response: the difference of two such utilities has the variance 1."""
RISK = 0.01
"""The quantile that the paper's risk-averse score is, and `DPL.report` compares with."""


class LogChances(NamedTuple):
    """Logarithms of the probabilities of B pairs."""

    wins: Tensor
    """``(B,)`` that chosen has the higher utility; an equal one counts half."""
    loses: Tensor
    """``(B,)`` that rejected has."""


def normal_chances(mean: Tensor, spread: Tensor, other_mean: Tensor, other_spread: Tensor) -> LogChances:
    """Chances of independent normal utilities, ``Phi((m - m') / sqrt(s^2 + s'^2))``: ``(B,)`` each.

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> round(normal_chances(one, one, zero, one).wins.exp().item(), 5)
    0.76025
    """
    ratio = (mean - other_mean) / (spread.square() + other_spread.square()).sqrt()
    return LogChances(torch.special.log_ndtr(ratio), torch.special.log_ndtr(-ratio))


def categorical_chances(probabilities: Tensor, others: Tensor) -> LogChances:
    """Chances of independent utilities on ordered atoms: ``(B, A)`` each; none is below `LEAST_CHANCE`.

    ``P = sum_{i > j} p_i q_j + 1/2 sum_i p_i q_i``: p_i times the mean of what lies below atom i with and without it.

    >>> p, q = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.3, 0.2]])
    >>> [round(value.exp().item(), 4) for value in categorical_chances(p[None], q[None])]
    [0.695, 0.305]
    """

    def log_chance(first: Tensor, second: Tensor) -> Tensor:
        below = second.cumsum(-1) - 0.5 * second
        return (first * below).sum(-1).clamp_min(LEAST_CHANCE).log()

    return LogChances(log_chance(probabilities, others), log_chance(others, probabilities))


def categorical_quantile(probabilities: Tensor, share: float) -> Tensor:
    """Quantile ``(B,)`` of ``(B, A)``, whose atom i has its mass evenly on ``[i / A, (i + 1) / A]``, as published.

    >>> categorical_quantile(torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]), 0.25)
    tensor([0.1250, 0.8125])
    """
    number = probabilities.shape[-1]
    total = probabilities.cumsum(-1)
    atom = (total < share).sum(-1, keepdim=True).clamp_max(number - 1)
    mass, upto = probabilities.gather(-1, atom), total.gather(-1, atom)
    inside = 1 - (upto - share) / mass.clamp_min(1e-12)
    return (atom + inside.clamp(0, 1))[..., 0] / number


class DPL(SharedMethod):
    """One distribution of utilities for everybody; nothing is personal, but hidden differences between people are seen.

    Args:
        kind: mean_variance = normal utilities; categorical = probabilities of ordered atoms between 0 and 1.
        num_atoms: Number A of atoms, with categorical.
        risk: What ranks responses: 0 = the mean, or else this quantile, which puts what people disagree on last.
        entropy: Weight of the entropy of the mean distribution of a batch's responses, with categorical.
        ridge: Precision of the normal prior on the heads; null = that of the Bradley-Terry model of all users with the
            lowest validation loss.
        lr: Learning rate, decaying linearly to zero.
        **options: See `PersonalizationMethod`.
    """

    search_space: ClassVar[dict[str, list[Any]]] = {
        "kind": ["mean_variance", "categorical"],
        "ridge": [None, 0.1, 1.0, 10.0],
        "lr": [0.03, 0.1],
    }

    def __init__(
        self,
        num_users: int,
        feature_dim: int,
        *,
        kind: Kind = "mean_variance",
        num_atoms: int = 10,
        risk: float = 0.0,
        entropy: float = 0.1,
        ridge: float | None = None,
        lr: float = 0.1,
        **options: Any,
    ) -> None:
        problems = Problems("model.")
        problems.choices(kind=(kind, get_args(Kind)))
        problems.integers(2, num_atoms=num_atoms)
        problems.shares(risk=risk)
        problems.numbers(entropy=entropy, ridge=ridge, lr=lr)
        problems.check()
        super().__init__(num_users, feature_dim, lr=lr, **options)
        self.kind, self.risk, self.entropy, self.ridge = kind, risk, entropy, ridge
        self.measured: Tensor
        width = 2 if kind == "mean_variance" else num_atoms
        self.heads = torch.nn.Parameter(torch.zeros(feature_dim, width))
        self.bias = torch.nn.Parameter(torch.zeros(width), requires_grad=kind == "categorical")
        self.register_buffer("measured", -torch.ones(3))  # -1 = not known; nan is not equal to itself

    # ------------------------------------------------------------------ the distribution of a response
    def _outputs(self, features: Tensor) -> Tensor:
        """What the heads give: ``(B, D)`` -> ``(B, 2)`` or ``(B, A)``."""
        return project(features, self.heads) / self.feature_scale + self.bias

    def _normal(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread, ``(B,)`` each."""
        start = math.log(math.expm1(MEAN_SPREAD))
        return outputs[..., 0], F.softplus(outputs[..., 1] + start).clamp_min(LEAST_SPREAD)

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the utility of each response: ``(B, D)`` -> ``(B,)`` each."""
        outputs = self._outputs(features)
        if self.kind == "mean_variance":
            mean, spread = self._normal(outputs)
            return mean, spread.square()
        chances, atoms = torch.softmax(outputs, -1), torch.linspace(0, 1, outputs.shape[-1]).to(outputs)
        mean = chances @ atoms
        return mean, (chances * (atoms - mean[..., None]).square()).sum(-1)

    def _quantile(self, features: Tensor, share: float) -> Tensor:
        """``(B, D)`` -> ``(B,)``."""
        outputs = self._outputs(features)
        if self.kind == "categorical":
            return categorical_quantile(torch.softmax(outputs, -1), share)
        mean, spread = self._normal(outputs)
        low: Tensor = mean + spread * torch.special.ndtri(mean.new_tensor(share))
        return low

    def chances(self, chosen: Tensor, rejected: Tensor) -> LogChances:
        """Chances of pairs, ``(B, D)`` each."""
        sides = self._outputs(chosen), self._outputs(rejected)
        if self.kind == "categorical":
            return categorical_chances(*(torch.softmax(side, -1) for side in sides))
        return normal_chances(*self._normal(sides[0]), *self._normal(sides[1]))

    # ------------------------------------------------------------------ training
    def loss(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Return the negative log-likelihood of the labels, plus the prior, less the bonus of the entropy."""
        chances, target = self.chances(*batch.features), targets(batch.tie).to(batch.weight)
        nll = -(batch.weight * (target * chances.wins + (1 - target) * chances.loses)).mean()
        ridge = self.bradley_terry_ridge if self.ridge is None else self.ridge
        loss = nll + 0.5 * ridge * self.heads.square().sum() / self.num_train_pairs
        if self.kind == "categorical" and self.entropy:
            mean = torch.softmax(self._outputs(torch.cat(batch.features)), -1).mean(0)
            loss = loss + self.entropy * torch.special.xlogy(mean, mean).sum()
        return {"loss": loss, "nll": nll}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, whose learning rate decays linearly to zero."""
        return with_decay(torch.optim.Adam(self.param_groups()), self.trainer.estimated_stepping_batches)

    @torch.no_grad()
    def refresh_users(self) -> None:
        """Measure what `report` gives on the training pairs."""
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        for batch in self.train_pass():
            sides = [self.moments(side) for side in batch.features]
            means, variances = (torch.cat(values).double() for values in zip(*sides, strict=True))
            low = [self._quantile(side, RISK) for side in batch.features]
            turned = (sides[0][0] > sides[1][0]) != (low[0] > low[1])
            parts = [means.sum(), means.square().sum(), variances.sum(), turned.sum().double()]
            sums += torch.stack([*parts, sums.new_tensor(float(turned.numel()))])
        total, squares, variance, turned, count = self.sum_over_processes(sums).tolist()
        between = squares / (2 * count) - (total / (2 * count)) ** 2
        within = variance / (2 * count)
        self.measured.copy_(torch.tensor([between / (between + within), math.sqrt(within), turned / count]))

    def report(self) -> dict[str, float]:
        """What training responses say of hidden differences.

        ``r2``: share of the variance of utilities that lies between responses; the rest is disagreement about each.
        ``spread``: root mean square spread. ``turned``: share of pairs whose winner is another by the 0.01 quantile.
        """
        values = [value if value >= 0 else math.nan for value in self.measured.tolist()]
        return dict(zip(("r2", "spread", "turned"), values, strict=True))

    # ------------------------------------------------------------------ use
    def _score(self, responses: Tensor | Tokens, users: UserState) -> Tensor:
        """Mean, or quantile, of the utility: ``(B, D)`` -> ``(B,)``; differences are no log odds."""
        assert isinstance(responses, Tensor)
        return self._quantile(responses, self.risk) if self.risk else self.moments(responses)[0]
