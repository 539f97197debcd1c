"""Do latents lead to the texts that their latent reward promises? The assumption on which Latent DPO stands.

Usage: python benchmarks/latent_validity.py --ckpt_path runs/plm/version_0/checkpoints/best.ckpt
       --samples runs/tiny_imdb_responses.jsonl [--rewards recipes/lora_dpo_imdb.yaml]
       [--people runs/plm/version_1/checkpoints/best.ckpt --prompts 40 --latents 16 --texts 16]

For prompts of the test, latents are drawn from the prior. The latent reward r(x, z) weighs what a person thinks of
scored responses by how likely z is under each one's posterior; no language model runs for it. Texts are then written
from the same latents, with the same random numbers for all latents of a prompt, and the person's mean reward of them is
held against the promise: Spearman's correlation over the latents of a prompt, its mean over prompts, and a 95 %
interval by a bootstrap of prompts.

`published` is r as published, by the sampled responses to the prompt itself. `calibrated` is the same with posteriors
to the power at which they are nearest those of the model that writes, by the evidence bound of responses to training
prompts; no reward is looked at for it. `all prompts` weighs the responses to all training prompts, each by its reward
less the mean of the others to its prompt: as latents come from N(0, I) whatever the prompt,
p(z|x,y) / p(z) = p(x,y|z) / p(x,y), and the same sum estimates what a latent is worth over prompts. `learned` is
h(x, z) = log p(z|x) - log N(z; 0, I), the reward that the people of a `LatentDPO` checkpoint have learned from their
pairs on other prompts, by which their texts are steered. `texts` holds one half of a latent's texts against the other
half: how far latents decide the reward at all. `response` is the share of the variance of the person's reward within a
prompt that a linear map of the posterior means explains on other prompts: how far latents know it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from plm.backbones import completion_tokens
from plm.checkpoint import KnownUsers, load_method
from plm.data.sources.population import standardise
from plm.data.sources.sampled import SampledPairs
from plm.evaluation import print_parts
from plm.functional import kl_to_prior
from plm.generation import sample
from plm.judging.tastes import read_tastes
from plm.methods.clap.latents import ClapLatents
from plm.methods.latent_dpo import LatentDPO
from plm.methods.latent_dpo.maths import (
    Gaussian,
    draw_latents,
    gaussian,
    implicit_rewards,
    latent_rewards,
    product_of_experts,
)
from plm.types import UserState

RIDGE = 10.0
POWERS = [1.0, *(2.0**-half for half in range(1, 13)), 0.0]
DRAWS = 1


class Scored(NamedTuple):
    """Responses to P prompts, at most C each, as U people see them."""

    rows: np.ndarray
    """``(P,)`` of the pool."""
    latents: Gaussian
    """``(P, C, Z)`` posteriors."""
    mask: Tensor
    """``(P, C)`` bool, True = a response."""
    worth: Tensor
    """``(P, C, U)`` rewards; 0 where there is no response."""

    def first(self, count: int) -> Scored:
        """Of the first prompts alone."""
        return Scored(self.rows[:count], Gaussian(*(x[:count] for x in self.latents)), *(x[:count] for x in self[2:]))


def evidence_bounds(
    responses: Gaussian, powers: Sequence[float], log_ratios: Callable[[Tensor], Tensor], noise: Tensor
) -> Tensor:
    """How near powers of posteriors are to the posteriors of the model that writes: evidence bounds, in nats.

    The latent reward takes q(z|x,y) for the posterior of the model that writes, p(z|x,y) ~ p(z) p(y|x,z). Neither the
    density-gap KL nor the contrast asks for that: the contrast is content with a q as narrow as can be, and the KL of
    the mean of many q does not widen each of them. What q says of a response, the factor q / p by which it changes the
    prior, is here raised to a power a, ``q_a = p (q / p)^a / c``, which is normal again. With draws of q_a, and p_0 of
    the language model without a latent,

        E log p(y|x,z) - log p_0(y|x) - KL(q_a || p)

    falls short of the same constant for all q_a by KL(q_a || p(z|x,y)): the power with the largest bound is the
    nearest. No person's reward is asked.

    Args:
        responses: Posteriors of R responses, ``(R, Z)``.
        powers: Numbers from 0, the prior, to 1, q itself.
        log_ratios: log p(y|x,z) - log p_0(y|x) of the responses, each under its latent: ``(R, Z)`` -> ``(R,)`` nats.
        noise: ``(D, R, Z)`` standard normal numbers, the same for all powers.

    Returns:
        Means over responses, one for each power.
    """
    bounds = []
    for power in powers:
        posteriors = to_the_power(responses, power)
        gain = torch.stack([log_ratios(draw_latents(posteriors, normal)) for normal in noise]).mean(0)
        bounds.append((gain - kl_to_prior(*posteriors).sum(-1)).mean())
    return torch.stack(bounds)


def to_the_power(responses: Gaussian, power: float) -> Gaussian:
    """What posteriors say of the prior, to a power: ``p (q / p)^power``, normalised; ``(..., Z)`` each.

    Powers of powers multiply; 0 gives the prior.
    """
    return product_of_experts(Gaussian(*(part[None] for part in responses)), responses.mean.new_tensor([power]))


def advantages(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards less the mean of those of the other responses to the prompt, so that easy prompts count as hard ones.

    Args:
        rewards: ``(P, R, ...)``.
        mask: ``(P, R)`` bool, True = a response.

    Returns:
        Of the shape of ``rewards``; 0 where there is no response, or no other.
    """
    is_response = mask.view(*mask.shape, *[1] * (rewards.dim() - 2))
    rewards, count = torch.where(is_response, rewards, 0.0), is_response.sum(1, keepdim=True)
    others = (rewards.sum(1, keepdim=True) - rewards) / (count - 1).clamp(min=1)
    return torch.where(is_response & (count > 1), rewards - others, 0.0)


