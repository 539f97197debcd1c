"""Adapting many unseen users at once: seconds, and objective against Adam on the same problem.

Usage: python benchmarks/adapt.py [--users 10000 --pairs 10 --bases 8 --dim 64]

``method.adapt`` is timed as it is called, projection of the features included, of ``LoRe`` (Newton on the log
posterior) and of ``PublishedLoRe`` (interior point on the published few-shot problem). Adam runs 500 steps on
the same objective for all users at once, with the published learning rate 0.1. "users worse" counts users whose
objective is above that of Adam by more than 1e-6; "alone" is the largest difference between a user adapted alone and
the same user in the crowd.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plm.functional import PairList, bt_losses, fit_simplex_by_adam, flatten_context, per_user_sum
from plm.methods.lore import LoRe, PublishedLoRe
from plm.testing import PlantedData
from plm.types import Context


def make_method(dim: int, num_bases: int, simplex: bool) -> LoRe | PublishedLoRe:
    """Bases of a plausible size without a fit: margins along each of them have a standard deviation of about one."""
    torch.manual_seed(0)
    method_class = PublishedLoRe if simplex else LoRe
    method = method_class(num_users=20, feature_dim=dim, num_bases=num_bases, temperature=1.0)
    with torch.no_grad():
        method.bases.copy_(torch.randn(dim, num_bases) / 2)
    return method.eval()


def problem(method: LoRe | PublishedLoRe, context: Context) -> tuple[PairList, Tensor, Tensor]:
    """Pairs along the bases, and mean and precision of the prior that the method states."""
    difference, target, weight, user = flatten_context(context)
    columns = []
    for basis in torch.eye(method.num_bases):
        users = method.population_state(1).take(torch.zeros(len(difference), dtype=torch.long))
        users.tensors["weights"] = basis.expand(len(difference), -1)
        columns.append(method.score(difference, users))
    population = method.population_state(1).tensors
    pairs = PairList(torch.stack(columns, 1), torch.zeros_like(target), target, weight, user, context.num_users)
    return pairs, population["weights"][0], population["precision"][0]


def objectives(pairs: PairList, weights: Tensor, centre: Tensor, precision: Tensor | None) -> Tensor:
    """``(U,)`` log posterior up to sign and constant, or, without a precision, the mean loss."""
    margin = (pairs.design.double() * weights.double()[pairs.user]).sum(-1)
    losses = per_user_sum(pairs.weight * bt_losses(margin, pairs.target.double()), pairs.user, pairs.num_users)
    if precision is None:
        return losses / per_user_sum(pairs.weight.double(), pairs.user, pairs.num_users)
    away = weights.double() - centre
    return losses + 0.5 * torch.einsum("uj,jk,uk->u", away, precision.double(), away)


def adam(pairs: PairList, centre: Tensor, precision: Tensor, num_steps: int = 500, lr: float = 0.1) -> Tensor:
    """Adam on the log posterior of every user's weights."""
    weights = centre.repeat(pairs.num_users, 1).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=lr)
    for _ in range(num_steps):
        margin = (pairs.design * weights[pairs.user]).sum(-1)
        away = weights - centre
        loss = (pairs.weight * bt_losses(margin, pairs.target)).sum() + 0.5 * ((away @ precision) * away).sum()
        (weights.grad,) = torch.autograd.grad(loss, weights)
        optimizer.step()
    return weights.detach()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--bases", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=int, default=50, help="users adapted alone")
    options = parser.parse_args(arguments)

    context = PlantedData(1, options.users, 1, options.pairs, 1, options.dim, rank=options.bases).context
    table = Table(title=f"{options.users} users, {options.pairs} pairs each, K = {options.bases}, D = {options.dim}")
    for column in ("LoRe", "adapt s", "fastest s", "500 Adam steps s", "objective", "Adam", "users worse", "alone"):
        table.add_column(column, justify="left" if column == "LoRe" else "right")
    for simplex in (False, True):
        method = make_method(options.dim, options.bases, simplex)
        times = []
        for _ in range(options.rounds):
            began = time.perf_counter()
            state = method.adapt(context)
            times.append(time.perf_counter() - began)
        adapted = state.tensors["weights"]
        with torch.no_grad():
            pairs, centre, precision = problem(method, context)
            began = time.perf_counter()
        by_adam = fit_simplex_by_adam(pairs, centre) if simplex else adam(pairs, centre, precision)
        seconds = time.perf_counter() - began
        with torch.no_grad():
            goal = None if simplex else precision
            objective, adam_objective = (objectives(pairs, weights, centre, goal) for weights in (adapted, by_adam))
        alone = 0.0
        for row in torch.linspace(0, options.users - 1, options.sample).long().tolist():
            alone_context = Context(*(None if value is None else value[row : row + 1] for value in context))  # type: ignore[arg-type]
            alone = max(alone, float((method.adapt(alone_context).tensors["weights"][0] - adapted[row]).abs().max()))
        table.add_row(
            type(method).__name__,
            f"{statistics.median(times):.3f}",
            f"{min(times):.3f}",
            f"{seconds:.1f}",
            f"{float(objective.mean()):.6f}",
            f"{float(adam_objective.mean()):.6f}",
            f"{int((objective > adam_objective + 1e-6).sum())}",
            f"{alone:.1e}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; median of rounds"
    )


if __name__ == "__main__":
    main()
