"""Logits of many users at once: solved from their pairs under a normal prior.

Axes: N pairs, U users, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plm.functional import unit_mean_per_user
from plm.methods.pal.geometry import Cache
from plm.methods.pal.solver import fit_deviations

LogitMargins = Callable[[Cache, Tensor], Tensor]
"""What margins need of N pairs, logits of each pair's user ``(N, K)`` -> margins ``(N,)``."""
MAX_STEPS = 40


class Prior(NamedTuple):
    """Normal prior on the logits of a user nobody has seen."""

    centre: Tensor
    """``(K,)``."""
    scale: Tensor
    """``()``."""


class Solvable(NamedTuple):
    """Pairs of whole users, ready to be solved for their logits."""

    cache: Cache
    target: Tensor
    """``(N,)``."""
    weight: Tensor
    """``(N,)``."""
    row: Tensor
    """``(N,)`` the user of each pair."""


def solve_logits(
    margins: LogitMargins, pairs: Solvable, prior: Prior, start: Tensor, num_steps: int = MAX_STEPS
) -> tuple[Tensor, Tensor]:
    """Posterior mode and precision of every user's logits: ``(U, K)``, ``(U, K, K)``.

    The weights of a user's pairs are scaled to mean one.

    Args:
        margins: The model.
        pairs: Pairs of users 0 to U - 1; a user without pairs gets the prior.
        prior: The prior.
        start: ``(U, K)`` logits to start from.
        num_steps: Most steps; 0 = the precision at ``start``.
    """
    weight = unit_mean_per_user(pairs.weight, pairs.row, len(start))
    posterior = fit_deviations(
        lambda rows: margins(pairs.cache, prior.centre + prior.scale * rows),
        pairs.target,
        weight,
        pairs.row,
        (start - prior.centre) / prior.scale,
        num_steps,
    )
    logits = prior.centre + prior.scale * posterior.mean
    return logits.to(start), (posterior.precision / prior.scale**2).to(start)


def solve_table(
    margins: LogitMargins, batches: Sequence[Solvable], prior: Prior, start: Tensor, num_steps: int = MAX_STEPS
) -> tuple[Tensor, Tensor, Tensor]:
    """`solve_logits` of the users who occur in batches of whole users, as rows of a table.

    Returns:
        Logits ``(U, K)``, precision ``(U, K, K)`` and whether a user occurs ``(U,)``, as 0 or 1; rows of users who do
        not are zero.
    """
    num_users, num_prototypes = start.shape
    logits, known = torch.zeros_like(start), start.new_zeros(num_users)
    precision = start.new_zeros(num_users, num_prototypes, num_prototypes)
    for pairs in batches:
        users, row = torch.unique(pairs.row, return_inverse=True)
        logits[users], precision[users] = solve_logits(margins, pairs._replace(row=row), prior, start[users], num_steps)
        known[users] = 1.0
    return logits, precision, known
