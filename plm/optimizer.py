"""Adam for shared parameters and for tables of users, one row per user; clipping by row; learning rate schedules.

Axes: U users, R rows in a gradient, K numbers of one user.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

if TYPE_CHECKING:  # optimizers work without Lightning
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

Schedule = Literal["constant", "linear", "cosine"]
_EPS = 1e-8
"""Added to the root of the second moment."""


class RowAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019), lazy on tables.

    A parameter with a sparse gradient, such as an embedding ``(U, K)``, is treated as U parameters: only the rows in
    the gradient move, with moments and a step count of their own, exactly as if every user had a parameter and those
    absent from a batch had no gradient. Ordinary Adam would keep moving absent users by their momentum, and
    ``torch.optim.SparseAdam`` counts steps for the table as a whole.

    Args:
        groups: Parameter groups with ``params`` and optionally ``lr`` and ``weight_decay``.
        lr: Default learning rate.
        betas: Decay of the two moments.
        row_rate: Of rows ``(R,)`` of a table and how many steps each has taken ``(R,)``, the factor of the learning
            rate ``(R,)``; None = 1. Schedules of the optimizer as a whole count steps in which a user may be absent.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        row_rate: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})
        self.row_rate = row_rate

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One step of one parameter, or of the rows of a table that are in its gradient."""
        sparse = gradient.is_sparse
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(parameter.shape[:1] if sparse else (), device=parameter.device)
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors = (parameter.detach(), state["mean"], state["square"], state["step"])
        settings = group["betas"], group["weight_decay"]
        if not sparse:
            value, mean, square, step = tensors
            _fused([value], [gradient], [mean], [square], [step], group["lr"], *settings)
            return
        gradient = gradient.coalesce()
        rows, gradient = gradient.indices()[0], gradient.values()
        if not len(rows):
            return
        whole = len(rows) == len(parameter)  # rows are sorted and distinct: nothing to gather and scatter
        value, mean, square, step = row_tensors = [tensor if whole else tensor[rows] for tensor in tensors]
        rate = group["lr"] * (torch.ones_like(step) if self.row_rate is None else self.row_rate(rows, step))
        adam_rows([value], [gradient], [mean], [square], step, rate, *settings)
        step += 1
        if not whole:
            for tensor, moved in zip(tensors, row_tensors, strict=True):
                tensor[rows] = moved


def adam_rows(
    values: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    taken: Tensor,
    rate: Tensor,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
) -> None:
    """One step of Adam in place, of tensors with a leading axis of users; each user's rows are a problem of their own.

    Args:
        values: ``(R, ...)`` each.
        gradients: Of the same shapes.
        means: First moments.
        squares: Second moments.
        taken: ``(R,)`` steps before this one.
        rate: ``(R,)`` learning rates.
        betas: Decay of the two moments.
        weight_decay: Decoupled.
    """
    if all(torch.equal(numbers, numbers[:1].expand_as(numbers)) for numbers in (taken, rate)):  # as a rule
        steps = list(taken[:1].repeat(len(values)).unbind())
        _fused(values, gradients, means, squares, steps, float(rate[0]), betas, weight_decay)
        return
    for value, gradient, mean, square in zip(values, gradients, means, squares, strict=True):
        _by_row(value, gradient, mean, square, taken + 1, rate, betas, weight_decay)


def _fused(
    values: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """Torch's own step of what has taken ``steps`` ``()`` steps before, and counts them."""
    adamw(
        *(values, gradients, means, squares, [], steps),
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=rate,
        weight_decay=weight_decay,
        eps=_EPS,
        maximize=False,
    )


def _by_row(
    value: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    rate: Tensor,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """One step of rows at steps ``(R,)``, this one included, and with rates ``(R,)`` of their own."""
    step, rate = _column(step, value).double(), _column(rate, value)  # 1 - 0.999 needs digits
    corrections = [(1 - beta**step).to(value) for beta in betas]
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    if weight_decay:
        value.mul_(1 - rate * weight_decay)
    root = square.div(corrections[1]).sqrt_().add_(_EPS)
    value.sub_(mean.div(root).mul_(rate / corrections[0]))


def row_gradient(table: Tensor, rows: Tensor, gradient: Tensor) -> Tensor:
    """A gradient of some rows: sorted distinct ``(R,)`` and ``(R, ...)`` -> sparse ``(U, ...)``."""
    return torch.sparse_coo_tensor(rows[None], gradient, table.shape, is_coalesced=True, check_invariants=False)


def _column(values: Tensor, parameter: Tensor) -> Tensor:
    """``(R,)`` in the shape that broadcasts over rows of a parameter."""
    return values.view(-1, *[1] * (parameter.dim() - 1))


def clip_rows(parameter: Tensor, limit: float, algorithm: str = "norm") -> None:
    """Bound a gradient: of a table with a sparse gradient ``(U, K)``, that of each row by itself.

    Args:
        parameter: The parameter that has the gradient.
        limit: Longest norm, or greatest value.
        algorithm: ``norm`` or ``value``, as of ``trainer.gradient_clip_algorithm``.
    """
    gradient = parameter.grad
    if gradient is None:
        return
    if gradient.is_sparse:
        parameter.grad = gradient = gradient.coalesce()
    values = gradient.values() if gradient.is_sparse else gradient[None]
    if algorithm == "value":
        values.clamp_(-limit, limit)
        return
    clip_norms([values], limit)


def clip_norms(gradients: list[Tensor], limit: float) -> None:
    """Bound the length of each user's gradient in place: tensors with a leading axis of users, all numbers together."""
    norm = torch.stack([torch.linalg.vector_norm(part.flatten(1), dim=1) for part in gradients]).norm(dim=0)
    share = (limit / (norm + 1e-6)).clamp_max(1.0)
    for part in gradients:
        part.mul_(_column(share, part))


Factor = Callable[[int], float]


def with_decay(
    optimizer: torch.optim.Optimizer, steps: float, factor: Factor | list[Factor] | None = None
) -> OptimizerLRScheduler:
    """An optimizer whose learning rates fall over the steps of a fit, for ``configure_optimizers``.

    Args:
        optimizer: The optimizer.
        steps: Steps of the fit; infinite = their number is not known, and the rates stay.
        factor: Share of the learning rate after a number of steps, of all groups or of each; None = linearly to zero.
    """
    if math.isinf(steps):
        return optimizer

    def linear(step: int) -> float:
        return max(1.0 - step / max(steps, 1), 0.0)

    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, factor or linear)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def rate_factor(schedule: Schedule, warmup: float, step: Tensor, total: Tensor) -> Tensor:
    """Share of the learning rate at each step: up from zero along a line, then level, or down to zero.

    Args:
        schedule: How it goes on after the warm-up: constant, or along a line or half a cosine.
        warmup: Share of all steps, rounded down, in which it rises.
        step: ``(...)`` steps taken before this one.
        total: ``(...)`` steps in all.

    >>> steps = torch.arange(5)
    >>> rate_factor("linear", 0.4, steps, torch.tensor(5)).tolist()
    [0.0, 0.5, 1.0, 0.6666666865348816, 0.3333333432674408]
    """
    step, total = step.float(), total.float()
    rising = (warmup * total + 1e-4).floor()
    left = ((total - step) / (total - rising).clamp_min(1)).clamp(0, 1)
    falling = {"constant": torch.ones_like(left), "linear": left, "cosine": 0.5 - 0.5 * torch.cos(math.pi * left)}
    return torch.where(step < rising, step / rising.clamp_min(1), falling[schedule])
