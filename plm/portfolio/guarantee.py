"""PALM's theorem for an accuracy: the cell it needs, a cover by such cells, and the loss that follows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from plm.methods.palm.bounds import Slack, cell_for, composed
from plm.methods.palm.cover import Cover, certified_cover
from plm.methods.palm.grid import combined_grid_size
from plm.methods.palm.oracle import Oracle
from plm.methods.palm.search import certificate
from plm.methods.palm.selection import Portfolio
from plm.portfolio.study import record


class Guarantee(NamedTuple):
    """How many weights need a policy so that nobody loses more than an accuracy allows, and whether fewer members do.

    See `plm.methods.palm.bounds` for what an accuracy, ``R_max`` and ``f_max`` are.
    """

    accuracy: Slack
    """Share of the best value, and absolute loss, that anybody may lose."""
    max_reward: float
    """``R_max`` of the oracle."""
    max_cost: float
    """``f_max`` of the oracle."""
    oracle_error: float
    """How far an answer of the oracle may be from the best policy."""
    cell: Slack
    """The largest cell, to four digits, whose loss the accuracy allows."""
    grid_size: int
    """Weights of PALM's grid for this cell."""
    cover: Cover
    """Weights whose cells are proved to hold everybody."""
    loss: Slack
    """What anybody loses at most by the policy made for the weights of the cover whose cell holds them."""
    members: int
    """Members of the portfolio that was chosen."""
    beyond: float
    """What anybody loses at most by that portfolio beyond the share that the accuracy allows, as certified."""

    def record(self) -> dict[str, Any]:
        """The same for a file."""
        return {**record(self), "within_accuracy": self.beyond <= self.accuracy.delta}

    def lines(self) -> list[str]:
        """Sentences for the terminal."""
        eps, delta = self.accuracy
        beyond = f"{max(self.beyond, 0):.4g}"
        reached = "within" if self.beyond <= delta else "NOT within"
        error = f", oracle error {self.oracle_error:.4g}" if self.oracle_error > 0 else ""
        how = "each checked exactly" if self.cover.proof == "exact check" else "by the theorem"
        return [
            f"Accuracy: nobody may lose more than {eps:.2%} of the best value and {delta:g} besides; "
            f"R_max {self.max_reward:.4g}, f_max {self.max_cost:.4g}{error}",
            f"Cell: eps' {self.cell.eps:g}, delta' {self.cell.delta:g}",
            f"Certified cover: {self.cover.size:,} weights, {how}; the grid for this cell has {self.grid_size:,}",
            f"Guarantee: with a policy made for each of them, nobody loses more than {self.loss.eps:.2%} of the best "
            f"value and {self.loss.delta:.4g} besides",
            f"The {self.members} members chosen: nobody loses more than {eps:.2%} and {beyond} besides, "
            f"{reached} the accuracy",
        ]


def guarantee_of(accuracy: Slack, oracle: Oracle, portfolio: Portfolio) -> Guarantee:
    """The guarantee for an accuracy, with the oracle that made a portfolio.

    Raises:
        ValueError: Unless ``0 < accuracy.eps <= 1`` and ``accuracy.delta > 0``.
    """
    num, bounds = oracle.num_objectives, (oracle.max_reward, oracle.max_cost)
    cell = Slack(*map(_rounded_down, cell_for(accuracy, *bounds)))
    return Guarantee(
        accuracy,
        *bounds,
        oracle.error,
        cell,
        combined_grid_size(*cell, num),
        certified_cover(cell, num),
        composed(cell, Slack(0.0, oracle.error), *bounds, tight=True),
        len(portfolio.members.weights),
        certificate(portfolio.members, portfolio.solved, portfolio.error, accuracy.eps).regret,
    )


def _rounded_down(value: float) -> float:
    """Four significant digits, so that a cell is made of short fractions.

    >>> _rounded_down(0.0819672), _rounded_down(0.2)
    (0.08196, 0.2)
    """
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    return math.floor(value * scale + 1e-9) / scale
