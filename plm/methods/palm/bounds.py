"""What a cell promises: losses from cells, cells from losses, and the composition of errors.

A policy p is (eps, delta)-approximate for user v when ``J_v(p) >= (1 - eps) J*_v - delta``, with
``J_v(p) = v . R(p) - f(p)``, rewards ``R >= 0``, a regulariser ``f >= 0`` (beta times KL) and ``J*_v = max_p J_v(p)``.

``max_reward`` bounds the *sum* of all rewards of a policy, which a bound on each single reward does not replace from
four objectives on; ``max_cost`` bounds the regulariser of the policies compared.
"""

from __future__ import annotations

from typing import NamedTuple


class Slack(NamedTuple):
    """A relative and an absolute part: of a cell, or of a loss."""

    eps: float
    delta: float


def cell_loss(cell: Slack, max_reward: float, max_cost: float = 0.0, tight: bool = True) -> Slack:
    """What is lost when a user is served the policy trained for a weight vector whose cell holds the user.

    Paper, Lemma 3.2: ``(2 eps, 2 (delta R_max + eps f_max))``. ``tight`` gives the smaller numbers that its proof
    yields: ``1 - (1 - eps) / (1 + eps)`` and the absolute part divided by ``1 + eps``.

    >>> [round(value, 3) for value in cell_loss(Slack(0.4, 0.2), 1.18, 0.061, tight=False)]
    [0.8, 0.521]
    """
    absolute = 2 * (cell.delta * max_reward + cell.eps * max_cost)
    if not tight:
        return Slack(2 * cell.eps, absolute)
    return Slack(1 - (1 - cell.eps) / (1 + cell.eps), absolute / (1 + cell.eps))


def cell_for(loss: Slack, max_reward: float, max_cost: float = 0.0) -> Slack:
    """The largest cell whose `cell_loss` is at most ``loss``.

    Raises:
        ValueError: Unless ``0 < loss.eps <= 1`` and ``loss.delta > 0``.
    """
    if not (0 < loss.eps <= 1 and loss.delta > 0 and max_reward > 0):
        raise ValueError(f"expected 0 < eps <= 1, delta > 0 and max_reward > 0, got {loss!r} and {max_reward!r}")
    if max_cost == 0:
        return Slack(loss.eps / 2, min(loss.delta / (2 * max_reward), 1.0))
    return Slack(min(loss.eps / 2, loss.delta / (4 * max_cost)), min(loss.delta / (4 * max_reward), 1.0))


def composed(cell: Slack, error: Slack, max_reward: float, max_cost: float = 0.0, tight: bool = False) -> Slack:
    """The loss of a user in the cell of a weight vector for which the policy is only ``error``-approximate.

    The error may be that of an inexact oracle, or the tolerance of pruning; the cell may be the uncertainty of the
    user's weights: ``J_v(p) >= (1 - alpha)(1 - 2 eps) J*_v - [2 (eps f_max + delta R_max) + gamma]``.

    Args:
        cell: Of the weight vector.
        error: ``alpha`` and ``gamma``.
        max_reward: ``R_max``.
        max_cost: ``f_max``.
        tight: Use the smaller constants of `cell_loss`.
    """
    exact = cell_loss(cell, max_reward, max_cost, tight)
    return Slack(1 - (1 - error.eps) * (1 - exact.eps), exact.delta + error.delta)
