"""Which members users are routed to, how evenly, and how much the members differ.

Axes: U users, M members, X prompts, C candidates, R objectives.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from plm.arrays import Float64Array, IntArray
from plm.methods.palm.oracle import PolicySet


class Usage(NamedTuple):
    """How users are spread over members."""

    shares: Float64Array
    """``(M,)`` share of the users routed to each member."""
    perplexity: float
    """``exp`` of the entropy of the shares: between 1 and M, as if so many members were used evenly."""
    num_dead: int
    """Members nobody is routed to."""


def route(members: PolicySet, weights: Float64Array) -> IntArray:
    """The best member for each user, ``(U, R)`` -> ``(U,)``: the highest ``w_u . R(p) - f(p)``."""
    member: IntArray = members.values(weights).argmax(1)
    return member


def usage(member: IntArray, num_members: int) -> Usage:
    """Shares, perplexity and dead members of a routing ``(U,)``.

    >>> usage(np.array([0, 0, 1, 1]), 3).perplexity
    2.0
    """
    shares = np.bincount(member, minlength=num_members) / len(member)
    used = shares[shares > 0]
    return Usage(shares, float(np.round(np.exp(-(used * np.log(used)).sum()), 12)), int((shares == 0).sum()))


def disagreement(policies: Float64Array) -> float:
    """Mean over pairs of members of the total variation between them, ``(M, X, C)`` -> between 0 and 1.

    For members that pick one candidate it is the share of prompts on which two of them answer differently; members that
    draw at random from the same probabilities have 0.
    """
    if len(policies) < 2:
        return 0.0
    distances = [0.5 * np.abs(first - second).sum(1).mean() for first, second in itertools.combinations(policies, 2)]
    return float(np.mean(distances))
