"""Exact cover of the simplex by cells: a proof, or a witness; and grids repaired until they cover.

The cell of weights w is the set of users v with ``|w_i - v_i| <= eps v_i + delta`` for all i: a box cut by the simplex.
The slack is relative to the user's weight v_i, not to the member's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from plm.methods.palm.bounds import Slack
from plm.methods.palm.grid import Weights, check_cell, combined_grid_size, direct_grid, two_sided_levels

Box = tuple[tuple[Fraction, Fraction], ...]
"""Lower and upper end of every coordinate."""

_ZERO, _ONE = Fraction(0), Fraction(1)
_MOST_CHECKED = 256  # weights of a grid that is checked, and repairs of it: some seconds


def cell(weights: Weights, eps: float | Fraction, delta: float | Fraction) -> Box:
    """The box of users whom ``weights`` serve."""
    eps, delta = check_cell(eps, delta)
    return tuple(
        (max(_ZERO, (w - delta) / (1 + eps)), _ONE if eps == 1 else min(_ONE, (w + delta) / (1 - eps))) for w in weights
    )


def uncovered(grid: Sequence[Weights], eps: float | Fraction, delta: float | Fraction) -> Weights | None:
    """A user whom no cell holds, or None, which proves that the cells cover the whole simplex.

    Args:
        grid: The weights.
        eps: Relative slack of a cell.
        delta: Absolute slack of a cell.

    Returns:
        The witness: a point of the simplex.
    """
    return next(_witnesses(grid, eps, delta), None)


def repaired(
    grid: Sequence[Weights], eps: float | Fraction, delta: float | Fraction, max_added: int = 1000
) -> list[Weights]:
    """The grid with a weight vector added at every witness until the cells cover the simplex, proved exactly.

    Raises:
        ValueError: If ``max_added`` additions are not enough; `plm.methods.palm.grid.combined_grid` always covers.
    """
    added = list(itertools.islice(_witnesses(grid, eps, delta), max_added + 1))
    if len(added) > max_added:
        raise ValueError(
            f"{len(grid)} weights and {max_added} repairs do not cover the simplex at eps {eps!r}, delta {delta!r}; "
            "start from more weights, or use combined_grid"
        )
    return [*grid, *added]


class Cover(NamedTuple):
    """Weights whose cells are proved to cover the simplex."""

    size: int
    """How many they are."""
    proof: Literal["exact check", "theorem"]
    """Whether these very cells were checked, or the combined grid is used, which covers for every cell."""


def certified_cover(cell: Slack, num_objectives: int) -> Cover:
    """The smaller of two covers by cells of this slack: a repaired direct grid, if it is small, or the combined grid.

    >>> certified_cover(Slack(0.4, 0.0125), 3), certified_cover(Slack(0.1, 0.001), 4)
    (Cover(size=48, proof='exact check'), Cover(size=1705621, proof='theorem'))
    """
    by_theorem = combined_grid_size(*cell, num_objectives)
    levels = two_sided_levels(*cell) if cell.eps < 1 else []
    if 0 < num_objectives * len(levels) ** (num_objectives - 1) <= _MOST_CHECKED:
        try:
            size = len(repaired(direct_grid(levels, num_objectives), *cell, max_added=_MOST_CHECKED))
        except ValueError:  # too many holes to repair
            size = by_theorem
        if size < by_theorem:
            return Cover(size, "exact check")
    return Cover(by_theorem, "theorem")


def _witnesses(grid: Sequence[Weights], eps: float | Fraction, delta: float | Fraction) -> Iterator[Weights]:
    """Users whom no cell holds; from then on each counts as a weight vector of its own, so that all holes are found.

    Boxes are cut in two at faces of cells, in rationals, until each lies inside a cell or meets none in its interior.
    There are finitely many faces, so this ends.
    """
    if not grid:
        raise ValueError("expected at least one weight vector to check, got none")
    unit = tuple((_ZERO, _ONE) for _ in grid[0])
    stack = [(unit, [cell(weights, eps, delta) for weights in grid])]
    while stack:
        box, cells = stack.pop()
        tight = _tighten(box)
        if tight is None:
            continue
        meeting = [near for near in cells if _meet(near, tight)]
        if any(_inside(tight, near) for near in meeting):
            continue
        cut = _best_cut(tight, meeting)
        if cut is None:
            witness = _midpoint(tight)
            yield witness
            added = cell(witness, eps, delta)
            stack = [(rest, [*near, added]) for rest, near in [*stack, (tight, meeting)]]
            continue
        axis, at = cut
        low, high = tight[axis]
        stack.append(((*tight[:axis], (low, at), *tight[axis + 1 :]), meeting))
        stack.append(((*tight[:axis], (at, high), *tight[axis + 1 :]), meeting))


def _tighten(box: Box) -> Box | None:
    """The smallest box that holds the part of ``box`` on the simplex, None if there is none."""
    low, high = sum((a for a, _ in box), _ZERO), sum((b for _, b in box), _ZERO)
    if low > 1 or high < 1:
        return None
    return tuple((max(a, 1 - (high - b)), min(b, 1 - (low - a))) for a, b in box)


def _meet(first: Box, second: Box) -> bool:
    """Whether two closed boxes meet."""
    return all(a <= d and c <= b for (a, b), (c, d) in zip(first, second, strict=True))


def _inside(inner: Box, outer: Box) -> bool:
    return all(c <= a and b <= d for (a, b), (c, d) in zip(inner, outer, strict=True))


def _best_cut(box: Box, cells: list[Box]) -> tuple[int, Fraction] | None:
    """Axis and place of the most even cut by a face of the cell that overlaps the box most; None if no face cuts."""

    def overlap(near: Box) -> float:
        share = 1.0
        for (a, b), (c, d) in zip(box, near, strict=True):
            if a < b:
                share *= float((min(b, d) - max(a, c)) / (b - a))
        return share

    for near in sorted(cells, key=overlap, reverse=True):
        cuts = [
            (abs(at - (a + b) / 2) / (b - a), axis, at)
            for axis, ((a, b), ends) in enumerate(zip(box, near, strict=True))
            for at in ends
            if a < at < b
        ]
        if cuts:
            return min(cuts)[1:]
    return None


def _midpoint(box: Box) -> Weights:
    """The point of the simplex on the diagonal of a tightened box."""
    low, size = sum((a for a, _ in box), _ZERO), sum((b - a for a, b in box), _ZERO)
    share = (1 - low) / size if size else _ZERO
    return tuple(a + share * (b - a) for a, b in box)
