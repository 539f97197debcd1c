"""Find out which of two methods is better: paired differences over users, and p-values that survive many comparisons.

How seeds enter: a user's accuracies are averaged over the seeds of a method before anything is compared. An interval
then covers the choice of users for the mean of these seeds; how far seeds spread is reported beside it.

Axes: U users, M comparisons.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from plm.arrays import Float64Array
from plm.evaluation.statistics import CONFIDENCE, MIN_USERS, interval_of, resampled_means

MAX_RESAMPLED_USERS = 100_000
"""With more users than this the mean is normal for every purpose, and the closed form takes the bootstrap's place."""


class Comparison(NamedTuple):
    """Mean over users of a paired difference."""

    difference: float
    low: float
    """Lower end of the 95% interval; nan with fewer than `MIN_USERS` users."""
    high: float
    p_value: float
    """Two-sided, of no difference: below 0.05 just when the interval excludes zero; nan without an interval."""
    num_users: int
    """Users with a value on both sides."""


def compare(first: Float64Array, second: Float64Array, *, num_resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Bootstrap ``mean(first - second)``, paired and clustered by user.

    The p-value inverts the interval of `cluster_bootstrap`: it is one minus the level at which the expanded percentile
    interval would touch zero. It is never below ``1 / num_resamples``, the resolution of the resamples. With more than
    `MAX_RESAMPLED_USERS` users both are those of Student's paired t-test, whose standard error is clustered by user.

    Args:
        first: ``(U,)`` one value per user, seeds already averaged; nan = the user has none.
        second: ``(U,)`` the same users in the same order.
        num_resamples: Random draws of U users.
        seed: Seed of the draws.
    """
    gain = first - second
    gain = gain[~np.isnan(gain)]
    num_users = len(gain)
    if num_users < MIN_USERS:
        return Comparison(float(gain.mean()) if num_users else math.nan, math.nan, math.nan, math.nan, num_users)
    if not gain.any():
        return Comparison(0.0, 0.0, 0.0, 1.0, num_users)
    if num_users > MAX_RESAMPLED_USERS:
        return _closed_form(gain)
    means = resampled_means(gain, num_resamples, seed)
    low, high = interval_of(means, num_users)
    # half of the draws at exactly zero count on either side
    below = float((means < 0).sum() + 0.5 * (means == 0).sum()) / num_resamples
    share = max(min(below, 1 - below), 0.5 / num_resamples)
    quantile = NormalDist().inv_cdf(share) * math.sqrt((num_users - 1) / num_users)
    p_value = max(2 * float(stdtr(num_users - 1, quantile)), 1 / num_resamples)
    return Comparison(float(gain.mean()), low, high, min(p_value, 1.0), num_users)


def _closed_form(gain: Float64Array) -> Comparison:
    """The t-test of ``(U,)`` differences, one per user."""
    num_users, mean = len(gain), float(gain.mean())
    error = float(gain.std(ddof=1)) / math.sqrt(num_users)
    if error == 0:
        return Comparison(mean, mean, mean, 0.0, num_users)
    reach = float(stdtrit(num_users - 1, (1 + CONFIDENCE) / 2)) * error
    return Comparison(mean, mean - reach, mean + reach, 2 * float(stdtr(num_users - 1, -abs(mean) / error)), num_users)


def holm(p_values: Float64Array) -> Float64Array:
    """Adjust the p-values of M comparisons, ``(M,)``; nan stays nan and counts as no comparison.

    Holm 1979, "A simple sequentially rejective multiple test procedure": the k-th smallest of M is multiplied by
    ``M - k + 1`` and made no smaller than those before it. Rejecting at 0.05 errs anywhere with at most 5 %.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    adjusted = np.full(len(p_values), np.nan)
    order = np.argsort(p_values)[: int((~np.isnan(p_values)).sum())]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted
