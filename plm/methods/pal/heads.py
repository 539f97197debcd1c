"""Rewards, losses and the bound of PAL: pure functions.

Axes: B pairs, N rows, K prototypes. A reward depends on an item e and an ideal point u only through the three numbers
<e, u>, |e|^2 and |u|^2. With u = sum_k w_k u_k these are <w, [<e, u_k>]_k>, |e|^2 and w' G w with the Gram matrix
G_kl = <u_k, u_l>: once the inner products are cached, a user lives in K dimensions.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from plm.functional import bt_losses

Head = Literal["dot", "dist", "dist_squared", "dist_normalization", "dist_logistic", "angle", "angle_hinge"]
Loss = Literal["logistic", "cross_entropy", "hinge", "smooth_hinge"]
HEADS: tuple[str, ...] = get_args(Head)
SCALED_HEADS = ("angle", "angle_hinge", "dist_logistic")
"""Heads whose reward is multiplied by the logit scale."""
MAX_SCALE = 100.0
START_SCALE = 1 / 0.07
SMALL = 1e-12
FLOOR = 0.05
"""Angles to a mixture shorter than this share of its prototypes fade out: opposite prototypes mix to no direction."""


def logit_scale(value: Tensor) -> Tensor:
    """Positive scale below 100 of a free parameter: ``100 * sigmoid(value)``.

    The published ``min(exp(value), 100)`` has no gradient above 100 and can stay there.

    >>> round(logit_scale(start_logit_scale()).item(), 3)
    14.286
    """
    return MAX_SCALE * torch.sigmoid(value)


def start_logit_scale() -> Tensor:
    """The parameter at which the scale is 1 / 0.07, as published."""
    return torch.logit(torch.tensor(START_SCALE / MAX_SCALE))


def head_reward(
    head: str, dot: Tensor, item_square: Tensor, point_square: Tensor, size_square: Tensor, scale: Tensor
) -> Tensor:
    """Reward of items for ideal points; all arguments broadcast.

    Exported models have it again, as ``closeness`` of `plm.backbones.modeling_reward`, which they carry with them.

    Args:
        head: dot = 2 <e, u>; dist = -|e - u|; dist_squared = |u|^2 - |e - u|^2, where the first term, the same for all
            items, keeps far points exact; dist_normalization = -|e/|e| - u/|u||; dist_logistic =
            -scale |e - u|; angle and angle_hinge = scale cos(e, u), they differ in the loss only.
        dot: ``<e, u>``.
        item_square: ``|e|^2``.
        point_square: ``|u|^2``.
        size_square: Mean of ``|u_k|^2`` over the prototypes, the measure of ``FLOOR``.
        scale: The logit scale.

    >>> one = torch.tensor(1.0)
    >>> head_reward("dist", torch.tensor(-1.0), one, one, one, one).item()  # e = -u, both of length one
    -2.0
    """
    if head in SCALED_HEADS[:2] or head == "dist_normalization":
        length = (point_square + FLOOR**2 * size_square + SMALL).sqrt() * (item_square + SMALL).sqrt()
        cosine = dot / length
        return scale * cosine if head != "dist_normalization" else -(2 - 2 * cosine).clamp_min(SMALL).sqrt()
    if head in ("dot", "dist_squared"):
        return 2 * dot if head == "dot" else 2 * dot - item_square
    distance = (item_square - 2 * dot + point_square).clamp_min(SMALL).sqrt()
    return -scale * distance if head == "dist_logistic" else -distance


def pair_losses(kind: str, margin: Tensor, target: Tensor, gamma: float = 1.0) -> Tensor:
    """Loss of each pair; a label tie counts as half a win for each side.

    Args:
        kind: logistic = softplus(-z); cross_entropy = the two-class softmax loss of the two rewards, the same number;
            hinge = max(0, 1 - z); smooth_hinge = 0 above z = 1, (1 - z)^2 / (2 gamma) down to 1 - gamma, then linear.
        margin: ``(...)`` reward of chosen minus reward of rejected, z.
        target: Probability that chosen wins, broadcasts to ``margin``.
        gamma: Width of the curved part of the smooth hinge.

    >>> pair_losses("smooth_hinge", torch.tensor([1.0, 0.0, -4.0, -5.0]), torch.ones(4), gamma=5.0).tolist()
    [0.0, 0.10000000149011612, 2.5, 3.5]
    """
    if kind == "logistic":
        return bt_losses(margin, target)
    if kind == "cross_entropy":
        logits = torch.stack([margin, torch.zeros_like(margin)], -1)
        chances = torch.stack([target.expand_as(margin), (1 - target).expand_as(margin)], -1)
        return -(chances * torch.log_softmax(logits, -1)).sum(-1)
    won, lost = 1 - margin, 1 + margin
    if kind == "smooth_hinge":
        return target * _smooth_relu(won, gamma) + (1 - target) * _smooth_relu(lost, gamma)
    return target * F.relu(won) + (1 - target) * F.relu(lost)


def _smooth_relu(gap: Tensor, gamma: float) -> Tensor:
    """``max(0, gap)`` with a parabola between 0 and gamma."""
    return gap.clamp(0, gamma).square() / (2 * gamma) + (gap - gamma).clamp_min(0)


def bound_penalty(point_square: Tensor, bound: float) -> Tensor:
    """How far ideal points lie outside a ball: squared lengths ``(N,)`` -> ``(N,)``, ``max(0, |u| - bound)``.

    >>> bound_penalty(torch.tensor([36.0, 9.0]), 4.0).tolist()
    [2.0, 0.0]
    """
    return F.relu(point_square.clamp_min(SMALL).sqrt() - bound)
