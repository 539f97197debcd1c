"""Adam for shared parameters and for tables of users, one row per user.

Axes: U users, K weights of one user.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor


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
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """See the class."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

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
            state["step"] = parameter.new_zeros(parameter.shape[:1] if sparse else ())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        rows: Any = ...
        if sparse:
            gradient = gradient.coalesce()
            rows, gradient = gradient.indices()[0], gradient.values()
        first, second = group["betas"]
        state["step"][rows] += 1
        step = state["step"][rows]
        step = step.view(-1, *[1] * (parameter.dim() - 1)) if sparse else step
        state["mean"][rows] = mean = state["mean"][rows].lerp(gradient, 1 - first)
        state["square"][rows] = square = state["square"][rows] * second + gradient.square() * (1 - second)
        size = mean / (1 - first**step) / ((square / (1 - second**step)).sqrt() + group["eps"])
        parameter[rows] = parameter[rows] * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * size
