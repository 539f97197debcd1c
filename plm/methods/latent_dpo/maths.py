"""Gaussians over the latent: densities, rewards of latents and of responses, and mixtures of users.

Everything follows from one quantity, the implicit reward ``h(z) = log p(z|x) - log N(z; 0, I)`` of a user's policy
``p(z|x) = N(mean, exp(log_var))`` (Zhang et al., arXiv 2412.20834; the algebra below is elementary). Per dimension

    h(z) = a z^2 + b z + c,  a = (1 - exp(-log_var)) / 2,  b = mean exp(-log_var),
                             c = -(log_var + mean^2 exp(-log_var)) / 2,

and its expectation under the policy is the KL to the prior, `plm.functional.kl_to_prior`.

Axes: Z latent width, K responses to one prompt, N latents, A users to mix.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from plm.functional import LOG_VAR_BOUNDS, bt_losses, log_densities

NUM_NODES = 16
"""Nodes of the Gauss-Hermite rule."""


@cache
def _rule(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, their shares, which add up to 1, and the products of both: ``(16,)`` each."""
    with torch.inference_mode(False):  # kept for whoever differentiates
        nodes, shares = map(torch.from_numpy, np.polynomial.hermite.hermgauss(NUM_NODES))
        shares = shares / math.sqrt(math.pi)
        return nodes.to(device, dtype), shares.to(device, dtype), (shares * nodes).to(device, dtype)


class Gaussian(NamedTuple):
    """Normal distributions with independent dimensions."""

    mean: Tensor
    """``(..., Z)``."""
    log_var: Tensor
    """``(..., Z)``."""

    def over(self, axis: int) -> Gaussian:
        """The same with a new axis, as for draws."""
        return Gaussian(self.mean.unsqueeze(axis), self.log_var.unsqueeze(axis))


def gaussian(latents: Tensor) -> Gaussian:
    """Mean and log-variance side by side, ``(..., 2Z)``, as a Gaussian with clamped log-variance."""
    mean, log_var = latents.chunk(2, -1)
    return Gaussian(mean, log_var.clamp(*LOG_VAR_BOUNDS))


def log_density(latent: Tensor, given: Gaussian) -> Tensor:
    """Exact log-density of latents: ``(..., N, Z)``, ``(..., Z)`` -> ``(..., N)`` nats.

    >>> log_density(torch.zeros(1, 2), Gaussian(torch.zeros(2), torch.zeros(2)))
    tensor([-1.8379])
    """
    return log_densities(latent, *given.over(-2)).sum(-1)


def _quadratic(policy: Gaussian) -> tuple[Tensor, Tensor, Tensor]:
    """``a``, ``b`` and ``c`` of the module docstring, ``(..., Z)`` each."""
    precision = (-policy.log_var).exp()
    linear = policy.mean * precision
    return 0.5 * (1.0 - precision), linear, -0.5 * (policy.log_var + policy.mean * linear)


def implicit_rewards(latent: Tensor, policy: Gaussian) -> Tensor:
    """Values of h at latents, zero for a policy at the prior: ``(..., N, Z)``, ``(..., Z)`` -> ``(..., N)``."""
    a, b, c = _quadratic(policy)
    curved = (latent.square() @ a[..., None]) + (latent @ b[..., None])
    return curved[..., 0] + c.sum(-1)[..., None]


def response_rewards(response: Gaussian, policy: Gaussian) -> tuple[Tensor, Tensor]:
    """Mean and variance of h(z) over the posterior z ~ N(m, s) of a response: ``(..., Z)`` each -> ``(...)`` each.

    ``E h = a (m^2 + s) + b m + c`` and, from ``Var z^2 = 4 m^2 s + 2 s^2`` and ``Cov(z^2, z) = 2 m s``,
    ``Var h = 2 a^2 s^2 + (2 a m + b)^2 s``, summed over dimensions.
    """
    a, b, c = _quadratic(policy)
    m, s = response.mean, response.log_var.exp()
    mean = (a * (m.square() + s) + b * m + c).sum(-1)
    variance = (2.0 * a.square() * s.square() + (2.0 * a * m + b).square() * s).sum(-1)
    return mean, variance


