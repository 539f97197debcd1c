"""Logits of many users at once: solved from their pairs under a normal prior.

Axes: N pairs, U users, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plm.functional import MAX_CELLS, Posterior, unit_mean_per_user, user_chunks
from plm.method.strangers import chance_of_difference
from plm.methods.pal.geometry import Cache, as_double, cache_of, cells_of_pair
from plm.methods.pal.solver import fit_deviations

LogitMargins = Callable[[Cache, Tensor], Tensor]
"""What margins need of N pairs, logits of each pair's user ``(N, K)`` -> margins ``(N,)``."""
MAX_STEPS = 40
CENTRE_STEPS = 2
"""Most steps of the prior's centre at one spread; the next spread starts where this one ended."""
CENTRE_TRIES = 4
"""Most lengths of one step, each a quarter of the one before."""
CENTRE_REACH = 1.0
"""Longest step of the centre in a direction, the spread of logits that training assumes: where the softmax bends
margins, Newton's step leads too far."""
CENTRE_TOLERANCE = 0.01
"""Smaller steps of the centre are not worth another solution: at temperature 5 they move weights by 2 in 1,000."""
LEAST_SPREAD = 0.1
"""Smallest prior spread read off a table of logits, whose rows all start at zero."""


class Prior(NamedTuple):
    """Normal prior on the logits of a user nobody has seen."""

    centre: Tensor
    """``(K,)``."""
    scale: Tensor
    """``()``."""


def table_prior(logits: Tensor, num_pairs: Tensor, default: Prior) -> Prior:
    """Centre and spread of the rows ``(U, K)`` of users who have pairs."""
    rows = logits[num_pairs > 0]
    if not len(rows):
        return default
    centre = rows.mean(0)
    return Prior(centre, (rows - centre).square().mean().sqrt().clamp_min(LEAST_SPREAD))


