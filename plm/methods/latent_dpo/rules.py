"""Rules that turn a preference pair into a loss of a policy over latents.

Rules that sample compare latents of a pool by their latent reward r, see `plm.methods.latent_dpo.maths.reward_logits`,
and fit ``sigmoid(beta (h_i - h_j))`` to the outcome, where h is the implicit reward of the policy. The others compare
the responses themselves. Every loss is ``ln 2`` for a policy at the prior, except that of `expectation`.

Axes: K responses to one prompt, S draws per source, N latents in a pool, Z latent width. Leading axes are pairs; each
pair has a loss.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from plm.functional import bt_losses, kl_to_prior
from plm.methods.latent_dpo.maths import (
    Gaussian,
    draw_latents,
    expected_bt_losses,
    expected_bt_slopes,
    implicit_rewards,
    latent_rewards,
    response_rewards,
    reward_logits,
)

RuleName = Literal["evidence", "all_pairs", "topk", "soft", "direct", "closed_form", "expectation", "newton"]
POOLED: frozenset[RuleName] = frozenset({"evidence", "all_pairs", "topk", "soft"})
"""Rules that compare latents of a pool."""
SAMPLED: frozenset[RuleName] = POOLED | {"direct", "expectation"}
"""Rules that draw latents."""


class Noise(NamedTuple):
    """Standard normal numbers."""

    prior: Tensor
    """``(..., S, Z)`` for what is drawn from the prior or the policy."""
    posterior: Tensor
    """``(..., K, S, Z)`` for what is drawn from the posteriors of the responses."""


def preference_losses(
    rule: RuleName,
    policy: Gaussian,
    responses: Gaussian,
    grades: Tensor,
    noise: Noise | None,
    beta: float,
    evidence_ratio: float = 0.5,
) -> Tensor:
    """Loss of each pair under one of the rules.

    Args:
        rule: Which; `newton` is that of posterior means, which `plm.methods.latent_dpo.newton` solves exactly.
        policy: At the prompt of each pair, ``(..., Z)``.
        responses: Posteriors, ``(..., K, Z)``: chosen and rejected, or K graded ones.
        grades: ``(..., K)`` in [0, 1]: 1 and 0 for a pair, one half for both at a tie.
        noise: For rules that sample.
        beta: Strength of the KL term that DPO implies.
        evidence_ratio: Share of unordered pairs kept by `evidence`.

    Returns:
        ``(...)``. A tie orders nothing: it costs nothing under `evidence`, `all_pairs` and `topk`.
    """
    if rule == "newton":
        return response_losses(beta * implicit_rewards(responses.mean, policy), None, grades)
    if rule == "closed_form":
        mean, variance = response_rewards(responses, policy.over(-2))
        return response_losses(beta * mean, beta**2 * variance, grades)
    assert noise is not None
    if rule == "expectation":
        drawn = draw_latents(policy.over(-2), noise.prior)
        return beta * kl_to_prior(*policy).sum(-1) - latent_rewards(drawn, responses, grades).mean(-1)
    if rule == "direct":
        drawn = draw_latents(responses.over(-2), noise.posterior)
        fits = beta * implicit_rewards(drawn.flatten(-3, -2), policy)
        draws = fits.reshape(drawn.shape[:-1]).transpose(-1, -2)  # (..., S, K)
        return response_losses(draws, None, grades[..., None, :].expand_as(draws)).mean(-1)
    with torch.no_grad():
        pool = draw_pool(policy if rule == "topk" else None, responses, noise)
        logits = reward_logits(pool, responses, grades)
    fits = beta * implicit_rewards(pool, policy)
    if rule == "soft":
        return soft_losses(torch.sigmoid(logits), fits)
    ordered = (grades.amax(-1) > grades.amin(-1)).to(fits)
    if rule == "evidence":
        return ordered * evidence_losses(torch.sigmoid(logits), fits, evidence_ratio)
    return ordered * (all_pairs_losses(logits, fits) if rule == "all_pairs" else topk_losses(logits, fits))


def marginal_preference_losses(
    rule: RuleName,
    policy: Gaussian,
    responses: Gaussian,
    grades: Tensor,
    noise: Noise | None,
    beta: float,
    evidence_ratio: float = 0.5,
) -> Tensor:
    """`preference_losses` of every latent dimension as a problem of its own, averaged over dimensions."""
    policy = policy.over(-1)  # (..., Z, 1)
    responses = Gaussian(*(value.transpose(-1, -2)[..., None] for value in responses))  # (..., Z, K, 1)
    if noise is not None:
        noise = Noise(*(value.movedim(-1, place)[..., None] for value, place in zip(noise, (-2, -3), strict=True)))
    return preference_losses(rule, policy, responses, grades[..., None, :], noise, beta, evidence_ratio).mean(-1)


def draw_pool(policy: Gaussian | None, responses: Gaussian, noise: Noise) -> Tensor:
    """S draws of the prior, or of ``policy``, and S of each posterior: ``(..., N, Z)`` with N = S (1 + K)."""
    first = noise.prior if policy is None else draw_latents(policy.over(-2), noise.prior)
    others = draw_latents(responses.over(-2), noise.posterior).flatten(-3, -2)
    return torch.cat([first.expand(*others.shape[:-2], *first.shape[-2:]), others], -2)


def evidence_losses(reward: Tensor, fits: Tensor, ratio: float) -> Tensor:
    """Released variant A: ordered pairs of latents whose reward differs most: ``(..., N)`` each -> ``(...)``.

    Kept is a pair (i, j), i != j, if ``r_i - r_j`` reaches the ``1 - ratio / 2`` quantile of all N x N differences,
    ties included. None lies between the order statistics around a quantile, so that the upper one serves as well.
    """
    difference = reward[..., :, None] - reward[..., None, :]
    num = difference.shape[-1]
    rank = math.ceil((1.0 - ratio / 2.0) * (num * num - 1) - 1e-9) + 1
    threshold = difference.flatten(-2).kthvalue(rank).values[..., None, None]
    chosen = (difference >= threshold) & ~torch.eye(num, dtype=torch.bool, device=reward.device)
    losses = torch.nn.functional.softplus(fits[..., None, :] - fits[..., :, None])
    return (losses * chosen).sum((-2, -1)) / chosen.sum((-2, -1)).clamp_min(1)


def all_pairs_losses(logits: Tensor, fits: Tensor) -> Tensor:
    """Released variant B: every unordered pair of latents, oriented by reward: ``(..., N)`` each -> ``(...)``."""
    best_first = fits.gather(-1, logits.argsort(dim=-1, descending=True, stable=True))
    first, second = _unordered(fits)
    return torch.nn.functional.softplus(best_first[..., second] - best_first[..., first]).mean(-1)


def topk_losses(logits: Tensor, fits: Tensor) -> Tensor:
    """Released variant C: the best quarter against the worst, best with worst: ``(..., N)`` each -> ``(...)``."""
    best_first = fits.gather(-1, logits.argsort(dim=-1, descending=True, stable=True))
    quarter = max(fits.shape[-1] // 4, 1)
    return torch.nn.functional.softplus(best_first[..., -quarter:].flip(-1) - best_first[..., :quarter]).mean(-1)


def soft_losses(reward: Tensor, fits: Tensor) -> Tensor:
    """Every unordered pair with the label ``sigmoid(r_i - r_j)``, at most 0.73: ``(..., N)`` each -> ``(...)``.

    Unlike a hard label, a soft one is reached by a finite policy, which stays where the decoder was trained.
    """
    first, second = _unordered(fits)
    target = torch.sigmoid(reward[..., first] - reward[..., second])
    return bt_losses(fits[..., first] - fits[..., second], target).mean(-1)


def response_losses(fits: Tensor, variance: Tensor | None, grades: Tensor) -> Tensor:
    """Unordered pairs of responses, the higher grade wins, a tie is half a win: ``(..., K)`` each -> ``(...)``.

    With ``variance`` the expected loss of normal margins whose means differ by ``fits``.
    """
    first, second = _unordered(fits)
    target = _outcomes(grades)
    margin = fits[..., first] - fits[..., second]
    if variance is None:
        return bt_losses(margin, target).mean(-1)
    return expected_bt_losses(margin, variance[..., first] + variance[..., second], target).mean(-1)


def closed_form_slopes(mean: Tensor, responses: Gaussian, grades: Tensor, beta: float) -> Tensor:
    """Gradient of the loss of each pair under `closed_form` with respect to the mean of a policy with unit variance.

    h is linear then, so that the margin of responses i and j has the mean ``beta mean . (m_i - m_j)`` and the variance
    ``beta^2 mean^2 . (s_i + s_j)``.

    Args:
        mean: ``(..., Z)``.
        responses: ``(..., K, Z)``.
        grades: ``(..., K)`` in [0, 1].
        beta: Strength of the KL term that DPO implies.

    Returns:
        ``(..., Z)``, the same as by automatic differentiation, in a quarter of its steps.
    """
    first, second = _unordered(grades)
    spread = responses.log_var.exp()
    between = beta * (responses.mean[..., first, :] - responses.mean[..., second, :])  # (..., K (K - 1) / 2, Z)
    around = beta**2 * (spread[..., first, :] + spread[..., second, :])
    at = mean[..., None, :]
    by_mean, by_variance = expected_bt_slopes((between * at).sum(-1), (around * at.square()).sum(-1), _outcomes(grades))
    slopes = by_mean[..., None] * between + (2.0 * by_variance)[..., None] * around * at
    return slopes.mean(-2)


def _outcomes(grades: Tensor) -> Tensor:
    """Probability that the first wins, of all unordered pairs: ``(..., K)`` -> ``(..., K (K - 1) / 2)``."""
    first, second = _unordered(grades)
    return 0.5 + 0.5 * (grades[..., first] - grades[..., second]).sign()


def _unordered(values: Tensor) -> tuple[Tensor | slice, Tensor | slice]:
    """``N (N - 1) / 2`` indices each of the pairs i < j of ``(..., N)`` values; of two, slices, which copy nothing."""
    size = values.shape[-1]
    if size == 2:
        return slice(0, 1), slice(1, 2)
    first, second = torch.triu_indices(size, size, offset=1, device=values.device)
    return first, second
