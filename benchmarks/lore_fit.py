"""One training step of LoRe: factored logits against the dense pairs x users formulation of the published code.

Usage: python benchmarks/lore_fit.py [--pairs 20000 --users 1000 --dim 4096 --bases 25]

A step is loss and gradients on all pairs. Every round times all of them in turns, so that a busy machine slows all
alike; "ratio" is that of the medians. "factored, by rows" multiplies the bases (D, K) as they lie, "factored" column by
column, see `plm.functional.project`. "LoRe.loss" is the shipped method, from chosen and rejected features; the others
start from their difference.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plm.functional import bt_losses
from plm.methods.lore import PublishedLoRe
from plm.methods.lore.maths import basis_margins
from plm.types import PreferenceBatch

TEMPERATURE = 100.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--users", type=int, default=1_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--bases", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    user = torch.arange(options.pairs) % options.users
    chosen, rejected = torch.randn(options.pairs, options.dim), torch.randn(options.pairs, options.dim)
    difference, ones = chosen - rejected, torch.ones(options.pairs)
    method = PublishedLoRe(options.users, options.dim, num_bases=options.bases, temperature=TEMPERATURE)
    batch = PreferenceBatch(chosen, rejected, user, ones, torch.zeros(options.pairs, dtype=torch.bool))
    parameters = [method.bases, method.weight_logits]

    def dense() -> Tensor:
        logits = difference @ (method.bases @ torch.softmax(method.weight_logits, -1).T) / TEMPERATURE  # (pairs, users)
        return bt_losses(logits.gather(1, user[:, None])[:, 0], ones).mean()

    def factored() -> Tensor:
        weights = torch.softmax(method.weight_logits, -1)[user]
        return bt_losses(basis_margins(difference, method.bases, weights) / TEMPERATURE, ones).mean()

    def by_rows() -> Tensor:
        weights = torch.softmax(method.weight_logits, -1)[user]
        return bt_losses(((difference @ method.bases) * weights).sum(-1) / TEMPERATURE, ones).mean()

    steps: dict[str, Callable[[], Tensor]] = {
        "dense, pairs x users": dense,
        "factored, by rows": by_rows,
        "factored": factored,
        "LoRe.loss": lambda: method.loss(batch)["loss"],
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    grads: dict[str, tuple[Tensor, ...]] = {}
    for turn in range(options.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            loss = step()
            grads[name] = torch.autograd.grad(loss, parameters)
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - began)
            losses[name] = loss.item()

    slow = "dense, pairs x users"
    table = Table(
        title=f"{options.pairs} pairs, {options.users} users, D = {options.dim}, K = {options.bases}, "
        f"{options.rounds} rounds"
    )
    for column in (
        "step",
        "median s",
        "fastest s",
        "ratio",
        "relative loss difference",
        "relative gradient difference",
    ):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name in steps:
        apart = max(float((one - two).norm() / two.norm()) for one, two in zip(grads[name], grads[slow], strict=True))
        table.add_row(
            name,
            f"{statistics.median(times[name]):.3f}",
            f"{min(times[name]):.3f}",
            f"{statistics.median(times[slow]) / statistics.median(times[name]):.1f}x",
            f"{abs(losses[name] - losses[slow]) / losses[slow]:.1e}",
            f"{apart:.1e}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
