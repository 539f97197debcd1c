"""What a finished portfolio of policies that write costs its users on prompts that nothing was chosen on.

Axes: X prompts, Q policies of the oracle, M members, C candidates of a prompt (padded), R objectives, V weight vectors,
B resamples of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table
from scipy.special import logsumexp

from plm.arrays import BoolArray, Float64Array, IntArray
from plm.evaluation import MIN_USERS, Section, TableRow, section_table
from plm.evaluation.statistics import interval_of, resampled_means
from plm.methods.palm.search import served_corners
from plm.portfolio.study import Estimate, record, spread

_RESAMPLES = 2000


class HeldOut(NamedTuple):
    """What a user loses, with 95 % intervals over prompts."""

    weights: list[float]
    """Of the user; for the worst of all, where the loss to the oracle's policies is largest."""
    member: int
    """The member that serves these weights, by the values measured before."""
    to_policies: Estimate
    """To the best policy that the oracle has made: what a certificate is about."""
    to_best_of_n: Estimate
    """To the best of the candidates of each prompt, which no certificate is about."""


class HeldOutLosses(NamedTuple):
    """What users of a portfolio lose on held-out prompts, and among how many things."""

    users: list[HeldOut]
    """Of each known user."""
    worst: HeldOut
    """Of the weights that lose most."""
    num_prompts: int
    """Held-out prompts X."""
    num_policies: int
    """Policies Q that the oracle has made."""
    num_candidates: int
    """Sampled responses to a prompt, at most."""

    def record(self, user_ids: Sequence[str]) -> dict[str, Any]:
        """The same for a file."""
        users = dict(zip(user_ids, self.users, strict=True))
        found: dict[str, Any] = record({"num_prompts": self.num_prompts, "users": users, "worst": self.worst})
        return found


class Values(NamedTuple):
    """Objectives measured on the held-out prompts."""

    policies: Float64Array
    """``(Q, X, R)`` mean objectives of what each policy of the oracle wrote, less its cost."""
    candidates: Float64Array
    """``(X, C, R)`` objectives of sampled responses; nan = no such candidate."""
    beta: float
    """What a nat of KL costs: the best of the candidates is then the soft one."""


def best_of_candidates(values: Values, weights: Float64Array) -> Float64Array:
    """Return ``J*`` of best-of-n on each prompt, see `plm.methods.palm.oracle.BestOfN`: ``(V, R)`` -> ``(V, X)``."""
    present: BoolArray = np.logical_not(np.isnan(values.candidates).any(axis=2))
    rewards: Float64Array = np.where(present[..., None], values.candidates, 0.0)
    scores = np.where(present, np.einsum("xcr,vr->vxc", rewards, weights), -np.inf)
    if values.beta == 0:
        best: Float64Array = scores.max(2)
        return best
    soft: Float64Array = values.beta * (logsumexp(scores / values.beta, axis=2) - np.log(present.sum(1)))
    return soft


def held_out(values: Values, members: Sequence[int], net: Float64Array, users: Float64Array) -> HeldOutLosses:
    """Measure what each user loses, and what the weights lose that lose most.

    Users are routed as the portfolio does it, by ``net``. The best value is convex in the weights and that of the
    member who serves them linear on each of the members' cells, so that the worst is at a corner of a cell; at a corner
    all members whose cells meet there count.

    Args:
        values: Of the held-out prompts.
        members: Rows of ``values.policies`` that are the M members.
        net: ``(M, R)`` rewards less costs of the members by which users are routed.
        users: ``(V, R)``.
    """
    places, meeting = served_corners(net)
    weights = np.concatenate([users, places])
    served = np.concatenate([(users @ net.T).argmax(1), meeting])
    rows = np.asarray(members)[served]
    best = best_of_candidates(values, weights)  # (V, X)
    exact = _losses(values.policies.mean(1), best.mean(1), weights, rows)
    means = np.stack([_drawn(policy) for policy in values.policies], axis=1)  # (B, Q, R)
    drawn = _losses(means, _drawn(best.T), weights, rows)

    num_policies, num_prompts = values.policies.shape[:2]

    def largest(rows: slice) -> HeldOut:
        losses = []
        for lost, resampled in zip(exact, drawn, strict=True):
            enough = num_prompts >= MIN_USERS
            low, high = interval_of(resampled[:, rows].max(1), num_prompts) if enough else (np.nan, np.nan)
            losses.append(Estimate(float(lost[rows].max()), low, high))
        row = rows.start + int(exact[0][rows].argmax())
        return HeldOut(weights[row].tolist(), int(served[row]), *losses)

    of_users, worst = [largest(slice(row, row + 1)) for row in range(len(users))], largest(slice(len(users), None))
    num_candidates = int(np.isfinite(values.candidates).all(2).sum(1).max())
    return HeldOutLosses(of_users, worst, num_prompts, num_policies, num_candidates)


def _losses(
    means: Float64Array, best: Float64Array, weights: Float64Array, rows: IntArray
) -> tuple[Float64Array, Float64Array]:
    """Return what is lost ``(..., V)`` to the best of policies ``(..., Q, R)``, and to ``best`` ``(..., V)``.

    Args:
        means: Values of the policies.
        best: Of the candidates, by the weights.
        weights: ``(V, R)``.
        rows: ``(V,)`` the policies that serve them.
    """
    worth = weights @ means.swapaxes(-1, -2)  # (..., V, Q)
    served = worth[..., np.arange(len(rows)), rows]
    return worth.max(-1) - served, best - served


def _drawn(values: Float64Array) -> Float64Array:
    """Means ``(B, K)`` of ``(X, K)`` values over resampled prompts, the same for all."""
    return np.stack([resampled_means(column, _RESAMPLES, 0) for column in values.T], axis=-1)


def held_out_table(losses: HeldOutLosses, user_ids: Sequence[str], names: Sequence[str]) -> Table:
    """Show a line for every user, and one for the weights that lose most.

    Args:
        losses: Of the users.
        user_ids: Of the users.
        names: Of the objectives.
    """
    title = f"Regret of the finished portfolio on {losses.num_prompts} held-out prompts, 95% intervals over prompts"
    compared = f"to the best of {losses.num_policies} policies", f"to best-of-{losses.num_candidates}"
    rows = []
    for label, row in [*zip(user_ids, losses.users, strict=True), ("anybody, at most", losses.worst)]:
        mix = " + ".join(f"{weight:.2f} {name}" for weight, name in zip(row.weights, names, strict=True) if weight > 0)
        rows.append(TableRow([label, mix, str(row.member), spread(row.to_policies), spread(row.to_best_of_n)]))
    return section_table(Section(title, ("user", "weights", "member", *compared), rows))
