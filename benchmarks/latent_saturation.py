"""Which rules of Latent DPO leave the prior: direction found, length of the mean and KL after the same steps.

Usage: python benchmarks/latent_saturation.py [--people 4 --pairs 200 --steps 400]

Planted people: each prefers latents along a random direction. Responses have posteriors N(m, 1/4) with m ~ N(0, 3/4),
so that together they are the prior, as a trained encoder makes them. Of 32 responses to a prompt, the best and the
second worst are a pair, and so are the second best and the worst (Zhang et al., arXiv 2412.20834). Hard labels are
separable then, and have no finite optimum: the mean grows as long as it is trained, past the typical length of a draw
of the prior, sqrt(32) = 5.66, beyond which a decoder of latents has seen nothing. Soft labels, the expectation of the
latent reward, and a KL term have one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plm.functional import kl_to_prior
from plm.methods.latent_dpo import LatentDPO
from plm.types import Context

DIM, RESPONSES, VARIANCE = 32, 32, 0.25
CASES: dict[str, dict[str, Any]] = {
    "unit, evidence": {"rule": "evidence"},
    "unit, all_pairs": {"rule": "all_pairs"},
    "unit, topk": {"rule": "topk"},
    "unit, direct": {"rule": "direct"},
    "unit, closed_form": {"rule": "closed_form"},
    "free, evidence": {"rule": "evidence", "variance": "free"},
    "fixed_entropy, evidence": {"rule": "evidence", "variance": "fixed_entropy"},
    "unit, soft": {"rule": "soft"},
    "unit, expectation": {"rule": "expectation"},
    "free, expectation": {"rule": "expectation", "variance": "free"},
    "free, evidence, kl_coef 0.01": {"rule": "evidence", "variance": "free", "kl_coef": 0.01},
    "unit, closed_form, kl_coef 0.01": {"rule": "closed_form", "kl_coef": 0.01},
    "newton, kl_coef 0.01": {"rule": "newton"},
    "newton, kl_coef 0.003": {"rule": "newton", "kl_coef": 0.003},
}
NOISY_CASES = [
    "unit, evidence",
    "unit, topk",
    "unit, soft",
    "unit, closed_form, kl_coef 0.01",
    "newton, kl_coef 0.01",
    "newton, kl_coef 0.003",
]


def planted(num_people: int, num_pairs: int, flipped: float, seed: int = 0) -> tuple[Context, Tensor]:
    """Pairs of all people and their directions ``(U, Z)``; a share of the labels is flipped."""
    draw = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(num_people, DIM, generator=draw), dim=-1)
    num_prompts = -(-num_pairs // 2)
    means = torch.randn(num_people, num_prompts, RESPONSES, DIM, generator=draw) * (1 - VARIANCE) ** 0.5
    order = torch.einsum("uprz,uz->upr", means, direction).argsort(-1, descending=True)[..., None].expand_as(means)
    ranked = means.gather(2, order)
    chosen = ranked[:, :, [0, 1]].flatten(1, 2)[:, :num_pairs]
    rejected = ranked[:, :, [-2, -1]].flatten(1, 2)[:, :num_pairs]
    flip = (torch.rand(num_people, num_pairs, 1, generator=draw) < flipped).expand_as(chosen)
    chosen, rejected = torch.where(flip, rejected, chosen), torch.where(flip, chosen, rejected)
    log_var = torch.full_like(chosen, VARIANCE).log()
    mask = torch.ones(num_people, num_pairs, dtype=torch.bool)
    sides = (torch.cat([side, log_var], -1) for side in (chosen, rejected))
    return Context(*sides, mask, mask.float()), direction


def learned(context: Context, direction: Tensor, steps: int, **options: Any) -> tuple[float, float, float]:
    """Cosine of mean and direction, length of the mean and KL, averaged over people."""
    if options["rule"] != "newton":
        options = {"kl_coef": 0.0, "lr": 0.05, "num_steps": steps, **options}
    method = LatentDPO(1, 2 * DIM, family="vector", **options)
    policy = method.latent_policies(method.adapt(context))
    cosine = torch.cosine_similarity(policy.mean, direction, dim=-1).mean()
    return float(cosine), float(policy.mean.norm(dim=-1).mean()), float(kl_to_prior(*policy).sum(-1).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args(arguments)

    console = Console(width=120)
    context, direction = planted(options.people, options.pairs, 0.0)
    table = Table(title=f"{options.people} people, {options.pairs} pairs each, {options.steps} steps of AdamW at 0.05")
    for column in ("variance, rule", "cos(mean, direction)", "|mean|", "KL, nats", "KL after twice the steps"):
        table.add_column(column, justify="left" if column == "variance, rule" else "right")
    for name, case in CASES.items():
        cosine, norm, kl = learned(context, direction, options.steps, **case)
        later = learned(context, direction, 2 * options.steps, **case)[2]
        table.add_row(name, f"{cosine:.3f}", f"{norm:.1f}", f"{kl:.2f}", f"{later:.2f}")
    console.print(table)

    table = Table(title="cos(mean, direction) and |mean| by pairs, and with flipped labels")
    cells = [(pairs, 0.0) for pairs in (1, 5, 10, 20, 50, 200)] + [(200, share) for share in (0.1, 0.3)] + [(5, 0.5)]
    for column in ("rule", *(f"{pairs}" + (f", {share:.0%} flipped" if share else "") for pairs, share in cells)):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for name in NOISY_CASES:
        row = [learned(*planted(options.people, *cell), options.steps, **CASES[name])[:2] for cell in cells]
        table.add_row(name, *(f"{cosine:.2f}, {norm:.1f}" for cosine, norm in row))
    console.print(table)


if __name__ == "__main__":
    main()
