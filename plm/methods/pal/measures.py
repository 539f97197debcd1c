"""Whether a fitted PAL uses its prototypes, and whether its users differ.

Axes: U users, K prototypes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def prototype_usage(weights: Tensor) -> dict[str, float]:
    """How users share out the prototypes: ``(U, K)`` on the simplex -> named numbers.

    ``effective_prototypes``: exponential of the entropy of the shares of users for whom a prototype weighs most; 1 =
    all users are nearest to the same one, K = each has as many. ``dead_prototypes``: those that weigh most for nobody.
    ``assignment_entropy``: of a user's weights in nats, mean over users; 0 = one prototype each, log K = all alike.

    >>> usage = prototype_usage(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    >>> round(usage["effective_prototypes"], 4), usage["dead_prototypes"], usage["assignment_entropy"]
    (2.0, 1.0, 0.0)
    """
    if not len(weights):
        return dict.fromkeys(("effective_prototypes", "dead_prototypes", "assignment_entropy"), math.nan)
    counts = torch.bincount(weights.argmax(-1), minlength=weights.shape[1])
    return {
        "effective_prototypes": float(torch.special.entr(counts / counts.sum()).sum().exp()),
        "dead_prototypes": float((counts == 0).sum()),
        "assignment_entropy": float(torch.special.entr(weights).sum(-1).mean()),
    }


def mean_kl(deviation: Tensor, precision: Tensor, scale: Tensor) -> float:
    """Nats between the normal posteriors of users and their prior N(0, scale^2), mean over users.

    Args:
        deviation: ``(U, K)`` modes less the centre of the prior.
        precision: ``(U, K, K)`` of the posteriors.
        scale: ``()``.

    >>> mean_kl(torch.tensor([[2.0]]), torch.ones(1, 1, 1), torch.tensor(1.0))  # a shift by two standard deviations
    2.0
    """
    if not len(deviation):
        return math.nan
    unit = precision.double() * scale.double().square()  # of deviations in units of the prior
    trace = torch.linalg.inv(unit).diagonal(dim1=-2, dim2=-1).sum(-1)
    shift = (deviation.double() / scale.double()).square().sum(-1)
    return float(0.5 * (trace + shift - deviation.shape[1] + torch.logdet(unit)).mean())
