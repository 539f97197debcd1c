"""Adam for shared parameters and for tables of users, one row per user; clipping by row; learning rate schedules.

Axes: U users, R rows in a gradient, K numbers of one user.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

Schedule = Literal["constant", "linear", "cosine"]


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
        eps: Added to the root of the second moment.
        row_rate: Of rows ``(R,)`` of a table and how many steps each has taken ``(R,)``, the factor of the learning
            rate ``(R,)``; None = 1. Schedules of the optimizer as a whole count steps in which a user may be absent.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        row_rate: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """See the class."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
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
        tensors = (parameter.detach(), state["mean"], state["square"])
        if not sparse:
            _fused(*tensors, gradient, state["step"], group["lr"], group)
            return
        gradient = gradient.coalesce()
        rows, gradient = gradient.indices()[0], gradient.values()
        taken = state["step"][rows]
        rate = torch.full_like(taken, group["lr"])
        if self.row_rate is not None:
            rate = rate * self.row_rate(rows, taken)
        state["step"][rows] += 1
        whole = len(rows) == len(parameter)  # rows are sorted and distinct: nothing to gather and scatter
        value, mean, square = (tensor if whole else tensor[rows] for tensor in tensors)
        if not len(rows) or bool(((taken == taken[0]) & (rate == rate[0])).all()):  # as a rule
            if len(rows):
                _fused(value, mean, square, gradient, taken[0].clone(), float(rate[0]), group)
        else:
            _by_row(value, mean, square, gradient, taken + 1, rate, group)
        if not whole:
            for tensor, moved in zip(tensors, (value, mean, square), strict=True):
                tensor[rows] = moved


def _fused(
    value: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, step: Tensor, rate: float, group: dict[str, Any]
) -> None:
    """Torch's own step of what has taken ``step`` ``()`` steps before."""
    first, second = group["betas"]
    adamw(
        *([value], [gradient], [mean], [square], [], [step]),
        fused=True,
        amsgrad=False,
        beta1=first,
        beta2=second,
        lr=rate,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _by_row(
    value: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, step: Tensor, rate: Tensor, group: dict[str, Any]
) -> None:
    """The same of rows at steps ``(R,)``, this one included, and with rates ``(R,)`` of their own."""
    step, rate = _column(step, value).double(), _column(rate, value)  # 1 - 0.999 needs digits
    first, second = group["betas"]
    corrections = [(1 - beta**step).to(value) for beta in (first, second)]
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    if group["weight_decay"]:
        value.mul_(1 - rate * group["weight_decay"])
    root = square.div(corrections[1]).sqrt_().add_(group["eps"])
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
        parameter: Whose gradient.
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
    norm = torch.linalg.vector_norm(values.flatten(1), dim=1)
    values.mul_(_column((limit / (norm + 1e-6)).clamp_max(1.0), values))


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