def expected_bt_losses(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """Expected Bradley-Terry loss of margins ~ N(mean, variance): ``(...)`` each -> ``(...)`` nats.

    ``E f(t) = pi^-1/2 sum_i w_i f(mean + (2 variance)^1/2 x_i)`` with the 16 nodes of Gauss and Hermite, accurate to
    1e-6 for margins with a standard deviation of up to 2 (Abramowitz & Stegun, 25.4.46).

    >>> round(expected_bt_losses(torch.tensor([-0.31034]), torch.tensor([0.01951]), torch.ones(1)).item(), 5)
    0.86268
    """
    margin, _ = _at_nodes(mean, variance)
    return bt_losses(margin, target[..., None]) @ _rule(mean.device, mean.dtype)[1]


def expected_bt_slopes(mean: Tensor, variance: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of `expected_bt_losses` with respect to mean and variance: ``(...)`` each -> ``(...)`` each.

    ``f'(t) = sigmoid(t) - target``; the shares add up to 1, and times the nodes to 0.

    >>> [round(value.item(), 4) for value in expected_bt_slopes(torch.zeros(1), torch.tensor([0.01]), torch.ones(1))]
    [-0.5, 0.1247]
    """
    margin, width = _at_nodes(mean, variance)
    wins = torch.sigmoid(margin)
    by_mean, by_width = ((wins * shares).sum(-1) for shares in _rule(mean.device, mean.dtype)[1:])
    return by_mean - target, by_width / width[..., 0]


def _at_nodes(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Margins at the nodes ``(..., 16)``, and what multiplies the nodes, ``(..., 1)``."""
    width = (2.0 * variance + 1e-12).sqrt()[..., None]  # the root of zero has no gradient
    return torch.addcmul(mean[..., None], width, _rule(mean.device, mean.dtype)[0]), width


def reward_logits(latent: Tensor, responses: Gaussian, grades: Tensor) -> Tensor:
    """Log-odds of the latent reward by self-normalised importance sampling over offline responses.

    The reward of a latent is that of the text it leads to, ``r(x, z) = E_{y ~ p(y|x,z)} r(x, y)``. Responses y_k were
    drawn from p(y|x), so they count by ``p(y_k|x,z) / p(y_k|x) = p(z|x,y_k) / p(z|x)`` (Bayes). With q for the true
    posterior and normalised weights, p(z|x) cancels: ``r = sum_k q_k(z) r_k / sum_k q_k(z)``, a softmax over
    log-densities. For grades in [0, 1] this is the sigmoid of
    ``logsumexp_k(log q_k + log r_k) - logsumexp_k(log q_k + log(1 - r_k))``, which orders latents where r itself has
    rounded to 0 or 1; for a pair with grades 1 and 0 it is ``log q_chosen(z) - log q_rejected(z)``.

    Args:
        latent: ``(..., N, Z)``.
        responses: Posteriors of the K responses to the prompt, ``(..., K, Z)``.
        grades: ``(..., K)`` in [0, 1].

    Returns:
        ``(..., N)``; minus or plus infinity where all grades are 0 or all 1.
    """
    density = _densities(latent, responses)
    good, bad = (torch.logsumexp(density + part.log()[..., None, :], -1) for part in (grades, 1.0 - grades))
    return good - bad


def latent_rewards(latent: Tensor, responses: Gaussian, rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """The latent reward r itself, of any rewards; for grades in [0, 1] the sigmoid of `reward_logits`.

    Args:
        latent: ``(..., N, Z)``.
        responses: Posteriors of the K responses, ``(..., K, Z)``.
        rewards: ``(..., K)``; leading axes that responses lack are of several rewards.
        mask: ``(..., K)`` bool, True = a response; None = all are.

    Returns:
        ``(..., N)``.
    """
    density = _densities(latent, responses)
    if mask is not None:
        density, rewards = density.masked_fill(~mask[..., None, :], -torch.inf), torch.where(mask, rewards, 0.0)
    return (density.softmax(-1) * rewards[..., None, :]).sum(-1)


def _densities(latent: Tensor, responses: Gaussian) -> Tensor:
    """Log-densities ``(..., N, K)`` of latents under the posteriors of responses."""
    rows = zip(responses.mean.unbind(-2), responses.log_var.unbind(-2), strict=True)
    return torch.stack([log_density(latent, Gaussian(mean, log_var)) for mean, log_var in rows], -1)


def product_of_experts(policies: Gaussian, weights: Tensor) -> Gaussian:
    """Mix users into the policy with the implicit reward ``sum_a w_a h_a``.

    Takes policies ``(A, ..., Z)`` and weights ``(A,)``, or ``(A, ...)`` that differ by place, and gives ``(..., Z)``.

    ``prior * prod_a (policy_a / prior)^weights_a`` is normal with precision ``1 + sum_a w_a (precision_a - 1)`` and
    precision times mean ``sum_a w_a precision_a mean_a``; with unit variances its mean is ``sum_a w_a mean_a``.

    Raises:
        ValueError: If the weights leave no positive precision, so that there is no such policy.
    """
    weights = weights.reshape(*weights.shape, *[1] * (policies.mean.dim() - weights.dim()))
    precisions = (-policies.log_var).exp()
    precision = 1.0 + (weights * (precisions - 1.0)).sum(0)
    if (precision <= 0).any():
        raise ValueError(
            f"expected weights under which the mixed precision is positive, got {weights.flatten().tolist()!r} with a "
            f"precision down to {precision.min().item():.3g}; non-negative weights that sum to at most 1 always work"
        )
    return Gaussian((weights * precisions * policies.mean).sum(0) / precision, -precision.log())


def draw_latents(
    policy: Gaussian, noise: Tensor, temperature: float | Tensor = 1.0, max_norm: float | None = None
) -> Tensor:
    """Latents to generate from: ``(..., Z)``, standard normal ``(..., Z)`` -> ``(..., Z)``.

    Args:
        policy: Where to draw.
        noise: Standard normal numbers.
        temperature: What the standard deviation is multiplied by; 0 = the mean, as published for personal policies.
        max_norm: Longest latent in units of sqrt(Z), the typical length under the prior, beyond which the decoder of
            latents was not trained; longer ones are shortened. None = no bound.
    """
    latent: Tensor = policy.mean + temperature * (0.5 * policy.log_var).exp() * noise
    if max_norm is None:
        return latent
    norm: Tensor = torch.linalg.vector_norm(latent, dim=-1, keepdim=True) / latent.shape[-1] ** 0.5
    return latent * norm.clamp_min(max_norm).reciprocal() * max_norm
