"""Choosing few policies of many: set covers, and portfolios of a fixed size.

Axes: P policies to choose from, W weight vectors to serve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from plm.arrays import BoolArray, Float64Array
from plm.methods.palm.oracle import Oracle, PolicySet
from plm.methods.palm.search import certificate, corner_search

Solver = Literal["greedy", "milp"]


class Portfolio(NamedTuple):
    """Few policies and what is proved about them."""

    members: PolicySet
    solved: PolicySet
    """All answers of the oracle, from which upper bounds follow."""
    certificate: float
    """No user of the simplex loses more than this to the policies that the oracle can make, measured where it measures.

    Of best-of-n that is every way to pick one candidate for each of its prompts. Of an oracle that trains it is an
    estimate, as good as the oracle's ``error``, and about policies made in the same way alone: others may be better.
    """
    num_calls: int
    """Weight vectors the oracle has solved so far."""
    error: float = 0.0
    """Of the oracle's answers, counted into the certificate."""


def greedy_cover(serves: BoolArray) -> list[int]:
    """Rows that together serve every column, each the one that serves most of what is left.

    At most ``ln W + 1`` times as many as needed.

    Args:
        serves: ``(P, W)`` True where the policy is good enough for the weight vector.

    Raises:
        ValueError: If a column is served by no row.
    """
    _check_coverable(serves)
    left, chosen = np.ones(serves.shape[1], dtype=bool), []
    while left.any():
        row = int(np.argmax(serves[:, left].sum(1)))
        chosen.append(row)
        left &= ~serves[row]
    return chosen


def smallest_cover(serves: BoolArray) -> list[int]:
    """The fewest rows that together serve every column, by integer programming; the greedy cover after 10 seconds.

    Raises:
        ValueError: If a column is served by no row.
    """
    _check_coverable(serves)
    columns = np.unique(serves, axis=1)
    solved = milp(
        np.ones(len(serves)),
        integrality=np.ones(len(serves)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(csr_array(columns.T.astype(np.float64)), lb=1),
        options={"time_limit": 10.0},
    )
    greedy = greedy_cover(serves)
    chosen = [] if solved.x is None else np.flatnonzero(solved.x > 0.5).tolist()
    return chosen if chosen and len(chosen) <= len(greedy) else greedy


def _check_coverable(serves: BoolArray) -> None:
    if not serves.any(0).all():
        missing = int(np.flatnonzero(~serves.any(0))[0])
        raise ValueError(f"no policy serves the weight vector in column {missing}; allow a larger loss")


def best_subset(losses: Float64Array, size: int, solver: Solver = "greedy") -> tuple[list[int], float]:
    """At most ``size`` policies with a small largest loss: bisection of the loss at which a cover needs no more.

    The subset found is then improved by exchanging one member at a time.

    Args:
        losses: ``(P, W)`` loss of each weight vector under each policy.
        size: Most members.
        solver: Greedy covers, or exact ones by integer programming, which make the subset optimal.

    Returns:
        The rows, and the largest loss over weight vectors of the best of them.
    """
    if size < 1:
        raise ValueError(f"expected at least one member, got {size!r}")
    cover = greedy_cover if solver == "greedy" else smallest_cover
    chosen = _exchanged(losses, _bisected(losses, size, cover=greedy_cover))
    if solver == "milp":
        below = np.unique(losses[losses < _largest(losses, chosen)])
        better = _bisected(losses, size, cover=cover, tolerances=below)
        chosen = better or chosen
    return sorted(chosen), _largest(losses, chosen)


def _bisected(
    losses: Float64Array, size: int, cover: Callable[[BoolArray], list[int]], tolerances: Float64Array | None = None
) -> list[int]:
    """The cover of at most ``size`` rows at the lowest tolerance where one is found; empty if there is none."""
    needed = losses.min(0).max()
    values = np.unique(losses) if tolerances is None else tolerances
    values = values[values >= needed]
    low, high, best = 0, len(values) - 1, list[int]()
    while low <= high:
        middle = (low + high) // 2
        rows = cover(losses <= values[middle])
        if len(rows) <= size:
            best, high = rows, middle - 1
        else:
            low = middle + 1
    return best


def _largest(losses: Float64Array, rows: list[int]) -> float:
    return float(losses[rows].min(0).max())


def _exchanged(losses: Float64Array, rows: list[int]) -> list[int]:
    """Replace one member by a better policy as long as that lowers the largest loss."""
    rows = list(rows)
    while True:
        current, move = _largest(losses, rows), None
        for place in range(len(rows)):
            others = rows[:place] + rows[place + 1 :]
            rest = losses[others].min(0) if others else np.full(losses.shape[1], np.inf)
            reached = np.minimum(losses, rest).max(1)
            row = int(reached.argmin())
            if reached[row] < current - 1e-12:
                current, move = float(reached[row]), (place, row)
        if move is None:
            return rows
        rows[move[0]] = move[1]


def choose_portfolio(
    oracle: Oracle,
    solved: PolicySet,
    size: int,
    solver: Solver = "greedy",
    rounds: int = 20,
    tolerance: float = 0.01,
) -> Portfolio:
    """At most ``size`` policies whose worst loss over the whole simplex is small, with its certificate.

    Chooses by `best_subset` at the solved weights; then solves the weights where the certificate is worst, adds them,
    and chooses again, until the whole simplex is served nearly as well as the solved weights.

    Args:
        oracle: Solves the weights at which the choice is tightened.
        solved: Policies and weights to choose from, those for the vertices among them.
        size: Most members.
        solver: See `best_subset`.
        rounds: Most additional oracle calls; 0 = none.
        tolerance: Stop when the certificate exceeds the loss at solved weights by no more than this share.

    Returns:
        The portfolio with the lowest certificate of all rounds.

    Raises:
        ValueError: If ``size`` or ``rounds`` is too small.
    """
    if rounds < 0:
        raise ValueError(f"choose_portfolio: expected rounds >= 0, got {rounds!r}")
    best: Portfolio | None = None
    for number in range(rounds + 1):
        values = solved.values(solved.weights)  # (W, P)
        rows, loss = best_subset((values.max(1)[:, None] - values).T, size, solver)
        members = solved.take(rows)
        worst = certificate(members, solved, oracle.error)
        if best is None or worst.regret < best.certificate:
            best = Portfolio(members, solved, worst.regret, oracle.num_calls)
        if number == rounds or worst.regret <= loss * (1 + tolerance) + 1e-9:
            break
        if (np.abs(solved.weights - worst.weights).max(1) < 1e-9).any():
            break  # the worst weights are solved already: asking again would change nothing
        solved = PolicySet.cat([solved, oracle.solve(worst.weights[None])])
    assert best is not None
    proved = certificate(best.members, solved, oracle.error)  # with all answers
    return Portfolio(best.members, solved, proved.regret, oracle.num_calls, oracle.error)


def build_portfolio(oracle: Oracle, size: int, delta: float) -> Portfolio:
    """`choose_portfolio` from the policies of a `corner_search` to ``delta``, or as far as 150 calls allow."""
    return choose_portfolio(oracle, corner_search(oracle, delta, max_calls=150).policies, size)
