"""Whether the user column of a table tells anything about its labels, and what that is worth on held-out pairs.

Each response is described by its surface and by hashed words; ``x`` is the difference of a pair's two. One logistic
model for everybody leaves residuals ``r``; where users differ, the vectors ``r x`` of one user point the same way.
Their sum of squares by user, against user columns permuted at random, is the score test of a random effect of the user
(as Le Cessie and van Houwelingen 1995, Biometrics 51:600). The same moments give the size of that effect, by which
users and controls are fitted.

Axes: N pairs, U users, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.special import expit

from plm.arrays import Float64Array, IntArray
from plm.audit.comparison import user_means
from plm.data.schema import PairTable
from plm.data.splits import TEST, TRAIN, VAL
from plm.data.surface import FORMAT, LENGTH, MAX_PAIRS, MIN_PAIRS, measure, separating_weights
from plm.evaluation import MIN_USERS, compare, minimum_detectable_effect

NUM_WORDS = 128
"""Columns that words and pairs of words are hashed into."""
NUM_PERMUTATIONS = 200
EVIDENCE = 4.0
"""Standard deviations above permuted columns from which a user column is believed; sums of squares have a long tail."""
NOTABLE_SPREAD = 1.0
"""Standard deviation of personal log-odds that matters: at even odds it makes 50 % of a person's answers 73 or 27 %."""
SHARES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
_POWER, _BOUND = 0.84, 1.64  # quantiles of the normal distribution at 0.8 and 0.95
_MAX_USER_PAIRS = 500


@dataclass(frozen=True)
class UserSignal:
    """What the user column tells about the labels."""

    num_users: int
    num_pairs: int
    score: float
    """Standard deviations above permuted user columns."""
    spread: float
    """Standard deviation of what is personal in the log-odds of a pair."""
    spread_high: float
    """Upper bound of it, passed one time in twenty."""
    found_from: float
    """Spread that would be found four times in five."""

    @property
    def is_found(self) -> bool:
        """Whether the labels depend on who judges."""
        return self.score > EVIDENCE

    @property
    def is_missing(self) -> bool:
        """Whether they do not, or less than matters."""
        return not self.is_found and self.spread_high < NOTABLE_SPREAD


@dataclass(frozen=True)
class Control:
    """Mean over users of an accuracy on held-out pairs less that of the model for everybody."""

    name: str
    accuracy: float
    difference: float
    difference_low: float
    difference_high: float
    difference_mde: float


class _Part(NamedTuple):
    """Pairs of one stage."""

    x: Float64Array
    """``(n, D)``."""
    user: IntArray
    """``(n,)``."""

    def of(self, users: IntArray) -> _Part:
        """The pairs of users among ``users``."""
        kept = np.isin(self.user, users)
        return _Part(self.x[kept], self.user[kept])


def read_signal(table: PairTable, stage: IntArray) -> tuple[UserSignal | None, list[Control]]:
    """Test whether labels depend on users; fit every user on their own training pairs and measure their test pairs.

    Args:
        table: The pairs.
        stage: ``(N,)`` stages as of `plm.data.splits`: users are fitted on training pairs, with the share of the
            measured spread that validation pairs prefer, and measured on test pairs.

    Returns:
        The test, on all pairs; None where fewer than `MIN_USERS` users have two pairs, or there are fewer than
        `MIN_PAIRS`. Then accuracies on test pairs, none where too few users have both test and training pairs:
        ``everybody``: one model for all; ``own pairs``; ``permuted users``: learned from as many pairs of anybody;
        ``reversed labels``: from the own pairs with the other response as the chosen one.
    """
    rows = _rows(table)
    user, stage = table.user[rows], stage[rows]
    if len(rows) < MIN_PAIRS or (np.bincount(user) > 1).sum() < MIN_USERS:
        return None, []
    x = _differences(table, rows)
    parts = [_Part(x[mask], user[mask]) for mask in (stage == TRAIN, stage == VAL, stage == TEST)]
    parts[1:] = [part.of(parts[0].user) for part in parts[1:]]
    enough = min(len(parts[0].x), len(parts[2].x)) >= MIN_PAIRS and len(np.unique(parts[2].user)) >= MIN_USERS
    return _signal(x, user), _controls(*parts) if enough else []


def _signal(x: Float64Array, user: IntArray) -> UserSignal:
    """The score test and what it could have found."""
    score, variance, unit = _effect(x, expit(-(x @ separating_weights(x, penalty=0.1))), user)
    high, found_from = (
        math.sqrt(max(value, 0.0) / unit) if unit > 0 else math.inf for value in (score + _BOUND, EVIDENCE + _POWER)
    )
    return UserSignal(len(np.unique(user)), len(x), score, math.sqrt(variance), high, found_from)


