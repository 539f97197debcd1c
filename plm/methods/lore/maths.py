"""The maths of LoRe: margins, anchors, pruning and the evidence bound.

Axes: B pairs in a batch, N pairs of several users, D feature width, K bases, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plm.functional import Posterior, expected_losses, project, targets
from plm.types import PreferenceBatch


class ProjectedPairs(NamedTuple):
    """B pairs as margins along each basis."""

    margins: Tensor
    """``(B, K)``."""
    target: Tensor
    """``(B,)`` probability that chosen wins."""
    weight: Tensor
    """``(B,)``."""
    user: Tensor
    """``(B,)`` row of the user of each pair."""


def projected_pairs(batch: PreferenceBatch, bases: Tensor) -> ProjectedPairs:
    """Project the pairs of a batch on bases ``(D, K)``."""
    margins = project(batch.difference, bases)
    return ProjectedPairs(margins, targets(batch.tie).to(margins), batch.weight, batch.user_index)


def pair_counts(parts: Sequence[ProjectedPairs], num_users: int, device: torch.device) -> Tensor:
    """Count the pairs of each user: ``(U,)`` int64."""
    start = torch.zeros(num_users, dtype=torch.long, device=device)
    return sum((torch.bincount(part.user, minlength=num_users) for part in parts), start)


def effective_bases(weights: Tensor, bases: Tensor) -> float:
    """Participation ratio of the directions in which rewards of users differ: ``(U, K)``, ``(D, K)``; 0 = they do not.

    Eigenvalues of the product of both covariances are the variances along each direction.
    """
    spread = torch.cov(weights.T, correction=0) @ (bases.T @ bases)
    total, squares = spread.trace(), (spread @ spread).trace()
    return float(total**2 / squares) if squares > 0 else 0.0


def basis_margins(difference: Tensor, bases: Tensor, weights: Tensor) -> Tensor:
    """Margin of each pair for its own user: ``(B, D)``, ``(D, K)``, ``(B, K)`` -> ``(B,)``.

    Paper eq 7, factored: ``((X V) * W[user]).sum(-1)``; nothing of size pairs x users is ever made.
    """
    return (project(difference, bases) * weights).sum(-1)


def cosine_anchor(bases: Tensor, reference: Tensor) -> Tensor:
    """Mean over bases of one minus the cosine to the reference direction: ``(D, K)``, ``(D,)`` -> ``()``."""
    return (1.0 - F.cosine_similarity(bases, reference[:, None], dim=0)).mean()


def l2_anchor(bases: Tensor, reference: Tensor) -> Tensor:
    """Summed squared distance of the bases to the reference direction: ``(D, K)``, ``(D,)`` -> ``()``."""
    return (bases - reference[:, None]).square().sum()


def warm_up(progress: float) -> float:
    """Share of the anchor's strength at a share of training: 0 until 0.2, linear, 1 from 0.8."""
    return min(max((progress - 0.2) / 0.6, 0.0), 1.0)


def kept_bases(weights: Tensor, threshold: float) -> Tensor:
    """Bases that matter to somebody: ``(U, K)`` -> ``(K,)`` bool, True where the largest weight reaches ``threshold``.

    The basis with the largest weight of all is always kept.
    """
    largest = weights.max(0).values
    return (largest >= threshold) | (largest == largest.max())


def evidence_losses(design: Tensor, offset: Tensor, target: Tensor, posterior: Posterior, user: Tensor) -> Tensor:
    """Expected loss of each pair under its user's posterior, ``(N,)``: what makes the spread of users learnable.

    With deviations ``d_u ~ N(0, I)`` and margins ``z = offset + design @ d_u``, the evidence lower bound of a user is
    ``-sum_n E_q[bt(z_n)] - KL(q || N(0, I))``. Given ``q = N(m, H^-1)``, Laplace's approximation at the mode, the KL
    does not depend on the bases, so their gradient is that of the expected loss alone. To second order in the spread,

        E_q[bt(z_n)] = bt(z_n(m)) + p_n (1 - p_n) / 2 * design_n' H^-1 design_n,    p_n = sigmoid(z_n(m)),

    since bt'' = p (1 - p); that the curvature itself changes along the margin is left out of the gradient, as in
    Gauss-Newton. The second term is the price of uncertainty: it shrinks a basis, and with it the spread of users along
    it, unless it pays by better margins. Minimising the first term alone (a joint mode of bases and weights) has no
    such price and a degenerate scale: bases grow while weights and their penalty vanish.
    """
    margin = offset + (design * posterior.mean[user]).sum(-1)
    return expected_losses(margin, design, target, posterior.precision, user)
