"""Whether latents lead to what their latent reward promises: ranks, and posteriors that the model agrees with."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.latent_validity import advantages, evidence_bounds, rank_correlations, to_the_power, validity
from plm.methods.latent_dpo.maths import Gaussian, latent_rewards


def test_latent_rewards_of_prompts_with_few_responses() -> None:
    """Padding counts for nothing, whatever it holds; rewards may be any numbers."""
    torch.manual_seed(0)
    responses, latent = Gaussian(torch.randn(5, 4, 3), torch.randn(5, 4, 3)), torch.randn(5, 6, 3)
    rewards, mask = 10 * torch.randn(5, 4), torch.arange(4).expand(5, 4) < torch.tensor([4, 3, 2, 1, 4])[:, None]
    found = latent_rewards(latent, responses, rewards.masked_fill(~mask, torch.nan), mask)
    for row, size in enumerate(mask.sum(1).tolist()):
        normal = torch.distributions.Normal(responses.mean[row, :size], (0.5 * responses.log_var[row, :size]).exp())
        density = normal.log_prob(latent[row][:, None]).sum(-1).exp()
        torch.testing.assert_close(found[row], (density @ rewards[row, :size]) / density.sum(1))
    several = latent_rewards(
        latent[0], Gaussian(*(part[0] for part in responses)), torch.stack([rewards[0], -rewards[0]])
    )
    torch.testing.assert_close(several, torch.stack([found[0], -found[0]]))


def test_the_evidence_prefers_the_power_that_gives_the_posterior_of_the_model() -> None:
    """A response is its latent and noise, so that posterior and evidence are known; q is far too narrow."""
    generator = torch.Generator().manual_seed(0)
    noise, planted, powers = 0.7, 1 / 16, [1.0, 1 / 4, 1 / 16, 1 / 64, 0.0]
    text = math.sqrt(1 + noise**2) * torch.randn(400, 3, generator=generator, dtype=torch.double)
    variance = torch.full_like(text, noise**2 / (1 + noise**2))
    exact = Gaussian(text * variance / noise**2, variance.log())
    given = to_the_power(exact, 1 / planted)
    for found, wanted in zip(to_the_power(given, planted), exact, strict=True):
        torch.testing.assert_close(found, wanted)
    draws = torch.randn(64, 400, 3, generator=generator, dtype=torch.double)
    likelihood = torch.distributions.Normal(text, noise)  # symmetric in text and latent
    bounds = evidence_bounds(given, powers, lambda latent: likelihood.log_prob(latent).sum(-1), draws)
    evidence = torch.distributions.Normal(0.0, math.sqrt(1 + noise**2)).log_prob(text).sum(-1).mean()
    assert bounds[2].item() == pytest.approx(evidence.item(), abs=0.02)
    assert bounds.argmax() == 2
    gap = torch.distributions.kl_divergence(
        *(torch.distributions.Normal(mean, (log_var / 2).exp()) for mean, log_var in (given, exact))
    )
    assert (evidence - bounds[0]).item() == pytest.approx(gap.sum(-1).mean().item(), abs=0.02)


def test_a_power_is_one_of_densities() -> None:
    """p (q / p)^a, up to a factor that is the same for all latents and makes it a density."""
    torch.manual_seed(0)
    given, latent = Gaussian(torch.randn(5, 3), torch.randn(5, 3)), torch.randn(40, 5, 3)
    own = torch.distributions.Normal(given.mean, (0.5 * given.log_var).exp()).log_prob(latent)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(latent)
    for power in (0.0, 0.3, 1.0):
        mean, log_var = to_the_power(given, power)
        found = torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(latent)
        rest = found - prior - power * (own - prior)
        torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=0, atol=1e-4)


def test_advantages_are_over_the_other_responses() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 7.0, torch.nan], [9.0, torch.nan, torch.nan]])
    mask = rewards.isfinite()
    expected = torch.tensor([[-3.0, -1.5, 4.5], [-2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(advantages(rewards, mask), expected)
    both = advantages(torch.stack([rewards, -rewards], -1), mask)
    torch.testing.assert_close(both, torch.stack([expected, -expected], -1))


def test_ranks_are_those_of_scipy() -> None:
    from scipy.stats import spearmanr

    first, second = torch.randn(4, 9), torch.randint(0, 4, (4, 9)).float()
    expected = [spearmanr(a.numpy(), b.numpy()).statistic for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(rank_correlations(first, second), torch.tensor(expected, dtype=torch.double))


def test_the_interval_of_rank_correlations() -> None:
    noisy = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    close = noisy + torch.randn(300, 12, generator=torch.Generator().manual_seed(1))
    result = validity(noisy, close)
    rho, count = 0.5**0.5, 12  # Moran 1948: the expectation of Spearman's correlation of n normal pairs
    expected_rank = 6 / (math.pi * (count + 1)) * (math.asin(rho) + (count - 2) * math.asin(rho / 2))
    assert result.low < expected_rank < result.high and result.num_prompts == 300
    assert validity(noisy, torch.zeros(300, 12)).num_prompts == 0
    both = validity(torch.stack([noisy, noisy], 1), torch.stack([close, -close], 1))  # one that holds, one turned round
    assert both.correlation == pytest.approx(0, abs=1e-9) and both.num_prompts == 300
