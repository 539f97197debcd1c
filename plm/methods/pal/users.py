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
from plm.methods.pal.geometry import Cache, as_double, cache_of
from plm.methods.pal.solver import fit_deviations

LogitMargins = Callable[[Cache, Tensor], Tensor]
"""What margins need of N pairs, logits of each pair's user ``(N, K)`` -> margins ``(N,)``."""
MAX_STEPS = 40
CENTRE_STEPS = 2
"""Most steps of the prior's centre at one spread; the next spread starts where this one ended."""
CENTRE_TRIES = 4
"""Most lengths of one step, each a quarter of the one before."""
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


def centre_step(deviation: Tensor, precision: Tensor, scale: Tensor) -> Tensor:
    """Newton's step of the prior's centre to where it is the mean of the users' posterior modes: ``(K,)``.

    At that point the evidence of a normal prior N(centre, scale^2) is stationary in the centre (empirical Bayes). A
    mode moves with the centre by ``d mode / d centre = H^-1 / scale^2``, H the precision of the posterior, so that the
    equation ``mean(mode - centre) = 0`` has the step ``[1 - mean(H^-1) / scale^2]^-1 mean(mode - centre)``. Averaging
    the modes instead (EM) hardly moves where the spread is small. Directions in which no pair says anything stay.

    Args:
        deviation: ``(U, K)`` modes less the centre.
        precision: ``(U, K, K)``.
        scale: ``()``.
    """
    if not len(deviation):
        return scale.new_zeros(deviation.shape[1])
    square, parts = scale.double().square(), torch.split(precision, max(1, MAX_CELLS // precision[0].numel()))
    units = torch.stack([torch.linalg.inv(part.double() * square).sum(0) for part in parts]).sum(0)
    told = torch.eye(deviation.shape[1], dtype=units.dtype, device=units.device) - units / len(precision)
    step: Tensor = torch.linalg.pinv(told, rtol=1e-6, hermitian=True) @ deviation.double().mean(0)
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
    """Logits and precision of users under a prior whose centre is moved to the mean of their logits.

    `centre_step` takes the margins to be linear in the logits. Where the softmax bends them its step can lead so far
    out that no pair says anything any more, which is stationary, too: a step is shortened until the evidence rises.

    Args:
        solve: Prior and start ``(U, K)`` -> logits and precision.
        evidence: Prior, logits and precision -> log-evidence of all pairs.
        prior: Its spread is kept.
        start: ``(U, K)``.
        has_pairs: ``(U,)`` bool; the others say nothing about the centre.
    """
    logits, precision = solve(prior, start)
    now = evidence(prior, logits, precision)
    for _ in range(CENTRE_STEPS):
        step = centre_step(logits[has_pairs] - prior.centre, precision[has_pairs], prior.scale)
        for _ in range(CENTRE_TRIES):
            if step.abs().max() < CENTRE_TOLERANCE:
                return logits, precision, prior
            moved = prior._replace(centre=prior.centre + step)
            solved = solve(moved, logits + step)
            found = evidence(moved, *solved)
            if found > now:
                break
            step = step / 4
        else:
            return logits, precision, prior
        (logits, precision), prior, now = solved, moved, found
    return logits, precision, prior


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
        width = sum(value[:1].numel() for value in pairs.cache)
        for chunk in user_chunks(row, len(users), width, own=num_prototypes**2):
            at, rows = chunk.rows, users[chunk.users]
            some = Solvable(cache_of(pairs.cache, at), pairs.target[at], pairs.weight[at], chunk.user)
            logits[rows], precision[rows] = solve_logits(margins, some, prior, start[rows], num_steps)
            has_pairs[rows] = 1.0
    return logits, precision, has_pairs
