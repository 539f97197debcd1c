"""In what users differ: principal axes of their rewards, and whether they fall into clusters.

Users are weights of K shared rewards. Weights themselves are coordinates that a fit chooses freely: bases may be
turned, stretched and flipped without a change of anybody's reward. All here is therefore measured in rewards: the
distance of two users is the root mean square by which their margins of the N comparisons differ.

Axes: N comparisons, U users, K shared rewards, J principal axes.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from plm.arrays import BoolArray, Float64Array, IntArray
from plm.evaluation import MIN_USERS

MAX_CLUSTERS = 6
LEAST_PART = 0.05
"""Share of the users that a cluster must have at least, besides `MIN_USERS`."""
NUM_DRAWS = 99
"""Clouds without clusters that users are compared with; all of them must be harder to divide."""
_DRAWN_USERS = 2_000
"""Users of such a cloud, at most; fewer make it vary more, so that less is claimed."""
_ENOUGH = 3
"""Clouds that are divided as well for every number of groups, after which no more are drawn."""
_STARTS = 4
"""Starts of k-means, of which the best counts."""
LEAST_SHARE = 0.05
"""Share of the users' variance that an axis must have to be shown, besides the first."""
_ROUNDING = 1e-5
"""Spread of an axis, as a share of that of the first, below which it is what single precision has left."""


class PrincipalAxes(NamedTuple):
    """Directions in which users deviate from the population, the widest first."""

    directions: Float64Array
    """``(K, J)``: weights that move margins by a root mean square of one."""
    coordinates: Float64Array
    """``(U, J)`` where users are: the root mean square by which an axis moves their margins, with its sign."""

    @property
    def spread(self) -> Float64Array:
        """``(J,)`` root mean square over users."""
        spread: Float64Array = np.sqrt(np.square(self.coordinates).mean(0))
        return spread

    @property
    def shares(self) -> Float64Array:
        """``(J,)`` shares of the variance."""
        variance = np.square(self.spread)
        shares: Float64Array = variance / variance.sum()
        return shares

    @property
    def num_shown(self) -> int:
        """How many axes are worth a look: the first, and those after it of `LEAST_SHARE` or more."""
        return max(int((self.shares >= LEAST_SHARE).sum()), min(len(self.shares), 1))


def principal_axes(margins: Float64Array, moved: Float64Array) -> PrincipalAxes:
    """Principal axes of users' deviations from the population, measured in margins.

    With margins F of the comparisons along the shared rewards and deviations W of weights, the margins by which users
    deviate are ``F W'``. Its singular vectors are the axes; they follow from K by K matrices. They stay the same when
    bases are turned, stretched or flipped, with weights that make up for it. An axis points to where more users are,
    and with as many on both sides to where they are farther out.

    Args:
        margins: ``(N, K)`` F.
        moved: ``(U, K)`` W, the population at zero.

    >>> axes = principal_axes(np.eye(2), np.array([[3.0, 0.0], [-3.0, 0.0], [3.0, 0.5]]))
    >>> axes.spread.round(2), bool(axes.coordinates[0, 0] > 0)
    (array([2.13, 0.2 ]), True)
    """
    values, vectors = np.linalg.eigh(margins.T @ margins / len(margins))
    size = np.sqrt(np.clip(values, 0.0, None))
    kept = size > 1e-9 * size.max()
    root, vectors = size[kept], vectors[:, kept]
    users, spread, turned = np.linalg.svd((moved @ vectors) * root, full_matrices=False)
    wide = spread > _ROUNDING * max(spread.max(), np.finfo(float).tiny) if len(spread) else spread > 0
    coordinates, turned = (users * spread)[:, wide], turned[wide]
    more = (coordinates > 0).sum(0) - (coordinates < 0).sum(0)
    sign = np.where(np.where(more == 0, np.power(coordinates, 3).sum(0), more) < 0, -1.0, 1.0)
    return PrincipalAxes((vectors / root) @ turned.T * sign, coordinates * sign)


