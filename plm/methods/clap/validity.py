"""Whether a latent leads to the texts that its latent reward promises: the assumption on which Latent DPO stands.

Axes: P prompts, M latents of a prompt, N scored responses of a prompt (padded), Z latent width, R rewards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plm.methods.clap.losses import log_densities


def latent_rewards(latent: Tensor, mean: Tensor, log_var: Tensor, reward: Tensor, mask: Tensor) -> Tensor:
    """Reward of latents by self-normalised importance: r(x, z) = sum_k q_k(z) r_k / sum_k q_k(z).

    Responses y_k were drawn from p(y|x), so each counts by p(y_k|x,z) / p(y_k|x) = p(z|x,y_k) / p(z), with q_k for
    p(z|x,y_k) (arXiv 2412.20834).

    Args:
        latent: ``(P, M, Z)``.
        mean: ``(P, N, Z)`` of the responses' posteriors.
        log_var: ``(P, N, Z)``.
        reward: ``(P, N)``.
        mask: ``(P, N)`` bool, True = a response.

    Returns:
        ``(P, M)``.
    """
    density = log_densities(latent[:, :, None], mean[:, None], log_var[:, None]).sum(-1)  # (P, M, N)
    share = density.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return (share * torch.where(mask, reward, 0.0)[:, None]).sum(-1)


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
        promised: ``(P, M)`` latent rewards, see `latent_rewards`; or ``(P, R, M)`` of R rewards, whose correlations are
            averaged within a prompt.
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