def centre_step(centre: Tensor, deviation: Tensor, precision: Tensor, scale: Tensor) -> Tensor:
    """Newton's step of the prior's centre to where the evidence of all users' pairs is highest: ``(K,)``.

    Under the prior N(centre, scale^2) of a user the log-evidence of the user's pairs has the slope ``(mode - centre) /
    scale^2`` in the centre (empirical Bayes), and as a mode moves with the centre by ``d mode / d centre = H^-1 /
    scale^2``, H the precision of the posterior, the curvature ``-(1 - H^-1 / scale^2) / scale^2``. The centre itself
    has the prior N(0, 1) that training gives logits, so that it is not moved where no pair says anything:

        step = [1 + sum_u (1 - H_u^-1 / scale^2) / scale^2]^-1 (sum_u (mode_u - centre) / scale^2 - centre).

    Averaging the modes instead (EM) hardly moves where the spread is small.

    Args:
        centre: ``(K,)``.
        deviation: ``(U, K)`` modes less the centre.
        precision: ``(U, K, K)``.
        scale: ``()``.
    """
    square, parts = scale.double().square(), torch.split(precision, MAX_CELLS // len(centre) ** 2 + 1)
    eye = torch.eye(len(centre), dtype=torch.float64, device=centre.device)
    told = torch.stack([(eye - torch.linalg.inv(part.double() * square)).sum(0) for part in parts]).sum(0)
    slope = deviation.double().sum(0) / square - centre.double()
    step: Tensor = torch.linalg.solve(eye + told / square, slope)
    return step


class Solvable(NamedTuple):
    """Pairs of whole users, ready to be solved for their logits."""

    cache: Cache
    target: Tensor
    """``(N,)``."""
    weight: Tensor
    """``(N,)``."""
    row: Tensor
    """``(N,)`` the user of each pair."""


def gumbel_weights(weights: Callable[[Tensor], Tensor], logits: Tensor, mixing: str) -> Tensor:
    """Samples of weights ``(N, K)``: gumbel = soft; gumbel_hard = one-hot, with the gradient of the soft ones.

    Args:
        weights: Logits to weights.
        logits: ``(N, K)``.
        mixing: The kind.
    """
    soft = weights(logits - torch.empty_like(logits).exponential_().log())
    if mixing == "gumbel":
        return soft
    return torch.nn.functional.one_hot(soft.argmax(-1), logits.shape[-1]) + soft - soft.detach()


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
    weight, cache = unit_mean_per_user(pairs.weight, pairs.row, len(start)), as_double(pairs.cache)
    posterior = fit_deviations(
        lambda rows: margins(cache, prior.centre + prior.scale * rows),
        pairs.target,
        weight,
        pairs.row,
        (start - prior.centre) / prior.scale,
        num_steps,
    )
    logits = prior.centre + prior.scale * posterior.mean
    return logits.to(start), (posterior.precision / prior.scale**2).to(start)


def doubted_logits(
    margins: LogitMargins, pairs: Solvable, prior: Prior, logits: Tensor, precision: Tensor, partition: bool
) -> Tensor:
    """Logits ``(U, K)`` that are nearer to the prior's centre the less the pairs say that the user is not there.

    Args:
        margins: The model.
        pairs: Pairs of users 0 to U - 1.
        prior: The prior.
        logits: ``(U, K)`` the posterior mode, see `solve_logits`.
        precision: ``(U, K, K)`` of the posterior.
        partition: Users are at the one or at the other: a prototype between the two may be neither's.
    """
    posterior = Posterior((logits - prior.centre) / prior.scale, precision * prior.scale**2)
    own, population = (margins(pairs.cache, value[pairs.row]) for value in (logits, prior.centre.expand_as(logits)))
    weight = unit_mean_per_user(pairs.weight, pairs.row, len(logits))
    chance = chance_of_difference(posterior, own, population, pairs.target, weight, pairs.row)
    chance = (chance > 0.5).to(chance) if partition else chance
    return torch.lerp(prior.centre.expand_as(logits), logits, chance[:, None])


def solve_around(
    solve: Callable[[Prior, Tensor], tuple[Tensor, Tensor]],
    evidence: Callable[[Prior, Tensor, Tensor], float],
    prior: Prior,
    start: Tensor,
    has_pairs: Tensor,
) -> tuple[Tensor, Tensor, Prior]:
    """Logits and precision of users under a prior whose centre is moved to where the evidence is highest.

    `centre_step` takes margins to be linear in logits. Where the softmax bends them it leads too far: it is no longer
    than `CENTRE_REACH`, and shortened until the evidence rises.

    Args:
        solve: Prior and start ``(U, K)`` -> logits and precision.
        evidence: Prior, logits and precision -> log-evidence of all pairs and of the centre.
        prior: Its spread is kept.
        start: ``(U, K)``.
        has_pairs: ``(U,)`` bool; the others say nothing about the centre.
    """
    solved = solve(prior, start)
    best = evidence(prior, *solved), solved, prior
    for _ in range(CENTRE_STEPS):
        now, (logits, precision), prior = best
        step = centre_step(prior.centre, logits[has_pairs] - prior.centre, precision[has_pairs], prior.scale)
        step = step * (CENTRE_REACH / step.abs().max()).clamp_max(1.0)
        for _ in range(CENTRE_TRIES):
            if step.abs().max() < CENTRE_TOLERANCE:
                break
            moved = prior._replace(centre=prior.centre + step)
            solved = solve(moved, logits + step)
            found = evidence(moved, *solved)
            if found > now:
                best = found, solved, moved
                break
            step = step / 4
        if best[2] is prior:
            break
    return *best[1], best[2]


def solve_table(
    margins: LogitMargins, batches: Sequence[Solvable], prior: Prior, start: Tensor, num_steps: int = MAX_STEPS
) -> tuple[Tensor, Tensor, Tensor]:
    """`solve_logits` of the users who occur in batches of whole users, as rows of a table.

    Returns:
        Logits ``(U, K)``, precision ``(U, K, K)`` and whether a user occurs ``(U,)``, as 0 or 1; rows of users who do
        not are zero.
    """
    num_users, num_prototypes = start.shape
    logits, has_pairs = torch.zeros_like(start), start.new_zeros(num_users)
    precision = start.new_zeros(num_users, num_prototypes, num_prototypes)
    for pairs in batches:
        users, row = torch.unique(pairs.row, return_inverse=True)
        for chunk in user_chunks(row, len(users), cells_of_pair(pairs.cache), own=num_prototypes**2):
            at, rows = chunk.rows, users[chunk.users]
            some = Solvable(cache_of(pairs.cache, at), pairs.target[at], pairs.weight[at], chunk.user)
            logits[rows], precision[rows] = solve_logits(margins, some, prior, start[rows], num_steps)
            has_pairs[rows] = 1.0
    return logits, precision, has_pairs
