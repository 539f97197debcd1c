"""Posterior of every user's mixture, all users at once, in K dimensions.

Axes: N pairs, U users, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from plm.functional import PairList, Posterior, bt_losses, padded_users, per_user_sum

Margin = Callable[[Tensor], Tensor]
"""Deviations of the user of each pair ``(N, K)`` -> margins ``(N,)``, row by row."""


def linearised(margin: Margin, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Margins ``(N,)`` and their derivatives ``(N, K)`` at the deviations of each pair's user ``(N, K)``.

    Margin n depends on row n alone, so one backward pass of the sum gives all derivatives; both stay differentiable.
    """
    with torch.enable_grad():
        rows = rows if rows.requires_grad else rows.detach().requires_grad_()
        value = margin(rows)
        (design,) = torch.autograd.grad(value.sum(), rows, create_graph=True)
    return value, design


class Derivatives(NamedTuple):
    """First and second derivatives of the objective of every user."""

    gradient: Tensor
    """``(U, K)``."""
    hessian: Tensor
    """``(U, K, K)`` Gauss-Newton: positive definite."""
    bend: Tensor
    """``(U, K, K)`` what the exact Hessian adds, because margins are curved; zero where not asked for."""


def fit_deviations(
    margin: Margin,
    target: Tensor,
    weight: Tensor,
    user: Tensor,
    start: Tensor,
    num_steps: int,
    tolerance: float = 1e-9,
) -> Posterior:
    """Posterior mode of every user's deviations v under a standard normal prior, for any smooth margin.

    Minimises for each user ``F(v) = sum_n weight_n bt(z_n(v)) + |v|^2 / 2``. With ``bt' = p - t`` and
    ``bt'' = p (1 - p)`` at chance ``p_n = sigmoid(z_n)`` and target ``t_n``, and J_n the gradient of z_n,

        F'  = sum_n weight_n (p_n - t_n) J_n + v
        F'' = sum_n weight_n p_n (1 - p_n) J_n J_n' + I + sum_n weight_n (p_n - t_n) z_n''.

    The first two terms of F'' are those of the convex problem with z replaced by its tangent (Gauss-Newton), positive
    definite; the last is there because the margin of a mixture is curved in v, and can make F'' indefinite. A step is
    Newton's where F'' is positive definite, else Gauss-Newton's; both descend, and it is halved, for each user alone,
    until F falls (Nocedal & Wright 2006, 3.4 and 10.3). From v = 0, the prior mode, one pair already moves a user the
    right way: the first gradient is ``-(1 - p) J``. Where z is linear in v this is `plm.functional.fit_gaussian`.

    Args:
        margin: z, float64.
        target: ``(N,)`` probability that chosen wins.
        weight: ``(N,)``.
        user: ``(N,)`` int64.
        start: ``(U, K)`` where to start.
        num_steps: Most steps; 0 = the Hessian at ``start``.
        tolerance: A user stands still once a step lowers F by less, in nats.

    Returns:
        Mode ``(U, K)`` and Gauss-Newton Hessian there ``(U, K, K)``, float64.
    """
    value, num_users = start.double(), len(start)
    target, weight = target.double(), weight.double()

    def objective(value: Tensor) -> Tensor:
        with torch.no_grad():
            losses = weight * bt_losses(margin(value[user]), target)
        return per_user_sum(losses, user, num_users) + 0.5 * value.square().sum(-1)

    now, before = _derivatives(margin, target, weight, user, value, num_steps > 1), objective(value)
    is_open = torch.ones(num_users, dtype=torch.bool, device=value.device)
    for _ in range(num_steps):
        factor, failed = torch.linalg.cholesky_ex(now.hessian + now.bend)
        factor = torch.where((failed > 0)[:, None, None], torch.linalg.cholesky(now.hessian), factor)
        step = -torch.cholesky_solve(now.gradient[..., None], factor)[..., 0]
        size = is_open.to(value)
        after = objective(value + size[:, None] * step)
        for _ in range(20):
            worse = after > before
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
            after = objective(value + size[:, None] * step)
        falls = after <= before
        value = torch.where(falls[:, None], value + size[:, None] * step, value)
        is_open &= falls & (before - after > tolerance)
        before = torch.where(falls, after, before)
        now = _derivatives(margin, target, weight, user, value, num_steps > 1)
        if not is_open.any():
            break
    return Posterior(value, now.hessian)


def _derivatives(
    margin: Margin, target: Tensor, weight: Tensor, user: Tensor, value: Tensor, with_bend: bool
) -> Derivatives:
    """Derivatives of the objective of `fit_deviations` at deviations ``(U, K)``."""
    num_users, num_weights = value.shape
    rows = value[user].requires_grad_()
    margins, design = linearised(margin, rows)
    tangent = PairList(design.detach(), (margins - (design * rows).sum(-1)).detach(), target, weight, user, num_users)
    gradient, bend = value.clone(), torch.zeros(num_users, num_weights, num_weights).to(value)
    hessian = torch.eye(num_weights).to(value).repeat(num_users, 1, 1)
    for part in padded_users(tangent):
        slope, curvature = part.derivatives(value[part.users])
        gradient[part.users] += slope
        hessian[part.users] += curvature
    if with_bend:
        pull = (weight * (torch.sigmoid(margins) - target)).detach()
        with torch.enable_grad():
            slopes = (pull[:, None] * design).sum(0).unbind()  # K of ()
        for index in range(num_weights):
            (row,) = torch.autograd.grad(slopes[index], rows, retain_graph=True)
            bend[:, index] = per_user_sum(row, user, num_users)
    return Derivatives(gradient, hessian, bend)
