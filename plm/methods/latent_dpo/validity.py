"""Whether a latent leads to the texts that its latent reward promises: the assumption on which Latent DPO stands.

Axes: P prompts, M latents of a prompt, R responses or rewards, D draws, Z latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plm.methods.latent_dpo.maths import Gaussian, draw_latents, kl_to_prior, product_of_experts


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
        given = to_the_power(responses, power)
        gain = torch.stack([log_ratios(draw_latents(given, one)) for one in noise]).mean(0)
        bounds.append((gain - kl_to_prior(given).sum(-1)).mean())
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
    known = mask.view(*mask.shape, *[1] * (rewards.dim() - 2))
    rewards, count = torch.where(known, rewards, 0.0), known.sum(1, keepdim=True)
    others = (rewards.sum(1, keepdim=True) - rewards) / (count - 1).clamp(min=1)
    return torch.where(known & (count > 1), rewards - others, 0.0)


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