def _controls(train: _Part, val: _Part, test: _Part) -> list[Control]:
    """Accuracies of the probes on test pairs."""
    weights = separating_weights(train.x, penalty=0.1)
    base = test.x @ weights
    shuffled = _Part(train.x, np.random.default_rng(0).permutation(train.user))
    variance = _variance(train, val, weights)
    margins = {
        "everybody": base,
        "own pairs": base + _personal(train, test, weights, variance),
        "permuted users": base + _personal(shuffled, test, weights, _variance(shuffled, val, weights)),
        "reversed labels": base + _personal(train, test, weights, variance, reverse=True),
    }
    users, number = np.unique(test.user, return_inverse=True)
    accuracy = {name: user_means((np.sign(margin) + 1) / 2, number, len(users)) for name, margin in margins.items()}
    controls = []
    for name, values in accuracy.items():
        gain = compare(values, accuracy["everybody"])
        mde = minimum_detectable_effect(values - accuracy["everybody"])
        controls.append(Control(name, float(values.mean()), gain.difference, gain.low, gain.high, mde))
    return controls


def _variance(train: _Part, val: _Part, weights: Float64Array) -> float:
    """Variance of the users' effect: the share of what training pairs show that validation pairs prefer.

    Pairs of one user that share a response are less independent than the moments assume, so the whole may be too much.
    """
    _, variance, _ = _effect(train.x, expit(-(train.x @ weights)), train.user)
    base = val.x @ weights
    losses = [np.logaddexp(0, -base - _personal(train, val, weights, share * variance)).mean() for share in SHARES]
    return variance * (SHARES[int(np.argmin(losses))] if len(val.x) else 1.0)


def _rows(table: PairTable) -> IntArray:
    """Pairs that are no ties, of users drawn at random until there are enough pairs."""
    rows = np.flatnonzero(~table.tie)
    order = np.random.default_rng(0).permutation(table.num_users)
    ends = np.cumsum(np.bincount(table.user[rows], minlength=table.num_users)[order])
    kept = order[: max(int(np.searchsorted(ends, MAX_PAIRS, side="right")), MIN_USERS)]
    return rows[np.isin(table.user[rows], kept)]


def _differences(table: PairTable, rows: IntArray) -> Float64Array:
    """Features of chosen less those of rejected, ``(n, D)``, every column scaled so that a row has length one."""
    from sklearn.feature_extraction.text import HashingVectorizer  # slow to import

    used, number = np.unique(table.items[np.stack([table.chosen[rows], table.rejected[rows]]), 1], return_inverse=True)
    chosen, rejected = number.reshape(2, -1)
    texts = [table.responses[row] for row in used.tolist()]
    words = HashingVectorizer(n_features=NUM_WORDS, ngram_range=(1, 2)).transform(texts).toarray()
    values = np.concatenate([measure(texts, {**LENGTH, **FORMAT}), words], axis=1)
    raw = values[chosen] - values[rejected]
    scale = np.sqrt((raw**2).mean(axis=0))
    scaled = np.clip(np.divide(raw, scale, out=np.zeros_like(raw), where=scale > 0), -5, 5)
    length: Float64Array = scaled / math.sqrt(max(int((scale > 0).sum()), 1))
    return length


def _effect(x: Float64Array, residual: Float64Array, user: IntArray) -> tuple[float, float, float]:
    """Score, variance of the users' effect, and the score that a variance of one would have."""
    pull = residual[:, None] * x
    _, number = np.unique(user, return_inverse=True)

    def squares(number: IntArray) -> float:
        members = csr_array((np.ones(len(number)), (number, np.arange(len(number)))))
        return float(((members @ pull) ** 2).sum())

    rng = np.random.default_rng(0)
    permuted = np.array([squares(rng.permutation(number)) for _ in range(NUM_PERMUTATIONS)])
    excess, scatter = squares(number) - float(permuted.mean()), float(permuted.std(ddof=1))
    slope = residual * (1 - residual)
    expected = 0.0
    for rows in _of_users(number):
        products = np.outer(slope[rows], slope[rows]) * (x[rows] @ x[rows].T) ** 2
        expected += float(products.sum() - np.trace(products))
    if scatter == 0 or expected == 0:
        return 0.0, 0.0, 0.0
    return excess / scatter, max(excess, 0.0) / expected, expected / scatter


def _personal(
    support: _Part, query: _Part, weights: Float64Array, variance: float, *, reverse: bool = False
) -> Float64Array:
    """What is personal in the margins of the queries, ``(n,)``: one Newton step from the model for everybody.

    The prior of a user's weights is normal around those of everybody, with variance ``variance``.
    """
    personal = np.zeros(len(query.x))
    if variance == 0:
        return personal
    residual = expit(-(support.x @ weights))
    slope = np.sqrt(residual * (1 - residual))
    pull = residual - 1 if reverse else residual  # of the pair with its labels reversed, in the direction of x
    rows_of = {int(support.user[rows[0]]): rows for rows in _of_users(support.user)}
    for rows in _of_users(query.user):
        own = rows_of.get(int(query.user[rows[0]]))
        if own is None:
            continue
        x, root = support.x[own], slope[own]
        kernel = root[:, None] * (x @ x.T) * root + np.eye(len(own)) / variance
        personal[rows] = (query.x[rows] @ x.T) @ (root * np.linalg.solve(kernel, pull[own] / root))
    return personal


def _of_users(user: IntArray) -> Iterator[IntArray]:
    """Rows of every user, the first `_MAX_USER_PAIRS` of each."""
    order = np.argsort(user, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(user[order])) + 1):
        yield rows[:_MAX_USER_PAIRS]
