"""Whole-simplex certificates: exact worst-case regret, and searches that call the oracle only where it matters.

Axes: V weight vectors, R objectives, M members, S solved weight vectors, F facets.

``J*_v``, the best value for user v, is convex in v; the value of a portfolio, ``max_p v . net_p``, is linear on each
cell of its upper envelope. Their difference therefore is largest at a corner of a cell, and so is their ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from scipy.spatial import ConvexHull, HalfspaceIntersection

from plm.arrays import Float64Array, IntArray
from plm.methods.palm.oracle import Oracle, PolicySet

Kind = Literal["additive", "multiplicative"]

_TIED = 1e-7  # members whose values differ by less at a corner of their cells both serve it


class Worst(NamedTuple):
    """The largest regret over the simplex and who suffers it."""

    regret: float
    weights: Float64Array
    """``(R,)``."""


class Certified(NamedTuple):
    """What a search ends with."""

    policies: PolicySet
    """Every policy the oracle made."""
    gap: float
    """No user of the simplex loses more than this by being served from these policies."""
    num_calls: int
    """Weight vectors that the search had solved, no two alike."""


# ---------------------------------------------------------------------- geometry
def corners(net: Float64Array) -> Float64Array:
    """Corners of the cells in which one policy is best: ``(M, R)`` -> ``(V, R)``, the vertices of the simplex included.

    The cells are the facets of the upper envelope of M planes over the simplex, found as an intersection of half spaces
    in R dimensions (weights but the last, and the value).
    """
    num = net.shape[1]
    net = np.unique(np.round(net, 12), axis=0)
    if num == 1:
        return np.ones((1, 1))
    low, high = float(net.min()) - 1.0, float(net.max()) + 1.0
    scale = max(high - low, 1e-9)
    planes = (net - low) / scale
    slope, last = planes[:, :-1] - planes[:, -1:], planes[:, -1:]
    size = num - 1
    halves = [
        np.concatenate([slope, -np.ones((len(net), 1)), last], axis=1),  # t >= v . net
        np.concatenate([-np.eye(size), np.zeros((size, 2))], axis=1),  # v_i >= 0
        np.concatenate([np.ones((1, size)), [[0.0, -1.0]]], axis=1),  # the last weight is >= 0
        np.concatenate([np.zeros((1, size)), [[1.0, -2.0]]], axis=1),  # t <= 2, a lid
    ]
    inside = np.append(np.full(size, 1.0 / num), 1.5)
    points = HalfspaceIntersection(np.concatenate(halves), inside).intersections
    points = points[np.isfinite(points).all(1)]
    points = points[points[:, -1] < 1.5]
    weights = np.clip(np.concatenate([points[:, :-1], 1 - points[:, :-1].sum(1, keepdims=True)], axis=1), 0, None)
    weights = np.concatenate([weights / weights.sum(1, keepdims=True), np.eye(num)])
    return weights[np.unique(np.round(weights, 10), axis=0, return_index=True)[1]]


def upper_planes(weights: Float64Array, values: Float64Array) -> Float64Array:
    """The best values that convexity allows between solved weights, as planes: ``(S, R)``, ``(S,)`` -> ``(F, R)``.

    ``max_f v . plane_f`` is the lower convex envelope of the points ``(w_k, J*_k)``, the optimum of the linear program
    ``min sum_k a_k J*_k`` with ``sum_k a_k w_k = v``: an upper bound of the convex ``J*_v``.

    Args:
        weights: Solved weights; all vertices of the simplex must be among them.
        values: Their best values.

    Returns:
        Values of each plane at the vertices.
    """
    num = weights.shape[1]
    at_vertex = [int(np.argmax(weights[:, index])) for index in range(num)]
    if not np.allclose(weights[at_vertex], np.eye(num)):
        raise ValueError("upper bounds need solved weights at every vertex of the simplex")
    first = values[at_vertex]  # the plane through the vertices: an upper bound of its own
    sag = values - weights @ first  # <= 0
    depth = float(-sag.min())
    if num == 1 or depth <= 1e-12:
        return first[None]
    apex = np.append(np.full(num - 1, 1.0 / num), 10.0)
    points = np.concatenate([np.column_stack([weights[:, :-1], np.minimum(sag, 0) / depth]), apex[None]])
    equations = ConvexHull(points).equations  # (F, R + 1): normal, offset; normal . x + offset <= 0 inside
    lower = equations[equations[:, num - 1] < -1e-9]
    slope = -lower[:, : num - 1] / lower[:, num - 1 : num]
    level = -lower[:, num] / lower[:, num - 1]
    planes: Float64Array = np.column_stack([slope + level[:, None], level]) * depth + first
    return planes


def upper_bound(weights: Float64Array, planes: Float64Array) -> Float64Array:
    """Upper bound of the best value for each weight vector: ``(V, R)``, ``(F, R)`` -> ``(V,)``."""
    bound: Float64Array = (weights @ planes.T).max(1)
    return bound


# ---------------------------------------------------------------------- regret
def regret(best: Float64Array, served: Float64Array, kind: Kind = "additive") -> Float64Array:
    """``J* - J``, or the share ``1 - J / J*`` of the best value that is lost; rewards must then be positive."""
    lost: Float64Array = best - served if kind == "additive" else 1 - served / np.maximum(best, 1e-300)
    return lost


def served_corners(net: Float64Array) -> tuple[Float64Array, IntArray]:
    """Corners of cells ``(V, R)`` with each member ``(V,)`` whose cell meets there: all of them serve such a user."""
    users = corners(net)
    worth = users @ net.T
    meeting = np.argwhere(worth >= worth.max(1, keepdims=True) - _TIED)
    return users[meeting[:, 0]], meeting[:, 1]


def worst_regret(
    net: Float64Array,
    best_value: Callable[[Float64Array], Float64Array],
    kind: Kind = "additive",
    routed_by: Float64Array | None = None,
) -> Worst:
    """Exact worst-case regret of a portfolio over the whole simplex.

    Args:
        net: ``(M, R)`` rewards minus costs of the members.
        best_value: ``J*``: ``(V, R)`` -> ``(V,)``, convex.
        kind: Additive, or relative to the best value.
        routed_by: ``(M, R)`` what was known of the members when users were routed; default: ``net`` itself. On a cell
            of it one member serves, whose value is linear, so that the regret is again largest at a corner.

    Returns:
        The largest regret, at a corner of a cell of the members.
    """
    if routed_by is None:
        users = corners(net)
        served = (users @ net.T).max(1)
    else:
        users, member = served_corners(routed_by)
        served = (users * net[member]).sum(1)
    lost = regret(best_value(users), served, kind)
    return Worst(float(lost.max()), users[int(lost.argmax())])


# ---------------------------------------------------------------------- searches
def certificate(members: PolicySet, solved: PolicySet, error: float = 0.0, eps: float = 0.0) -> Worst:
    """Bound on ``(1 - eps) J*_v - max_p J_v(p)`` over the whole simplex, from solved weights alone.

    Args:
        members: The portfolio.
        solved: Answers of the oracle, those for the vertices among them.
        error: Additive error of the oracle.
        eps: Relative loss that is allowed for free.

    Returns:
        The bound, and where it is reached.
    """
    planes = upper_planes(solved.weights, solved_values(solved) + error)
    users = corners(members.net)
    gaps = (1 - eps) * upper_bound(users, planes) - members.values(users).max(1)
    return Worst(float(gaps.max()), users[int(gaps.argmax())])


def solved_values(solved: PolicySet) -> Float64Array:
    """``J_w(p)`` of the best policy found so far at each solved weight vector, ``(S,)``."""
    values: Float64Array = solved.values(solved.weights).max(1)
    return values


def corner_search(oracle: Oracle, delta: float, eps: float = 0.0, max_calls: int = 1000) -> Certified:
    """Call the oracle at the corner with the largest gap until no user can lose more than ``delta``.

    No grid is needed, and what it stops with holds for the whole simplex (optimistic linear support).

    Args:
        oracle: Makes the policies.
        delta: Absolute loss to reach.
        eps: Relative loss that is allowed for free.
        max_calls: Stop with the gap reached so far.

    Returns:
        The policies and the certified gap.
    """
    solved = oracle.solve(np.eye(oracle.num_objectives))
    while True:
        worst = certificate(solved, solved, oracle.error, eps)
        seen = bool((np.abs(solved.weights - worst.weights).max(1) < 1e-9).any())
        if worst.regret <= delta or seen or len(solved.weights) >= max_calls:
            return Certified(solved, worst.regret, len(solved.weights))
        solved = PolicySet.cat([solved, oracle.solve(worst.weights[None])])


def lazy_grid(oracle: Oracle, grid: Float64Array, delta: float, eps: float = 0.0) -> Certified:
    """Call the oracle at those weights of a grid that the policies made so far are not proved to serve.

    Args:
        oracle: Makes the policies.
        grid: ``(N, R)`` weights, visited from the inside out, after the vertices of the simplex.
        delta: Absolute loss at which a weight vector counts as served.
        eps: Relative loss that is allowed for free.

    Returns:
        The policies and the gap certified for the whole simplex, which may exceed ``delta`` between weights.
    """
    solved = oracle.solve(np.eye(oracle.num_objectives))
    planes = upper_planes(solved.weights, solved_values(solved) + oracle.error)
    for weights in grid[np.argsort(-grid.min(1), kind="stable")]:
        gap = (1 - eps) * upper_bound(weights[None], planes)[0] - solved.values(weights[None]).max()
        if gap > delta and not (np.abs(solved.weights - weights).max(1) < 1e-9).any():
            solved = PolicySet.cat([solved, oracle.solve(weights[None])])
            planes = upper_planes(solved.weights, solved_values(solved) + oracle.error)
    return Certified(solved, certificate(solved, solved, oracle.error, eps).regret, len(solved.weights))
