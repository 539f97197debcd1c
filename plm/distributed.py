"""What processes of one fit exchange besides what Lightning's strategies do: sums, and gradients.

With a single process, or outside of a fit, all of it does nothing.

Axes: B pairs of this process, R rows of a table in a gradient, W processes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes W."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return world_size() == 1 or dist.get_rank() == 0


def summed(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes; without gradient."""
    values = values.detach()
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gathered_rows(values: Tensor) -> Tensor:
    """Rows of all processes, which may have different numbers of them: ``(n, ...)`` -> ``(N, ...)``."""
    if world_size() == 1:
        return values
    counts = _gathered(torch.tensor([len(values)], device=values.device))
    parts = _gathered(_padded(values, int(torch.cat(counts).max())))
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def pair_weights(weight: Tensor) -> Tensor:
    """Weights of this process's pairs as they would be in one process: ``(B,)`` -> ``(B,)``.

    Loaders multiply them by ``B W / n``, for n pairs on all processes, so that the mean over processes of their means
    is exact; a loss that is normalised otherwise must undo it.
    """
    if world_size() == 1:
        return weight
    return weight * (summed(weight.new_tensor(float(len(weight)))) / (len(weight) * world_size()))


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradient of every parameter by its mean over the processes.

    Of a table with a sparse gradient only rows travel, those of all processes to each; sparse tensors themselves cannot
    be reduced by NCCL. Sharded parameters are left alone.

    Args:
        parameters: The same on every process, with a gradient on every process or on none.
    """
    if world_size() == 1:
        return
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or _is_sharded(gradient):
            continue
        if gradient.is_sparse:
            parameter.grad = _mean_of_rows(gradient.coalesce())
        else:
            dist.all_reduce(gradient)
            gradient /= world_size()


def clip_gradients(parameters: Iterable[torch.nn.Parameter], limit: float, algorithm: str) -> None:
    """Bound the gradients of whole and sharded parameters together, which torch's own clipping refuses to.

    Args:
        parameters: The same on every process; gradients of whole ones must be equal on all.
        limit: Longest norm of all gradients together, or greatest value.
        algorithm: ``norm`` or ``value``, as of ``trainer.gradient_clip_algorithm``.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded = [_local(gradient) for gradient in gradients if _is_sharded(gradient)]
    whole = [gradient for gradient in gradients if not _is_sharded(gradient)]
    if algorithm == "value":
        for gradient in sharded + whole:
            gradient.clamp_(-limit, limit)
        return
    if not gradients:
        return
    zero = torch.zeros((), device=gradients[0].device)
    local = sum((gradient.float().square().sum() for gradient in sharded), zero)
    norm = (summed(local) + sum((gradient.float().square().sum() for gradient in whole), zero)).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in sharded + whole:
        gradient.mul_(factor.to(gradient.dtype))


def _mean_of_rows(gradient: Tensor) -> Tensor:
    """Mean over the processes of a coalesced gradient ``(U, ...)`` with R rows, of which processes have different."""
    rows, values = gradient.indices()[0], gradient.values()
    all_rows, all_values = gathered_rows(rows), gathered_rows(values)
    mean = torch.sparse_coo_tensor(all_rows[None], all_values / world_size(), gradient.shape, check_invariants=False)
    return mean.coalesce()


def _gathered(values: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return parts


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])


def _is_sharded(value: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _local(value: Tensor) -> Tensor:
    """The part of a sharded tensor that is here, sharing its memory."""
    return value.to_local()  # type: ignore[attr-defined, no-any-return]