def not_told_apart(axes: PrincipalAxes) -> BoolArray:
    """Whether an axis and the next could be turned into each other by chance: ``(J,)``.

    North's rule (North et al. 1982, Monthly Weather Review 110): the variance v of an axis over U users has a standard
    error of ``v sqrt(2 / U)``, and axes whose variances are closer than that are mixed at random.
    """
    variance = np.square(axes.spread)
    gap = variance - np.append(variance[1:], 0.0)
    close: BoolArray = gap < variance * np.sqrt(2 / len(axes.coordinates))
    return close & (np.arange(len(gap)) < len(gap) - 1)


class Clusters(NamedTuple):
    """Users in groups, the largest first."""

    label: IntArray
    """``(U,)`` group of each user."""
    p_value: float
    """Share of clouds without clusters that can be divided as well, of the number of groups with the lowest one; nan
    where every number has a group that is too small."""


def cluster_users(points: Float64Array) -> Clusters:
    """Divide users by k-means into as many groups as the gap statistic finds, or into none.

    The gap of k groups is by how much smaller the logarithm of the variance within them is than in clouds without
    clusters (Tibshirani, Walther, Hastie 2001). These are uniform boxes along the principal axes of the users, as here,
    but with variances of the users in the place of ranges: on a line no symmetric cloud with one peak is easier to
    divide in two. Groups are those of the least k whose gap is smaller than that of all `NUM_DRAWS` boxes by itself,
    and that no greater k exceeds by more than a standard error. Every group has `MIN_USERS` users and `LEAST_PART` of
    all at least.

    Args:
        points: ``(U, J)``.

    Returns:
        One group where there is no such k.
    """
    nobody_apart = np.zeros(len(points), dtype=np.int64)
    least = max(MIN_USERS, int(np.ceil(LEAST_PART * len(points))))
    scores, counts, found = _scores(points), [], []
    for count in range(2, MAX_CLUSTERS + 1) if scores.any() else ():
        divided = _k_means(scores, count) if count * least <= len(points) else None
        if divided is not None and np.bincount(divided[0], minlength=count).min() >= least:
            counts.append(count)
            found.append(divided)
    if not counts:
        return Clusters(nobody_apart, float("nan"))
    draw, width = np.random.default_rng(0), np.sqrt(3.0) * scores.std(0)
    shape = (min(len(points), _DRAWN_USERS), len(width))
    reference, left = np.zeros((0, len(counts))), np.array([within for _, within in found])
    as_good = np.zeros(len(counts))
    while len(reference) < NUM_DRAWS and as_good.min() < _ENOUGH:
        box = _scores(draw.uniform(-1.0, 1.0, shape) * width)
        reference = np.vstack([reference, [_k_means(box, count)[1] for count in counts]])
        as_good = (reference <= left).sum(0, dtype=np.float64)
    p_values = (1 + as_good) / (1 + len(reference))
    gap, error = reference.mean(0) - left, reference.std(0) * np.sqrt(1 + 1 / NUM_DRAWS)
    for index, (label, _) in enumerate(found):
        is_clear = p_values[index] <= 1 / (1 + NUM_DRAWS)
        if is_clear and (gap[index] >= gap[index + 1 :] - error[index + 1 :]).all():
            first = np.unique(label, return_index=True)[1]
            return Clusters(np.argsort(np.lexsort((first, -np.bincount(label))))[label], float(p_values[index]))
    return Clusters(nobody_apart, float(p_values.min()))


def _scores(points: Float64Array) -> Float64Array:
    """Points along their principal axes, around their mean."""
    users, spread, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    scores: Float64Array = users * spread
    return scores


def _k_means(scores: Float64Array, count: int) -> tuple[IntArray, float]:
    """Groups ``(U,)`` by k-means, and the logarithm of the share of the variance that is left within them."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():  # of users who are at fewer places than there are groups
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(count, n_init=_STARTS, random_state=0).fit(scores)
    return found.labels_, float(np.log(max(found.inertia_ / np.square(scores).sum(), 1e-12)))
