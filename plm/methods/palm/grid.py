"""Grids of weights on the simplex: combined, lifted and direct grids, their sizes, and the baselines.

Axes: N weights, R objectives, U users.

Weights of a grid are exact rationals, because what they cover is decided exactly (`plm.methods.palm.cover`); a float
such as 0.4 is read as the decimal it is written as, 2/5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from plm.arrays import Float64Array

Weights = tuple[Fraction, ...]
"""One point of the simplex."""


def rational(value: float | Fraction) -> Fraction:
    """The number as written in decimals.

    >>> rational(0.4)
    Fraction(2, 5)
    """
    return value if isinstance(value, Fraction) else Fraction(str(value))


def as_array(weights: Iterable[Weights]) -> Float64Array:
    """Exact weights as floats, ``(N, R)``, each row summing to one within rounding."""
    return np.array([[float(value) for value in row] for row in weights], dtype=np.float64)


def check_cell(eps: float | Fraction, delta: float | Fraction) -> tuple[Fraction, Fraction]:
    """The cell's relative and absolute slack as rationals.

    Raises:
        ValueError: Unless ``0 <= eps <= 1`` and ``0 < delta <= 1``.
    """
    if not 0 <= eps <= 1 or not 0 < delta <= 1:
        raise ValueError(f"expected 0 <= eps <= 1 and 0 < delta <= 1, got eps {eps!r} and delta {delta!r}")
    return rational(eps), rational(delta)


# ---------------------------------------------------------------------- levels
def combined_levels(eps: float | Fraction, delta: float | Fraction) -> list[Fraction]:
    """Levels ``0, delta (1 + eps)^k < 1, 1``: additive below ``delta``, multiplicative above.

    >>> [round(float(level), 3) for level in combined_levels(0.4, 0.2)]
    [0.0, 0.2, 0.28, 0.392, 0.549, 0.768, 1.0]
    """
    eps, delta = check_cell(eps, delta)
    if eps == 0:
        raise ValueError("expected eps > 0 for a combined grid, got 0; two_sided_levels makes additive ones")
    levels, level = [Fraction(0)], delta
    while level < 1:
        levels.append(level)
        level *= 1 + eps
    return [*levels, Fraction(1)]


def two_sided_levels(
    eps: float | Fraction, delta: float | Fraction, top: float | Fraction = 0.5, last: float | Fraction = 0.4
) -> list[Fraction]:
    """Fewest levels whose one-dimensional cells cover ``[0, top]``; the last one is at most ``last``.

    The cell of a level t is ``[(t - delta) / (1 + eps), (t + delta) / (1 - eps)]``, so levels follow
    ``t_0 = delta, t_{k+1} = (1 + eps) / (1 - eps) (t_k + delta) + delta``. At eps = 0 they are ``2 delta`` apart.

    >>> [str(level) for level in two_sided_levels(0.4, Fraction(1, 80))]
    ['1/80', '17/240', '149/720', '2/5']
    """
    eps, delta = check_cell(eps, delta)
    if eps == 1:
        raise ValueError("expected eps < 1 for two-sided levels, got 1, whose cells have no upper end")
    levels = [delta]
    while (levels[-1] + delta) / (1 - eps) < rational(top):
        levels.append((1 + eps) / (1 - eps) * (levels[-1] + delta) + delta)
    # a lower last level still reaches the top as long as its own cell does
    reaches = rational(top) * (1 - eps) - delta
    levels[-1] = max(min(levels[-1], rational(last)), reaches)
    return levels


# ---------------------------------------------------------------------- grids
def lifted_grid(levels: Sequence[Fraction], num_objectives: int) -> list[Weights]:
    """Weights whose largest coordinate is scaled to one: the others take all levels, then the row is normalised."""
    grid: dict[Weights, None] = {}
    for place in range(num_objectives):
        for others in itertools.product(levels, repeat=num_objectives - 1):
            lifted = (*others[:place], Fraction(1), *others[place:])
            total = sum(lifted)
            grid[tuple(value / total for value in lifted)] = None
    return list(grid)


def combined_grid(eps: float | Fraction, delta: float | Fraction, num_objectives: int) -> list[Weights]:
    """PALM's Algorithm 1: the weights whose cells cover the simplex for every eps, delta and number of objectives.

    Their number is `combined_grid_size`. A user finds a member whose cell holds the user by scaling the largest weight
    to one and rounding the others up to the next level; of those below ``delta`` as many of the largest go to ``delta``
    as keeps their sum, the rest to zero.
    """
    return lifted_grid(combined_levels(eps, delta), num_objectives)


def combined_grid_size(eps: float | Fraction, delta: float | Fraction, num_objectives: int) -> int:
    """``m^R - (m - 1)^R`` with m levels; it depends on the number of objectives, never on that of users.

    >>> [combined_grid_size(0.4, 0.2, num) for num in (2, 3, 4, 5)]
    [13, 127, 1105, 9031]
    """
    eps, delta = check_cell(eps, delta)
    steps = max(0, int(math.log(1 / delta) / math.log1p(eps)) - 1)  # below the exact number, by rounding at most
    while delta * (1 + eps) ** steps < 1:
        steps += 1
    return int((steps + 2) ** num_objectives - (steps + 1) ** num_objectives)


def direct_grid(levels: Sequence[Fraction], num_objectives: int) -> list[Weights]:
    """Weights of which all but one coordinate take levels; that one is the rest, if there is any.

    A heuristic of few weights, which `plm.methods.palm.cover.certified_cover` checks and repairs.
    """
    grid: dict[Weights, None] = {}
    for place in range(num_objectives):
        for others in itertools.product(levels, repeat=num_objectives - 1):
            rest = 1 - sum(others, Fraction(0))
            if rest >= 0:
                weights = (*others[:place], rest, *others[place:])
                grid[weights] = None
    return list(grid)


# ---------------------------------------------------------------------- baselines
def random_weights(num: int, num_objectives: int, rng: np.random.Generator) -> Float64Array:
    """Uniform draws from the simplex, ``(N, R)``."""
    weights: Float64Array = rng.dirichlet(np.ones(num_objectives), num)
    return weights


def lattice(steps: int, num_objectives: int) -> list[Weights]:
    """Evenly spaced weights: all multiples of ``1 / steps``.

    >>> len(lattice(8, 3)), len(lattice(12, 2))
    (45, 13)
    """
    parts = (
        np.diff([-1, *bars, steps + num_objectives - 1]) - 1
        for bars in itertools.combinations(range(steps + num_objectives - 1), num_objectives - 1)
    )
    return [tuple(Fraction(int(value), steps) for value in row) for row in parts]


def lattice_weights(num: int, num_objectives: int, rng: np.random.Generator) -> Float64Array:
    """An evenly spread set of exactly ``num`` weights, ``(N, R)``.

    The smallest lattice with as many points, thinned to those farthest from each other: a random first corner, then
    again and again the point farthest from those taken, ties broken at random. One weight is the centre.
    """
    if num == 1:
        return np.full((1, num_objectives), 1.0 / num_objectives)
    steps = 1
    while math.comb(steps + num_objectives - 1, num_objectives - 1) < num:
        steps += 1
    points = rng.permutation(as_array(lattice(steps, num_objectives)))
    taken = [int(np.argmax(points.max(1)))]
    while len(taken) < num:
        distance = np.linalg.norm(points[:, None] - points[taken], axis=-1).min(1)
        taken.append(int(np.argmax(np.round(distance, 9))))
    chosen: Float64Array = points[taken]
    return chosen


def kmeans_weights(users: Float64Array, num: int, rng: np.random.Generator) -> Float64Array:
    """Centroids of the users' weights, ``(U, R)`` -> ``(N, R)``: the best of four runs of Lloyd's algorithm."""
    from sklearn.cluster import KMeans  # half a second to import: only for this baseline

    seed = int(rng.integers(2**31))
    centres: Float64Array = KMeans(num, n_init=4, random_state=seed).fit(users).cluster_centers_.astype(np.float64)
    centres /= centres.sum(1, keepdims=True)
    return centres
