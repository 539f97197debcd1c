"""Do latents lead to the texts that their latent reward promises? The assumption on which Latent DPO stands.

Usage: python benchmarks/latent_validity.py --ckpt_path runs/plm/version_0/checkpoints/best.ckpt
       --samples runs/tiny_imdb_responses.jsonl [--rewards recipes/lora_dpo_imdb.yaml]
       [--people runs/plm/version_1/checkpoints/best.ckpt --prompts 40 --latents 16 --texts 16]

For prompts of the test, latents are drawn from the prior. The latent reward r(x, z) weighs what a person thinks of the
sampled responses by how likely z is under each one's posterior; no language model runs for it. Texts are then written
from the same latents, with the same random numbers for all latents of a prompt, and the person's mean reward of them is
held against the promise: Spearman's correlation over the latents of a prompt, its mean over prompts, and a 95 %
interval by a bootstrap of prompts. `learned` is the same of h(x, z) = log p(z|x) - log N(z; 0, I), the reward that the
people of a `LatentDPO` checkpoint have learned from their pairs on other prompts, by which their texts are steered.
`texts` holds one half of a latent's texts against the other half: how far latents decide the reward at all. `response`
is the share of the variance of the person's reward within a prompt that a linear map of the posterior means explains on
other prompts: how far latents know it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plm.checkpoint import KnownUsers, load_method
from plm.cli.tastes import read_tastes
from plm.data.sources.population import standardise
from plm.data.sources.sampled import SampledPairs
from plm.generation import sample
from plm.methods.clap.latents import ClapLatents
from plm.methods.clap.losses import log_densities
from plm.methods.clap.validity import latent_rewards, validity
from plm.methods.latent_dpo import LatentDPO
from plm.types import UserState

RIDGE = 10.0


def posteriors(backbone: ClapLatents, source: SampledPairs, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Means and log-variances ``(P, C, Z)`` of the responses to some prompts, and where there is a response."""
    pool = source.pool
    candidates = pool.candidates[rows]
    place, column = np.nonzero(candidates >= 0)
    asked = [pool.prompts[row] for row in rows[place].tolist()]
    encoded = backbone.represent(asked, [pool.responses[code] for code in candidates[place, column].tolist()])
    assert isinstance(encoded, Tensor)
    out = torch.zeros(*candidates.shape, backbone.feature_dim)
    out[place, column] = encoded
    mean, log_var = out.chunk(2, -1)
    return mean, log_var, torch.from_numpy(candidates >= 0)


def known_share(mean: Tensor, worth: Tensor, mask: Tensor) -> Tensor:
    """Share ``(U,)`` of the variance of rewards ``(P, C, U)`` within a prompt explained by a linear map of the means.

    The map is fitted on the first half of the prompts and judged on the second.
    """
    count = mask.sum(1)[:, None, None]
    x, y = (
        ((value - (value * mask[..., None]).sum(1, keepdim=True) / count) * mask[..., None]).double()
        for value in (mean, worth)
    )
    half = len(mean) // 2
    train, test = x[:half].flatten(0, 1), x[half:].flatten(0, 1)
    solved = torch.linalg.solve(
        train.T @ train + RIDGE * torch.eye(train.shape[1], dtype=torch.double), train.T @ y[:half].flatten(0, 1)
    )
    target = y[half:].flatten(0, 1)
    return 1 - (target - test @ solved).square().sum(0) / target.square().sum(0)


def learned_rewards(people: LatentDPO, user_id: str, prompts: Sequence[str], latent: Tensor) -> Tensor:
    """What a person's policy says of latents ``(P, M, Z)``, against the prior: ``(P, M)``."""
    assert isinstance(people.find_users, KnownUsers) and people.encode_prompts is not None
    users, known = people.find_users.lookup([user_id] * len(prompts))
    if not known.all():
        raise ValueError(f"--people: expected a checkpoint that knows {user_id!r}")
    policy = people.latent_policies(users, people.encode_prompts(prompts))
    prior = torch.zeros(())
    own = log_densities(latent, policy.mean[:, None], policy.log_var[:, None])
    return (own - log_densities(latent, prior, prior)).sum(-1)