def rank_correlations(one: Tensor, two: Tensor) -> Tensor:
    """Spearman's correlation of each row, ``(P, M)`` each -> ``(P,)``; ties share ranks, a constant row gives nan.

    >>> rank_correlations(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, 9.0, 4.0, 16.0]])).item()
    0.8
    """
    first, second = (_ranks(values) for values in (one.double(), two.double()))
    return (first * second).sum(-1) / (first.square().sum(-1) * second.square().sum(-1)).sqrt()


def _ranks(values: Tensor) -> Tensor:
    """Average ranks ``(P, M)``, less their mean."""
    others = values[:, None, :]
    ranks = (values[:, :, None] > others).sum(-1) + 0.5 * (values[:, :, None] == others).sum(-1)
    return ranks.double() - ranks.double().mean(-1, keepdim=True)


class Validity(NamedTuple):
    """How latent rewards rank latents against the rewards of the texts they lead to."""

    correlation: float
    """Mean over prompts of the rank correlation within a prompt."""
    low: float
    """95 % interval, by a bootstrap of prompts."""
    high: float
    num_prompts: int
    """Prompts on which both rewards vary."""


def validity(promised: Tensor, found: Tensor, num_resamples: int = 2000, seed: int = 0) -> Validity:
    """Compare latent rewards with the rewards of texts written from the same latents.

    Args:
        promised: ``(P, M)`` latent rewards, see `plm.methods.latent_dpo.maths.latent_rewards`; or ``(P, R, M)`` of R
            rewards, whose correlations are averaged within a prompt.
        found: Of the same shape, rewards of texts y ~ p(y|x,z), or their mean over some texts of each latent.
        num_resamples: Bootstrap resamples behind the interval.
        seed: Of the bootstrap.
    """
    rows = rank_correlations(promised.flatten(0, -2), found.flatten(0, -2)).view(len(promised), -1).nanmean(1)
    rows = rows[rows.isfinite()]
    if not len(rows):
        return Validity(float("nan"), float("nan"), float("nan"), 0)
    draws = torch.randint(len(rows), (num_resamples, len(rows)), generator=torch.Generator().manual_seed(seed))
    low, high = rows[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Validity(float(rows.mean()), low, high, len(rows))


def scored(backbone: ClapLatents, source: SampledPairs, weights: np.ndarray, rows: np.ndarray) -> Scored:
    """Encode the responses to some prompts and value them."""
    pool = source.pool
    candidates = pool.candidates[rows]
    prompt_row, column = np.nonzero(candidates >= 0)
    prompts = [pool.prompts[row] for row in rows[prompt_row].tolist()]
    encoded = backbone.represent(prompts, [pool.responses[code] for code in candidates[prompt_row, column].tolist()])
    assert isinstance(encoded, Tensor)
    out = torch.zeros(*candidates.shape, backbone.feature_dim)
    out[prompt_row, column] = encoded
    worth = torch.from_numpy(np.nan_to_num(standardise(pool.scores[rows]) @ weights)).float()
    return Scored(rows, gaussian(out), torch.from_numpy(candidates >= 0), worth)


def calibrated_power(
    backbone: ClapLatents, source: SampledPairs, scored_responses: Scored, seed: int
) -> tuple[float, list[float]]:
    """The power of posteriors that the evidence prefers, and the bound of each of `POWERS`."""
    pool, (prompt_row, column) = source.pool, scored_responses.mask.nonzero(as_tuple=True)
    texts = pool.candidates[scored_responses.rows][scored_responses.mask.numpy()].tolist()
    prompts = [pool.prompts[row] for row in scored_responses.rows[prompt_row].tolist()]
    tokens = completion_tokens(
        [
            backbone.causal_lm.completion(prompt, pool.responses[code])
            for prompt, code in zip(prompts, texts, strict=True)
        ]
    )
    noise = torch.randn(DRAWS, len(texts), backbone.latent_dim, generator=torch.Generator().manual_seed(seed))
    posteriors = Gaussian(*(part[prompt_row, column] for part in scored_responses.latents))
    bounds = evidence_bounds(
        posteriors, POWERS, lambda latents: backbone.log_ratios(tokens, latents).cpu(), noise
    ).tolist()
    return POWERS[int(np.argmax(bounds))], bounds


def known_share(responses: Scored) -> Tensor:
    """Share ``(U,)`` of the variance of rewards within a prompt explained by a linear map of the posterior means.

    The map is fitted on the first half of the prompts and judged on the second.
    """
    mean, mask = responses.latents.mean, responses.mask[..., None]
    x = ((mean - (mean * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)) * mask).double()
    y, half = advantages(responses.worth, responses.mask).double(), len(mean) // 2
    train, test = x[:half].flatten(0, 1), x[half:].flatten(0, 1)
    solved = torch.linalg.solve(
        train.T @ train + RIDGE * torch.eye(train.shape[1], dtype=torch.double), train.T @ y[:half].flatten(0, 1)
    )
    target = y[half:].flatten(0, 1)
    return 1 - (target - test @ solved).square().sum(0) / target.square().sum(0)


def prompt_rewards(latent: Tensor, responses: Scored, power: float) -> Tensor:
    """Latent rewards of latents ``(P, M, Z)`` by the responses to their prompts, ``(P, U, M)``."""
    latents = to_the_power(responses.latents, power)
    return latent_rewards(latent, latents, responses.worth.movedim(-1, 0), responses.mask).transpose(0, 1)


def pooled_rewards(latent: Tensor, responses: Scored, power: float) -> Tensor:
    """Latent rewards of latents ``(P, M, Z)`` by responses to other prompts, ``(P, U, M)``."""
    posteriors = to_the_power(Gaussian(*(part[responses.mask] for part in responses.latents)), power)
    values = advantages(responses.worth, responses.mask)[responses.mask].T
    worth = latent_rewards(latent.flatten(0, 1), posteriors, values)
    return worth.view(-1, *latent.shape[:2]).transpose(0, 1)


def learned_rewards(people: LatentDPO, user_id: str, prompts: Sequence[str], latent: Tensor) -> Tensor:
    """What a person's policy says of latents ``(P, M, Z)``, against the prior: ``(P, M)``."""
    assert isinstance(people.find_users, KnownUsers) and people.encode_prompts is not None
    users, known = people.find_users.lookup([user_id] * len(prompts))
    if not known.all():
        raise ValueError(f"--people: expected a checkpoint that knows {user_id!r}")
    return implicit_rewards(latent, people.latent_policies(users, people.encode_prompts(prompts)))


def measure(options: argparse.Namespace) -> tuple[Table, str]:
    """Write texts from latents and compare."""
    source = read_tastes(options.rewards, [options.samples])
    pool, people = source.pool, list(source.weights)
    weights = np.stack(list(source.weights.values()), axis=1)  # (A, U)
    scale, shift = np.nanstd(pool.scores, axis=(0, 1)), np.nanmean(pool.scores, axis=(0, 1))
    backbone = ClapLatents(options.ckpt_path)
    if not pool.test.any() or pool.test.all():
        raise ValueError(
            f"--samples: expected prompts of training and test (key split), got {options.samples!r} with one"
        )
    train, test = (scored(backbone, source, weights, np.flatnonzero(part)) for part in (~pool.test, pool.test))
    known = known_share(test)
    power, bounds = calibrated_power(backbone, source, train.first(options.prompts), options.seed)
    test = test.first(options.prompts)
    prompts = [pool.prompts[row] for row in test.rows.tolist()]
    generator = torch.Generator().manual_seed(options.seed)
    latent = torch.randn(len(prompts), options.latents, backbone.latent_dim, generator=generator)
    repeated_prompts = [prompt for prompt in prompts for _ in range(options.latents)]
    users = UserState({"latent": latent.flatten(0, 1)}, torch.zeros(len(repeated_prompts), dtype=torch.long))
    settings = {"max_new_tokens": options.max_new_tokens, "top_k": options.top_k, "seed": options.seed}
    texts_of_latents = sample(backbone.method, repeated_prompts, users, num_samples=options.texts, **settings)
    texts = [written.text for texts_of_latent in texts_of_latents for written in texts_of_latent]
    text_prompts = [prompt for prompt in repeated_prompts for _ in range(options.texts)]
    raw = np.stack([reward.score(text_prompts, texts) for reward in source.rewards.values()], axis=-1)
    rewards = torch.from_numpy((raw - shift) / scale @ weights).view(*latent.shape[:2], options.texts, len(people))
    ranked = [
        ("published", prompt_rewards(latent, test, 1.0)),
        ("calibrated", prompt_rewards(latent, test, power)),
        ("all prompts", pooled_rewards(latent, train, power)),
    ]
    if options.people is not None:
        method = load_method(options.people)
        if not isinstance(method, LatentDPO) or method.latents.content != backbone.content:
            raise ValueError(
                f"--people: expected a LatentDPO checkpoint over the CLaP model of --ckpt_path, got {options.people!r}"
            )
        ranked.append(
            ("learned", torch.stack([learned_rewards(method, person, prompts, latent) for person in people], 1))
        )
    heads = [*(name for name, _ in ranked), "texts", "response"]
    table = Table("person", *heads, title="rank correlation within a prompt, 95 %")
    halves = [part.mean(2).transpose(1, 2) for part in rewards.split([options.texts // 2, -(-options.texts // 2)], 2)]
    whole = rewards.mean(2).transpose(1, 2)
    for number, name in enumerate([*people, "mean"]):
        columns = slice(None) if name == "mean" and number == len(people) else slice(number, number + 1)
        results = [validity(values[:, columns], whole[:, columns]) for _, values in ranked]
        results.append(validity(halves[0][:, columns], halves[1][:, columns]))
        cells = [f"{result.correlation:+.2f} [{result.low:+.2f}, {result.high:+.2f}]" for result in results]
        table.add_row(name, *cells, f"{float(known[columns].mean()):.2f}")
    shown = ", ".join(f"{exponent:.4g}: {bound:.2f}" for exponent, bound in zip(POWERS, bounds, strict=True))
    return table, f"posteriors calibrated to the power {power:.4g}; evidence bounds by power, nats: {shown}"


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
    if options.prompts < 1:
        parser.error("--prompts: expected at least 1")
    began = time.perf_counter()
    print_parts(
        *measure(options),
        f"{options.prompts} prompts, {options.latents} latents of each, {options.texts} texts of each; "
        f"{time.perf_counter() - began:.0f} seconds",
    )


if __name__ == "__main__":
    main()
