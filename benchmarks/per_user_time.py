"""Seconds to learn one more person, and what training many at once saves.

Usage: python benchmarks/per_user_time.py [--people 256 --pairs 50 --steps 200]

A person is learned from cached latents of both responses and cached features of the prompt; no language model runs.
"together" is ``LatentDPO.adapt`` of everybody in one call, from pairs to states, divided by the number of people.
"alone" is the same call for one person at a time, "plain loop" the program one would write for one person: a
``torch.nn`` module, ``torch.optim.AdamW``, and the same loss on the same pairs. Both are timed on some of the people
(``--alone``). "apart" is the largest difference between a number of a person trained alone and together.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plm.methods.latent_dpo import LatentDPO
from plm.methods.latent_dpo.maths import Gaussian, gaussian, kl_to_prior
from plm.methods.latent_dpo.rules import preference_losses
from plm.types import Context

CASES: dict[str, dict[str, Any]] = {
    "mlp (fast)": {},
    "mlp, topk": {"rule": "topk"},
    "linear": {"family": "linear"},
    "vector": {"family": "vector"},
    "newton": {"preset": "newton"},
}


def planted(num_people: int, num_pairs: int, latent_dim: int, prompt_dim: int) -> Context:
    """Pairs of people who prefer latents along a direction of their own."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    sides, direction = normal(2, num_people, num_pairs, latent_dim), normal(num_people, 1, latent_dim)
    first_wins = ((sides[0] - sides[1]) * direction).sum(-1, keepdim=True) > 0
    both = [torch.where(first_wins, sides[0], sides[1]), torch.where(first_wins, sides[1], sides[0])]
    chosen, rejected = (torch.cat([side, torch.full_like(side, -1.4)], -1) for side in both)
    mask = torch.ones(num_people, num_pairs, dtype=torch.bool)
    return Context(chosen, rejected, mask, mask.float(), prompt=normal(num_people, num_pairs, prompt_dim))


def one(context: Context, person: int) -> Context:
    """One person of a context."""
    return Context(*(value[person : person + 1] if isinstance(value, Tensor) else None for value in context))  # type: ignore[arg-type]


def plain_loop(context: Context, hidden_dim: int, num_steps: int, kl_coef: float) -> torch.nn.Module:
    """One person as one would write it: the fast preset with a module and an optimizer of its own."""
    chosen, rejected, prompt = (value[0] for value in (context.chosen, context.rejected, context.prompt))  # type: ignore[index]
    latent_dim = chosen.shape[-1] // 2
    layers = [torch.nn.Linear(prompt.shape[-1], hidden_dim), torch.nn.SiLU(), torch.nn.Linear(hidden_dim, latent_dim)]
    network = torch.nn.Sequential(*layers)
    torch.nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    responses = gaussian(torch.stack([chosen, rejected], 1))
    grades = torch.tensor([1.0, 0.0]).expand(len(chosen), 2)
    for _ in range(num_steps):
        mean = network(prompt)
        policy = Gaussian(mean, torch.zeros_like(mean))
        losses = preference_losses("closed_form", policy, responses, grades, None, 0.1)
        loss = (losses + kl_coef * kl_to_prior(policy).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--latent_dim", type=int, default=32)
    parser.add_argument("--prompt_dim", type=int, default=768)
    parser.add_argument("--alone", type=int, default=8, help="people who are also trained alone")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)

    context = planted(options.people, options.pairs, options.latent_dim, options.prompt_dim)
    some = torch.linspace(0, options.people - 1, options.alone).long().tolist()
    title = f"{options.people} people, {options.pairs} pairs each, {options.steps} steps, Z = {options.latent_dim}"
    table = Table(title=f"{title}, F = {options.prompt_dim}: ms per person, medians of {options.rounds} rounds")
    for column in ("people are", "together", "alone", "ratio", "plain loop", "ratio", "apart"):
        table.add_column(column, justify="left" if column == "people are" else "right")
    for name, case in CASES.items():
        steps = {} if "preset" in case else {"num_steps": options.steps}
        method = LatentDPO(1, 2 * options.latent_dim, prompt_dim=options.prompt_dim, **steps, **case)
        state = method.adapt(context).tensors["policy"]
        apart = max(
            float((method.adapt(one(context, person)).tensors["policy"][0] - state[person]).abs().max())
            for person in some
        )
        together, alone, plain = [], [], []
        for _ in range(options.rounds):  # in turns, so that a busy machine slows all alike
            together.append(seconds(lambda: method.adapt(context)) / options.people)  # noqa: B023 - called at once
            alone.append(seconds(lambda: [method.adapt(one(context, person)) for person in some]) / len(some))  # noqa: B023
            if name == "mlp (fast)":
                plain += [seconds(lambda: plain_loop(one(context, p), 128, options.steps, 0.01)) for p in some]  # noqa: B023
        times = [statistics.median(values) * 1e3 for values in (together, alone, plain) if values]
        cells = [f"{times[0]:.3g}", f"{times[1]:.3g}", f"{times[1] / times[0]:.1f}x"]
        cells += [f"{times[2]:.3g}", f"{times[2] / times[0]:.1f}x"] if plain else ["", ""]
        table.add_row(name, *cells, f"{apart:.1e}")
    console = Console(width=120)
    console.print(table)
    load = f"{os.getloadavg()[0]:.1f} at the end"
    console.print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, load {load}")


if __name__ == "__main__":
    main()