def measure(options: argparse.Namespace) -> Table:
    """Write texts from latents and compare."""
    source = read_tastes(options.rewards, [options.samples])
    pool, people = source.pool, list(source.weights)
    weights = np.stack(list(source.weights.values()), axis=1)  # (A, U)
    scale, shift = np.nanstd(pool.scores, axis=(0, 1)), np.nanmean(pool.scores, axis=(0, 1))
    backbone = ClapLatents(options.ckpt_path)
    test = np.flatnonzero(pool.test)
    mean, log_var, mask = posteriors(backbone, source, test)
    worth = torch.from_numpy(np.nan_to_num(standardise(pool.scores[test]) @ weights)).float()
    known = known_share(mean, worth, mask)
    shown = slice(0, min(options.prompts, len(test)))
    mean, log_var, mask, worth = mean[shown], log_var[shown], mask[shown], worth[shown]
    prompts = [pool.prompts[row] for row in test[shown].tolist()]
    generator = torch.Generator().manual_seed(options.seed)
    latent = torch.randn(len(prompts), options.latents, backbone.latent_dim, generator=generator)
    asked = [prompt for prompt in prompts for _ in range(options.latents)]
    users = UserState({"latent": latent.flatten(0, 1)}, torch.zeros(len(asked), dtype=torch.long))
    settings = {"max_new_tokens": options.max_new_tokens, "top_k": options.top_k, "seed": options.seed}
    written = sample(backbone.method, asked, users, num_samples=options.texts, **settings)
    texts = [one.text for own in written for one in own]
    again = [prompt for prompt in asked for _ in range(options.texts)]
    raw = np.stack([reward.score(again, texts) for reward in source.rewards.values()], axis=-1)
    found = torch.from_numpy((raw - shift) / scale @ weights).view(*latent.shape[:2], options.texts, len(people))
    promised = torch.stack([latent_rewards(latent, mean, log_var, own, mask) for own in worth.unbind(-1)], 1)
    ranked = [("validity", promised)]
    if options.people is not None:
        method = load_method(options.people)
        if not isinstance(method, LatentDPO) or method.latents.content != backbone.content:
            raise ValueError(
                f"--people: expected a LatentDPO checkpoint over the CLaP model of --ckpt_path, got {options.people!r}"
            )
        ranked.append(("learned", torch.stack([learned_rewards(method, one, prompts, latent) for one in people], 1)))
    heads = [head for name in (*(name for name, _ in ranked), "texts") for head in (name, "95 %")]
    table = Table("person", *heads, "response", title="rank correlation within a prompt")
    halves = [part.mean(2).transpose(1, 2) for part in found.split([options.texts // 2, -(-options.texts // 2)], 2)]
    whole = found.mean(2).transpose(1, 2)
    for number, name in enumerate([*people, "mean"]):
        own = slice(None) if name == "mean" and number == len(people) else slice(number, number + 1)
        pairs = [validity(values[:, own], whole[:, own]) for _, values in ranked]
        pairs.append(validity(halves[0][:, own], halves[1][:, own]))
        cells = [text for one in pairs for text in (f"{one.correlation:+.2f}", f"[{one.low:+.2f}, {one.high:+.2f}]")]
        table.add_row(name, *cells, f"{float(known[own].mean()):.2f}")
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--samples", required=True)
    parser.add_argument("--rewards", default="recipes/lora_dpo_imdb.yaml")
    parser.add_argument("--people", help="checkpoint of LatentDPO over the same CLaP model")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.texts < 2:
        parser.error("--texts: expected at least 2, for texts of a latent are held against each other")
    began = time.perf_counter()
    console = Console()
    console.print(measure(options))
    console.print(
        f"{options.prompts} prompts, {options.latents} latents of each, {options.texts} texts of each; "
        f"{time.perf_counter() - began:.0f} seconds"
    )


if __name__ == "__main__":
    main()
