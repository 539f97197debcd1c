"""AdamW for a table of people: a row moves as if its person were trained alone.

Axes: U people, R rows in a gradient, P numbers of one person.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class RowAdamW(torch.optim.Optimizer):
    """AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019) over tables whose rows are parameters of their own.

    Gradients are sparse: the rows in a gradient move, each with moments, a step count, a clipping norm and a warm-up of
    its own; of all other rows nothing changes, weight decay included. A row that is in every gradient takes exactly the
    steps of ``torch.optim.AdamW`` after ``torch.nn.utils.clip_grad_norm_``.

    Args:
        tables: Tensors ``(U, ...)``; their gradients are sparse in the first axis, see `row_gradient`.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        clip_norm: Longest gradient of a row; 0 = no bound.
        warmup: ``(U,)`` steps over which the learning rate of each row rises linearly; None = none.
    """

    def __init__(
        self,
        tables: list[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float = 0.0,
        warmup: Tensor | None = None,
    ) -> None:
        """See the class."""
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip_norm": clip_norm}
        super().__init__(tables, {**options, "warmup": warmup})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the rows that are in a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    gradient = table.grad.coalesce()
                    self._move(table, gradient.indices()[0], gradient.values(), **{**group, "params": None})
        return loss

    def _move(
        self,
        table: Tensor,
        rows: Tensor,
        gradient: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip_norm: float,
        warmup: Tensor | None,
        **_: object,
    ) -> None:
        """One step of the rows ``(R,)`` along their gradients ``(R, ...)``."""
        state = self.state[table]
        if not state:
            state["step"] = table.new_zeros(len(table))
            state["mean"], state["square"] = torch.zeros_like(table), torch.zeros_like(table)
        if clip_norm:
            norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
            factor = (clip_norm / (norm + 1e-6)).clamp_max(1.0)
            gradient = gradient * factor.view(-1, *[1] * (gradient.dim() - 1))
        step = state["step"][rows]
        rise = torch.ones_like(step) if warmup is None else ((step + 1) / warmup[rows].clamp_min(1)).clamp_max(1)
        state["step"][rows] += 1
        whole = (table.detach(), state["mean"], state["square"])
        alike, group = torch.unique(torch.stack([step, rise], 1), dim=0, return_inverse=True)
        for number, (so_far, share) in enumerate(alike.tolist()):  # as a rule all rows are at the same step
            mine = slice(None) if len(alike) == 1 else group == number
            everybody = len(alike) == 1 and len(rows) == len(table)  # rows are sorted: no need to gather and scatter
            place = slice(None) if everybody else rows[mine]
            value, mean, square = (tensor[place] for tensor in whole)
            adamw(
                [value],
                [gradient[mine]],
                [mean],
                [square],
                [],
                [torch.full((), so_far, device=table.device)],
                fused=True,
                amsgrad=False,
                beta1=betas[0],
                beta2=betas[1],
                lr=lr * share,
                weight_decay=weight_decay,
                eps=eps,
                maximize=False,
            )
            if not everybody:
                for tensor, moved in zip(whole, (value, mean, square), strict=True):
                    tensor[place] = moved


def row_gradient(table: Tensor, rows: Tensor, gradient: Tensor) -> Tensor:
    """A gradient of some rows: sorted distinct ``(R,)`` and ``(R, ...)`` -> sparse ``(U, ...)``."""
    return torch.sparse_coo_tensor(rows[None], gradient, table.shape, is_coalesced=True, check_invariants=False)
