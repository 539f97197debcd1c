"""Training step of VPL's encoder, all users at once, against a loop over users as in the published code.

Usage: python benchmarks/vpl_step.py [--users 64] [--pairs 8]

A step is posterior, KL and backward pass of all users' contexts. Rounds time both in turns, so that a busy machine
slows both alike; "ratio" is the median over rounds, "best" compares the fastest rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plm.functional import kl_to_prior
from plm.methods.vpl import VPL
from plm.recipe.defaults import read_config, shipped
from plm.types import Context

FEATURES = 384
PAPER = read_config(shipped("conf") / "method" / "vpl_paper.yaml")["model"]["init_args"]
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "default with attention": {"posterior": "attention"},
    "paper, width 64": {**PAPER, "latent_dim": 64, "hidden_dim": 64},
    "paper, width 512": PAPER,
}


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def kl_of(method: VPL, context: Context) -> Tensor:
    """KL of the posteriors of a context, summed over users."""
    pairs = context.pairs
    tokens = method._tokens(pairs, torch.arange(pairs.num_pairs))
    return kl_to_prior(*method._posterior(tokens, pairs.weight, pairs.user_index, context.num_users)).sum()


def measure(options: dict[str, Any], num_users: int, num_pairs: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds per step, batched and looped; both must give the same gradient."""
    torch.manual_seed(0)
    method = VPL(num_users, FEATURES, **options)
    shape = (num_users, num_pairs)
    context = Context(
        torch.randn(*shape, FEATURES), torch.randn(*shape, FEATURES), torch.ones(shape).bool(), torch.ones(shape)
    )
    alone = [
        Context(**{name: value[[user]] for name, value in context._asdict().items() if value is not None})
        for user in range(num_users)
    ]
    parameters = [*method.encoder.parameters(), *method.set_encoder.parameters()]

    def batched() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kl_of(method, context), parameters, allow_unused=True)

    def looped() -> tuple[Tensor, ...]:
        total = torch.stack([kl_of(method, one) for one in alone]).sum()
        return torch.autograd.grad(total, parameters, allow_unused=True)

    flat = [torch.cat([g.flatten() for g in run() if g is not None]) for run in (batched, looped)]
    assert torch.allclose(*flat, rtol=1e-3, atol=1e-4 * float(flat[0].abs().max()))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        times[0].append(seconds(batched))
        times[1].append(seconds(looped))
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    table = Table(title=f"{options.users} users of {options.pairs} pairs, {FEATURES} features, {options.rounds} rounds")
    for column in ("encoder", "batched ms", "loop ms", "ratio", "best"):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for name, setting in SETTINGS.items():
        batched, looped = measure(setting, options.users, options.pairs, options.rounds)
        ratio = statistics.median(slow / fast for fast, slow in zip(batched, looped, strict=True))
        medians = [f"{1000 * statistics.median(times):.1f}" for times in (batched, looped)]
        table.add_row(name, *medians, f"{ratio:.1f}x", f"{min(looped) / min(batched):.1f}x")
    console = Console()
    console.print(table)
    console.print(f"{torch.get_num_threads()} CPU threads of {os.cpu_count()}")


if __name__ == "__main__":
    main()
