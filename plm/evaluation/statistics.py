"""Statistics over users: bootstrap intervals of a mean and the numbers of a group of users.

Users are the unit of sampling: pairs of one user hang together, so intervals resample users, never pairs.

Axes: U users, M statistics, K shot counts, R repeats.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.special import stdtrit

from plm.arrays import Float64Array
from plm.metrics import FewShotTable, UserTable, calibration_error

CONFIDENCE = 0.95
"""Level of every interval."""

POWER = 0.8
"""How often the minimum detectable effect is found where it is true."""

MIN_USERS = 8
"""Fewer users than this get no interval and no verdict: too few resamples differ."""

_CHUNK = 4_000_000  # draws held in memory at once


def cluster_bootstrap(
    values: Float64Array, weights: Float64Array | None = None, *, num_resamples: int = 2000, seed: int = 0
) -> tuple[Float64Array, Float64Array]:
    """Compute the 95% interval of a mean over users by resampling users with replacement.

    All statistics share the same resamples. Percentiles are expanded for few users (Hesterberg 2015, "What teachers
    should know about the bootstrap", section 3.4): the plain percentile interval is too narrow by about
    ``sqrt((U - 1) / U)`` and a normal instead of a t quantile.

    Args:
        values: ``(U,)`` or ``(U, M)``, one value per user and statistic; nan = the user has none.
        weights: The same shape, non-negative: weight of each user in the mean; pair counts make a macro mean a micro
            one. All alike by default.
        num_resamples: Random draws of U users.
        seed: Seed of the draws.

    Returns:
        Lower and upper ends, of shape ``()`` or ``(M,)``; nan where fewer than `MIN_USERS` users have a value
        or one of them is infinite.
    """
    shape, num_users = values.shape[1:], len(values)
    flat = values.reshape(num_users, -1)
    present = ~np.isnan(flat)
    weight = np.where(present, 1.0 if weights is None else weights.reshape(num_users, -1), 0.0)
    total = np.where(np.isfinite(flat), flat, 0.0) * weight
    low, high = np.full(flat.shape[1], np.nan), np.full(flat.shape[1], np.nan)
    enough = (present.sum(axis=0) >= MIN_USERS) & ~np.isinf(flat).any(axis=0)
    if not enough.any():
        return low.reshape(shape), high.reshape(shape)
    sums = _resample(np.concatenate([total, weight], axis=1), num_resamples, seed)  # (resamples, 2M)
    with np.errstate(invalid="ignore"):
        means = sums[:, : flat.shape[1]] / sums[:, flat.shape[1] :]
    for index in np.flatnonzero(enough):
        low[index], high[index] = interval_of(means[:, index], int(present[:, index].sum()))
    return low.reshape(shape), high.reshape(shape)


def _resample(columns: Float64Array, num_resamples: int, seed: int) -> Float64Array:
    """Sums of ``(U, C)`` columns over U users drawn with replacement, ``(num_resamples, C)``: counts @ columns."""
    rng, num_users = np.random.default_rng(seed), len(columns)
    step = max(1, _CHUNK // num_users)
    sums = []
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        draws = rng.integers(num_users, size=(size, num_users)) + np.arange(size)[:, None] * num_users
        counts = np.bincount(draws.ravel(), minlength=size * num_users).reshape(size, num_users)
        sums.append(counts @ columns)
    return np.concatenate(sums)


def resampled_means(values: Float64Array, num_resamples: int, seed: int) -> Float64Array:
    """Means of ``(U,)`` values over U users drawn with replacement, ``(num_resamples,)``."""
    return _resample(values[:, None], num_resamples, seed)[:, 0] / len(values)


def interval_of(means: Float64Array, num_users: int) -> tuple[float, float]:
    """Ends of the expanded percentile interval of resampled means over U users."""
    tail = _expanded_tail(num_users)
    low, high = np.nanquantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _expanded_tail(num_users: int) -> float:
    """Percentile whose normal quantile, shrunk as U users shrink it, is the t quantile of `CONFIDENCE`."""
    quantile = float(stdtrit(num_users - 1, (1 + CONFIDENCE) / 2))
    return NormalDist().cdf(-quantile * math.sqrt(num_users / (num_users - 1)))


def summarize(table: UserTable, num_resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Estimate the numbers of a group of users, with ``<name>_low`` and ``<name>_high`` where there is an interval."""
    numbers = table.estimates()
    if not len(table.user_row):
        return numbers
    equal = np.ones_like(table.num_pairs)
    columns = {
        "accuracy": (table.accuracy, equal),
        "accuracy_micro": (table.accuracy, table.num_pairs),
        "log_loss": (table.log_loss, equal),
        "global_accuracy": (table.global_accuracy, equal),
        "personal_minus_global": (table.personal_minus_global, equal),
        "other_accuracy": (table.other_accuracy, equal),
        "personal_minus_other": (table.personal_minus_other, equal),
        "personal_minus_bradley_terry": (table.personal_minus_bradley_terry, equal),
        "personal_minus_majority": (table.personal_minus_majority, equal),
    }
    low, high = cluster_bootstrap(
        np.stack([values for values, _ in columns.values()], axis=1),
        np.stack([weights for _, weights in columns.values()], axis=1),
        num_resamples=num_resamples,
        seed=seed,
    )
    for index, name in enumerate(columns):
        if name in numbers:
            numbers |= {f"{name}_low": float(low[index]), f"{name}_high": float(high[index])}
            if name.startswith("personal_minus"):
                numbers[f"{name}_mde"] = minimum_detectable_effect(columns[name][0])
    return numbers


def minimum_detectable_effect(values: Float64Array) -> float:
    """The smallest true mean over users whose 95% interval would exclude zero four times in five.

    With standard deviation s over U users the interval of the mean reaches ``t s / sqrt(U)`` to either side, t the
    quantile of Student's distribution at 0.975, and the mean itself falls short by ``0.842 s / sqrt(U)`` one time in
    five: the effect is the sum of both.

    Args:
        values: ``(U,)`` one difference per user; nan = the user has none.

    >>> round(minimum_detectable_effect(np.array([-1.0, 1.0] * 50)), 4)
    0.2839
    """
    present = values[~np.isnan(values)]
    if len(present) < MIN_USERS:
        return math.nan
    reach = float(stdtrit(len(present) - 1, (1 + CONFIDENCE) / 2)) + NormalDist().inv_cdf(POWER)
    return reach * float(present.std(ddof=1)) / math.sqrt(len(present))


def is_flat(table: FewShotTable) -> bool:
    """Whether there are several shot counts, and no user's log-loss differs between them."""
    return len(table.shots) > 1 and np.allclose(table.log_loss, table.log_loss[:1], rtol=1e-5, equal_nan=True)


def summarize_few_shot(table: FewShotTable, num_resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Compute the few-shot curve: for each shot count the mean over repeats of the macro accuracy over users.

    Returns:
        Lists over shot counts: ``shots``, ``accuracy`` with its user-clustered interval ``accuracy_low`` and
        ``accuracy_high``, ``accuracy_sd`` over repeats (nan for one repeat), and, where zero shots were measured, the
        paired ``gain`` over zero shots with ``gain_low`` and ``gain_high`` and the share of users ``harmed``, whose
        accuracy is below that at zero shots, mean over repeats; ``log_loss``, macro over users, and ``ece`` over all
        pairs and repeats; plus ``num_users`` and ``num_repeats``.
    """
    num_repeats = table.accuracy.shape[1]
    per_user = np.nanmean(table.accuracy, axis=1).T  # (U, K)
    macro = np.nanmean(table.accuracy, axis=2)  # (K, R)
    low, high = cluster_bootstrap(per_user, num_resamples=num_resamples, seed=seed)
    curve: dict[str, Any] = {
        "num_users": len(table.user_row),
        "num_repeats": num_repeats,
        "shots": table.shots.tolist(),
        "accuracy": per_user.mean(axis=0).tolist(),
        "accuracy_low": low.tolist(),
        "accuracy_high": high.tolist(),
        "accuracy_sd": macro.std(axis=1, ddof=1).tolist() if num_repeats > 1 else [math.nan] * len(table.shots),
        "log_loss": np.nanmean(table.log_loss, axis=1).mean(axis=1).tolist(),
        "ece": [calibration_error(bins) for bins in table.bins],
    }
    if table.shots[0] == 0:
        gain = per_user - per_user[:, :1]
        low, high = cluster_bootstrap(gain, num_resamples=num_resamples, seed=seed)
        curve |= {"gain": gain.mean(axis=0).tolist(), "gain_low": low.tolist(), "gain_high": high.tolist()}
        curve["harmed"] = (table.accuracy < table.accuracy[:1]).mean(axis=(1, 2)).tolist()
    return curve
