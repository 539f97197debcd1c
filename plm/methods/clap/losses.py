"""Losses of CLaP as pure functions of posteriors and likelihoods.

A prompt's N responses y_1..y_N have posteriors q_k = q(z|x,y_k) = N(mean_k, exp(log_var_k)) and the aggregate
q_bar = (1/N) sum_k q_k; the prior is p(z) = N(0, I). Prompts with fewer responses than the largest are padded.

Axes: G prompts, N responses of a prompt (padded), Z latent width, M draws, C candidates, n response tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plm.functional import kl_to_prior, log_densities


class Posteriors(NamedTuple):
    """Posteriors of the responses to G prompts."""

    mean: Tensor
    """``(G, N, Z)``."""
    log_var: Tensor
    """``(G, N, Z)``."""
    mask: Tensor
    """``(G, N)`` bool, True = a response."""

    def draw(self, noise: Tensor) -> Tensor:
        """Latents ``(G, N, M, Z)`` from standard normal numbers of that shape; gradients flow through them."""
        return self.mean[:, :, None] + (0.5 * self.log_var).exp()[:, :, None] * noise


def mean_kl(posteriors: Posteriors) -> Tensor:
    """Mean over responses of KL(q_k || p), the KL of the ordinary evidence bound: ``(G,)``."""
    return _mean_over(kl_to_prior(posteriors.mean, posteriors.log_var).sum(-1), posteriors.mask)


def _log_aggregate(latent: Tensor, posteriors: Posteriors, *, joint: bool) -> Tensor:
    """Log-density of q_bar at latents ``(G, N, M, Z)``: ``(G, N, M)``, or of each marginal, ``(G, N, M, Z)``."""
    mean, log_var, mask = posteriors
    each = log_densities(latent[:, :, :, None], mean[:, None, None], log_var[:, None, None])  # (G, N, M, N, Z)
    if joint:
        each = each.sum(-1)
    absent = ~mask[:, None, None, :] if joint else ~mask[:, None, None, :, None]
    total = each.masked_fill(absent, -torch.inf).logsumexp(3)
    count = mask.sum(-1).to(total).log()
    return total - count.view(-1, *[1] * (total.dim() - 1))


def density_gap(posteriors: Posteriors, noise: Tensor, *, joint: bool = False) -> Tensor:
    """Density-gap KL(q_bar || p), estimated by M draws of every q_k (Zhang et al. 2022, NeurIPS; CLaP's L_DG).

    Args:
        posteriors: Of the responses.
        noise: ``(G, N, M, Z)`` standard normal numbers.
        joint: Whether latents are one vector; if not, the KL of every dimension's marginal, summed, as published.

    Returns:
        ``(G,)`` nats.
    """
    latent = posteriors.draw(noise)
    prior = log_densities(latent, torch.zeros_like(latent), torch.zeros_like(latent))
    gap = _log_aggregate(latent, posteriors, joint=joint) - (prior.sum(-1) if joint else prior)
    return _mean_over((gap if joint else gap.sum(-1)).mean(-1), posteriors.mask)


def mutual_information(posteriors: Posteriors, noise: Tensor) -> Tensor:
    """Information I(y; z | x) that latents have about which of the N responses they belong to: ``(G,)`` nats.

    At most log N, and with the joint `density_gap` it sums to `mean_kl`: mean_k KL(q_k || p) = I + KL(q_bar || p).

    Args:
        posteriors: Of the responses.
        noise: ``(G, N, M, Z)`` standard normal numbers.
    """
    latent = posteriors.draw(noise)
    own = log_densities(latent, posteriors.mean[:, :, None], posteriors.log_var[:, :, None]).sum(-1)
    return _mean_over((own - _log_aggregate(latent, posteriors, joint=True)).mean(-1), posteriors.mask)


class Contrast(NamedTuple):
    """How well the likelihood tells each response's own latent from those of others."""

    loss: Tensor
    """``(R,)`` cross-entropy in nats; log C where latents make no difference."""
    correct: Tensor
    """``(R,)`` bool, the own latent gives more likelihood than every other."""
    gap: Tensor
    """``(R,)`` mean NLL under other latents minus that under the own, in nats; nan without others."""


def likelihood_contrast(nll: Tensor, mask: Tensor) -> Contrast:
    """Likelihood contrast, CLaP's L_con: which latent does a response belong to?

    An InfoNCE bound, I(y; z | x) >= log C - loss, whose critic is the likelihood itself. Always in float32: sums over
    tokens reach hundreds of nats.

    Args:
        nll: ``(R, C)`` negative log-likelihood of each response under candidate latents, its own first.
        mask: ``(R, C)`` bool, True = a candidate.
    """
    nll = nll.float()
    scores = (-nll).masked_fill(~mask, -torch.inf)
    loss = scores.logsumexp(-1) - scores[:, 0]
    others = mask[:, 1:]
    correct = (scores[:, :1] > scores[:, 1:]).all(-1) & others.any(-1)
    gap = torch.where(others, nll[:, 1:], 0.0).sum(-1) / others.sum(-1) - nll[:, 0]
    return Contrast(loss, correct, gap)


def candidates(mask: Tensor, group: Tensor, place: Tensor, num_negatives: int | None, order: Tensor) -> Tensor:
    """Choose whose latents each response is contrasted under: its own first, then others of its prompt.

    Args:
        mask: ``(G, N)`` bool, True = a response.
        group: ``(R,)`` int64 prompt of each response.
        place: ``(R,)`` int64 place of each among those of its prompt.
        num_negatives: How many others; None = all.
        order: ``(R, N)`` random numbers in [0, 1), the largest of which decide who.

    Returns:
        ``(R, C)`` int64 places; -1 where a prompt has fewer responses.
    """
    size = mask.shape[1]
    wanted = min(size, 1 + (size if num_negatives is None else num_negatives))
    rank = torch.where(mask[group], order, -1.0).scatter(1, place[:, None], 2.0)
    best, chosen = rank.topk(wanted, dim=1)
    return torch.where(best >= 0, chosen, -1)


def gradient_only(hidden: Tensor, skip: Tensor) -> Tensor:
    """Add ``skip`` to hidden states in the backward pass only (G-Skip): the value is ``hidden``, to the bit.

    Args:
        hidden: ``(n, D)``.
        skip: ``(n, D)``, which gets the gradient of ``hidden``.
    """
    return hidden + (skip - skip.detach()).to(hidden.dtype)


def _mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``(G, N)`` over the responses of each prompt: ``(G,)``."""
    return (values * mask).sum(-1) / mask.sum(-1)
