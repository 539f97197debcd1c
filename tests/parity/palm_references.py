"""References that PALM is tested against: the router that proves coverage, linear programs, and a bound on KL.

Axes: U users, R objectives, M members, Q policies.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from scipy.optimize import linprog

from plm.arrays import Float64Array
from plm.methods.palm.grid import Weights, as_array, check_cell, combined_levels
from plm.methods.palm.search import Kind, Worst


def route_to_grid(weights: Float64Array, eps: float, delta: float) -> Float64Array:
    """For each user's weights a member of `combined_grid` whose cell holds them: ``(U, R)`` -> ``(U, R)``.

    The constructive proof of coverage: scale the largest coordinate to one; round the others up to the next level;
    of those below ``delta`` send as many of the largest to ``delta`` as keeps their sum, the rest to zero.
    """
    levels = as_array([tuple(combined_levels(eps, delta))])[0]
    lifted = weights / weights.max(1, keepdims=True)
    step = float(delta)
    up = levels[np.minimum(np.searchsorted(levels, lifted - 1e-12), len(levels) - 1)]
    small = lifted < step - 1e-12
    keep = np.rint((lifted * small).sum(1) / step)
    order = np.argsort(np.argsort(-np.where(small, lifted, -1.0), axis=1, kind="stable"), axis=1)
    up = np.where(small, np.where(order < keep[:, None], step, 0.0), up)
    routed: Float64Array = up / up.sum(1, keepdims=True)
    return routed


def worst_regret_among(net: Float64Array, policies: Float64Array, kind: Kind = "additive") -> Worst:
    """Exact worst-case regret against the best policy of finitely many, by one linear program for each.

    Additive: ``max v . q - t`` with ``t >= v . p`` for all members p and v on the simplex. Multiplicative: the largest
    ratio ``max u . q`` with ``u . p <= 1`` and ``u >= 0``, for positive rewards.

    Args:
        net: ``(M, R)`` members.
        policies: ``(Q, R)`` policies to compare with.
        kind: Which regret.

    Returns:
        The largest regret.
    """
    worst = Worst(0.0, np.full(net.shape[1], 1.0 / net.shape[1]))
    num = net.shape[1]
    for rival in policies:
        if kind == "additive":
            solved = linprog(
                np.append(-rival, 1.0),
                A_ub=np.column_stack([net, -np.ones(len(net))]),
                b_ub=np.zeros(len(net)),
                A_eq=np.append(np.ones(num), 0.0)[None],
                b_eq=[1.0],
                bounds=[(0, None)] * num + [(None, None)],
            )
            found, user = -solved.fun, solved.x[:num]
        else:
            solved = linprog(-rival, A_ub=net, b_ub=np.ones(len(net)), bounds=[(0, None)] * num)
            if solved.status == 3:  # unbounded: a user for whom no member is worth anything
                return Worst(1.0, np.eye(num)[int(np.argmax(rival))])
            found, user = 1 + 1 / solved.fun, solved.x / solved.x.sum()
        if found > worst.regret:
            worst = Worst(float(found), user)
    return worst


def best_of_n_cost(num_candidates: int, beta: float) -> float:
    """Bound on beta times the KL divergence of best-of-n from its reference, ``beta (ln n - (n - 1) / n)``.

    Source: arXiv 2401.01879, an upper bound.
    """
    return beta * (math.log(num_candidates) - (num_candidates - 1) / num_candidates)


def in_cell(weights: Weights, user: Weights, eps: float | Fraction, delta: float | Fraction) -> bool:
    """Whether ``weights`` serve ``user``."""
    eps, delta = check_cell(eps, delta)
    return all(abs(w - v) <= eps * v + delta for w, v in zip(weights, user, strict=True))
