"""Exact cover of the simplex by cells: a proof, or a witness; and grids mended until they cover.

The cell of weights w is the set of users v with ``|w_i - v_i| <= eps v_i + delta`` for all i: a box cut by the simplex.
The slack is relative to the user's weight v_i, not to the member's.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from plm.methods.palm.grid import Weights, check_cell

Box = tuple[tuple[Fraction, Fraction], ...]
"""Lower and upper end of every coordinate."""

_ZERO, _ONE = Fraction(0), Fraction(1)


def cell(weights: Weights, eps: float | Fraction, delta: float | Fraction) -> Box:
    """The box of users whom ``weights`` serve."""
    eps, delta = check_cell(eps, delta)
    return tuple(
        (max(_ZERO, (w - delta) / (1 + eps)), _ONE if eps == 1 else min(_ONE, (w + delta) / (1 - eps))) for w in weights
    )


def in_cell(weights: Weights, user: Weights, eps: float | Fraction, delta: float | Fraction) -> bool:
    """Whether ``weights`` serve ``user``."""
    eps, delta = check_cell(eps, delta)
    return all(abs(w - v) <= eps * v + delta for w, v in zip(weights, user, strict=True))


def uncovered(grid: Sequence[Weights], eps: float | Fraction, delta: float | Fraction) -> Weights | None:
    """A user whom no cell holds, or None, which proves that the cells cover the whole simplex.

    Boxes are cut in two at faces of cells, in rationals, until each lies inside a cell or meets none in its interior.
    There are finitely many faces, so this ends.

    Args:
        grid: The weights.
        eps: Relative slack of a cell.
        delta: Absolute slack of a cell.

    Returns:
        The witness: a point of the simplex.
    """
    if not grid:
        raise ValueError("expected at least one weight vector to check, got none")
    num = len(grid[0])
    stack = [(tuple((_ZERO, _ONE) for _ in range(num)), [cell(weights, eps, delta) for weights in grid])]
    while stack:
        box, cells = stack.pop()
        tight = _tighten(box)
        if tight is None:
            continue
        meeting = [one for one in cells if _meet(one, tight)]
        if any(_inside(tight, one) for one in meeting):
            continue
        cut = _best_cut(tight, meeting)
        if cut is None:
            return _midpoint(tight)
        axis, at = cut
        low, high = tight[axis]
        stack.append(((*tight[:axis], (low, at), *tight[axis + 1 :]), meeting))
        stack.append(((*tight[:axis], (at, high), *tight[axis + 1 :]), meeting))
    return None


def repaired(
    grid: Sequence[Weights], eps: float | Fraction, delta: float | Fraction, max_added: int = 1000
) -> list[Weights]:
    """The grid with a weight vector added at every witness until the cells cover the simplex, proved exactly.

    Raises:
        ValueError: If ``max_added`` additions are not enough; `plm.methods.palm.grid.combined_grid` always covers.
    """
    weights = list(grid)
    for _ in range(max_added + 1):
        witness = uncovered(weights, eps, delta)
        if witness is None:
            return weights
        weights.append(witness)
    raise ValueError(
        f"{len(grid)} weights and {max_added} repairs do not cover the simplex at eps {eps!r}, delta {delta!r}; "
        "start from more weights, or use combined_grid"
    )


def _tighten(box: Box) -> Box | None:
    """The smallest box that holds the part of ``box`` on the simplex, None if there is none."""
    low, high = sum((a for a, _ in box), _ZERO), sum((b for _, b in box), _ZERO)
    if low > 1 or high < 1:
        return None
    return tuple((max(a, 1 - (high - b)), min(b, 1 - (low - a))) for a, b in box)


def _meet(one: Box, two: Box) -> bool:
    """Whether two closed boxes meet."""
    return all(a <= d and c <= b for (a, b), (c, d) in zip(one, two, strict=True))


def _inside(inner: Box, outer: Box) -> bool:
    return all(c <= a and b <= d for (a, b), (c, d) in zip(inner, outer, strict=True))


def _best_cut(box: Box, cells: list[Box]) -> tuple[int, Fraction] | None:
    """Axis and place of the most even cut by a face of the cell that overlaps the box most; None if no face cuts."""

    def overlap(one: Box) -> float:
        share = 1.0
        for (a, b), (c, d) in zip(box, one, strict=True):
            if a < b:
                share *= float((min(b, d) - max(a, c)) / (b - a))
        return share

    for one in sorted(cells, key=overlap, reverse=True):
        cuts = [
            (abs(at - (a + b) / 2) / (b - a), axis, at)
            for axis, ((a, b), ends) in enumerate(zip(box, one, strict=True))
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
