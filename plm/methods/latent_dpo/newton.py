"""Solves the exact optimum of users whose policy is N(mean, I) at every prompt, many at once.

With unit variance ``h(z) = mean . z - |mean|^2 / 2``, so the margin of two latents is ``mean . (z_i - z_j)``. Latent
DPO is logistic regression on latent differences, and the KL to the prior, ``|mean|^2 / 2``, is its ridge.

Axes: U users, N pairs of all users, Z latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plm.functional import PairList, fit_gaussian, unit_mean_per_user
from plm.methods.latent_dpo.maths import gaussian
from plm.methods.latent_dpo.user_pairs import UserPairs


def fit_means(
    difference: Tensor, target: Tensor, weight: Tensor, user: Tensor, num_users: int, beta: float, kl_coef: float
) -> Tensor:
    """Minimise ``mean_n weight_n bt(beta difference_n . mean) + kl_coef |mean|^2 / 2`` of every user by Newton.

    Strictly convex for ``kl_coef > 0``. With n pairs of a user and ``w = (n kl_coef)^1/2 mean`` it is, times n, the
    problem of `plm.functional.fit_gaussian`, which is solved in float64.

    Args:
        difference: ``(N, Z)`` latents of chosen minus rejected, such as posterior means.
        target: ``(N,)`` probability that chosen wins.
        weight: ``(N,)`` pair weights; they count relative to a user's others.
        user: ``(N,)`` int64, the user of each pair.
        num_users: Number of users U.
        beta: Strength of the KL term that DPO implies.
        kl_coef: Weight of the KL to the prior, per pair.

    Returns:
        Means ``(U, Z)``; zero for a user without pairs.
    """
    count = torch.bincount(user, minlength=num_users)
    unit = (kl_coef * count.clamp_min(1).double()).rsqrt()
    weight = unit_mean_per_user(weight, user, num_users)
    design = beta * unit[user][:, None] * difference.double()
    solved = fit_gaussian(PairList(design, design.new_zeros(len(design)), target, weight, user, num_users))
    return (unit[:, None] * solved.mean).to(difference)


def solve_users(pairs: UserPairs, beta: float, kl_coef: float) -> Tensor:
    """`fit_means` of the posterior means of all users' pairs: ``(U, Z)``."""
    rows, user = pairs.owners()
    mean = gaussian(pairs.responses[rows]).mean
    difference, target = mean[:, 0] - mean[:, 1], pairs.grades[rows, 0]
    return fit_means(difference, target, pairs.weight[rows], user, pairs.num_users, beta, kl_coef)
