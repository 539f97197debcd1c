"""The ridge-tuned Bradley-Terry model of all users: what every personal method on features is compared with.

Axes: B pairs in a batch, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from lightning import Trainer
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

from plm.arrays import Float64Array
from plm.functional import bt_losses, targets
from plm.method.passes import Passes, kept
from plm.types import PreferenceBatch

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidate precisions of the normal prior on the direction, in units of the features' scale."""
MAX_STEPS = 200
_LIMIT = Lock()
"""Limits of two threads at once, one within the other, would not both be lifted again."""


class _Rows(NamedTuple):
    """What the loss reads of a batch."""

    difference: Tensor  # (B, D)
    target: Tensor  # (B,)
    weight: Tensor  # (B,)


class Population(NamedTuple):
    """One reward for everybody."""

    direction: Tensor
    """``(D,)`` whose product with the features is the reward."""
    ridge: float
    """The precision that validation pairs chose; without any, the middle candidate."""


def load_validation_pairs(trainer: Trainer) -> None:
    """Make the validation loaders of a fit, which Lightning does only before the first validation, epochs later."""
    if trainer.val_dataloaders is None and trainer.enable_validation:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True


def tuned_population(
    train: Passes, val: Passes, width: int, scale: Tensor, num_pairs: int, total: Callable[[Tensor], Tensor]
) -> Population:
    """The Bradley-Terry model of the training pairs, its ridge chosen by validation pairs.

    For each candidate the convex objective ``mean_n weight_n bt(x_n' v / scale) + ridge |v|^2 / (2 num_pairs)`` is
    solved by L-BFGS from the solution of the next larger ridge.

    Args:
        train: Training pairs, with features ``(B, D)``.
        val: Validation pairs.
        width: Width D.
        scale: ``()`` root mean square length of a training difference.
        num_pairs: Number of training pairs of all processes.
        total: Sums a tensor over all processes.
    """
    train_rows, val_rows = kept(lambda: map(_rows, train())), kept(lambda: map(_rows, val()))
    start: Float64Array = np.zeros(width)
    fits: dict[float, tuple[float, Float64Array]] = {}
    with _LIMIT, threadpool_limits(1, "blas"):  # threads that wait for the next of its steps take torch's processors
        for ridge in sorted(RIDGES, reverse=True):
            start = _solve(train_rows, ridge, scale, num_pairs, total, start)
            fits[ridge] = float(_loss(val_rows, start, scale, total)[0]), start
    has_val = any(loss for loss, _ in fits.values())
    best = min(fits, key=lambda ridge: fits[ridge][0]) if has_val else RIDGES[len(RIDGES) // 2]
    return Population(torch.from_numpy(fits[best][1]).to(scale) / scale, best)


def _rows(batch: PreferenceBatch) -> _Rows:
    return _Rows(batch.difference, targets(batch.tie).to(batch.weight), batch.weight)


def _loss(
    passes: Callable[[], Iterable[_Rows]], direction: Float64Array, scale: Tensor, total: Callable[[Tensor], Tensor]
) -> tuple[float, Float64Array]:
    """Summed loss of all processes at a direction ``(D,)`` in units of the scale, and its gradient."""
    vector = torch.from_numpy(direction).to(scale) / scale
    sums = torch.zeros(len(vector) + 1, dtype=torch.float64, device=scale.device)
    for difference, target, weight in passes():
        margin = difference @ vector
        sums[0] += (weight * bt_losses(margin, target)).double().sum()
        sums[1:] += (difference.T @ (weight * (torch.sigmoid(margin) - target))).double()
    sums = total(sums)
    gradient: Float64Array = (sums[1:] / scale.double()).cpu().numpy()
    return float(sums[0]), gradient


def _solve(
    passes: Callable[[], Iterable[_Rows]],
    ridge: float,
    scale: Tensor,
    num_pairs: int,
    total: Callable[[Tensor], Tensor],
    start: Float64Array,
) -> Float64Array:
    """The direction ``(D,)`` of the least penalised loss, in units of the scale."""

    def objective(direction: Float64Array) -> tuple[float, Float64Array]:
        loss, gradient = _loss(passes, direction, scale, total)
        penalty = 0.5 * ridge * float(direction @ direction)
        return (loss + penalty) / num_pairs, (gradient + ridge * direction) / num_pairs

    fit = minimize(
        objective, start, jac=True, method="L-BFGS-B", options={"maxiter": MAX_STEPS, "ftol": 1e-9, "gtol": 1e-6}
    )
    solution: Float64Array = fit.x
    return solution
