"""Adam for shared parameters and for tables of users, one row per user; clipping by row; learning rate schedules.

Axes: U users, R rows in a gradient, K numbers of one user.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

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
        rows: Any = ...
        if sparse:
            gradient = gradient.coalesce()
            rows, gradient = gradient.indices()[0], gradient.values()
        rate = group["lr"]
        if sparse and self.row_rate is not None:
            rate = _column(rate * self.row_rate(rows, state["step"][rows]), parameter)
        state["step"][rows] += 1
        step = (_column(state["step"][rows], parameter) if sparse else state["step"]).double()  # 1 - 0.999 needs digits
        whole = sparse and len(rows) == len(parameter)  # rows are sorted and distinct: nothing to gather and scatter
        value, mean, square = (
            tensor if whole or not sparse else tensor[rows] for tensor in (parameter, state["mean"], state["square"])
        )
        first, second = group["betas"]
        corrections = [(1 - beta**step).to(parameter) for beta in (first, second)]
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        if group["weight_decay"]:
            value.mul_(1 - rate * group["weight_decay"])
        root = square.div(corrections[1]).sqrt_().add_(group["eps"])
        value.sub_(mean.div(root).mul_(rate / corrections[0]))
        if sparse and not whole:
            parameter[rows], state["mean"][rows], state["square"][rows] = value, mean, square


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
