"""Latent DPO's maths against torch.distributions, sampling, loops and scikit-learn."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from plm.functional import bt_losses, kl_to_prior, unit_mean_per_user
from plm.methods.latent_dpo.families import FAMILIES, Variance
from plm.methods.latent_dpo.maths import (
    Gaussian,
    draw_latents,
    expected_bt_losses,
    gaussian,
    implicit_rewards,
    latent_rewards,
    log_density,
    product_of_experts,
    response_rewards,
    reward_logits,
)
from plm.methods.latent_dpo.newton import fit_means
from plm.methods.latent_dpo.noise import fold, mix, normals, row_keys
from plm.methods.latent_dpo.options import Options
from plm.methods.latent_dpo.rules import (
    POOLED,
    SAMPLED,
    Noise,
    RuleName,
    all_pairs_losses,
    closed_form_slopes,
    draw_pool,
    evidence_losses,
    marginal_preference_losses,
    preference_losses,
    response_losses,
    soft_losses,
    topk_losses,
)
from plm.methods.latent_dpo.training import mean_slopes, user_losses
from plm.methods.latent_dpo.user_pairs import Minibatch, pair_grades

BETA, PAIRS, WIDTH, DRAWS = 0.1, 5, 6, 4
RULES: tuple[RuleName, ...] = (
    "evidence",
    "all_pairs",
    "topk",
    "soft",
    "direct",
    "closed_form",
    "expectation",
    "newton",
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(*shape: int, seed: int = 0) -> Gaussian:
    return Gaussian(draw(*shape, seed=seed), 0.5 * draw(*shape, seed=seed + 100) - 0.5)


def normal(given: Gaussian) -> Normal:
    return Normal(given.mean, (0.5 * given.log_var).exp())


def noise(num_responses: int = 2) -> Noise:
    return Noise(draw(PAIRS, DRAWS, WIDTH, seed=3), draw(PAIRS, num_responses, DRAWS, WIDTH, seed=4))


def grades_of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).expand(PAIRS, -1)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


# ---------------------------------------------------------------------- numbers by counting
def test_mix_is_splitmix64() -> None:
    """The published stream of the seed 1234567, and the same arithmetic in integers without bounds."""
    stream = mix(torch.tensor(1234567) + torch.arange(1, 6) * (0x9E3779B97F4A7C15 - 2**64))
    assert [value % 2**64 for value in stream.tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    for value in (0, -1, 2**63 - 1, -(2**63), 123456789):
        bits = value % 2**64
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        assert mix(torch.tensor(value)).item() % 2**64 == bits ^ (bits >> 31)


def test_normals_are_normal_and_depend_on_their_key_alone() -> None:
    keys = fold(torch.arange(200), 7)
    drawn = normals(keys, 501)
    assert drawn.shape == (200, 501) and torch.equal(normals(keys[37], 501), drawn[37])
    size = drawn.numel() ** -0.5
    powers = [float(drawn.double().pow(power).mean()) for power in (1, 2, 3, 4)]
    for value, expected, variance in zip(powers, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(value - expected) < 4 * size * variance**0.5
    share = (drawn < 1).double().mean().item()
    assert share == pytest.approx(0.8413447, abs=4 * size * 0.366)
    together = torch.corrcoef(drawn.double()) - torch.eye(200)
    assert together.abs().max() < 5.5 * 501**-0.5  # of 20,000 correlations of independent rows
    assert (torch.corrcoef(torch.stack([drawn[:, 0], drawn[:, 250], drawn[:, 251]]).double()).triu(1)).abs().max() < 0.3


def test_keys_are_those_of_the_content() -> None:
    rows = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [1.0, 2.0, -0.0], [1.0, 2.0, 1e-30]])
    keys = row_keys(rows).tolist()
    assert keys[0] == keys[2] and len(set(keys)) == 3
    assert row_keys(rows.double()).tolist() == keys
    key = torch.tensor(5)
    assert fold(fold(key, 1), 2) != fold(fold(key, 2), 1) != fold(key, 3)


# ---------------------------------------------------------------------- Gaussians
def test_log_density_is_exact_for_sharp_posteriors() -> None:
    """The released code adds 1e-4 to twice the variance; at log-variance -8 that is 15 % of it."""
    given = some(PAIRS, WIDTH)
    given = given._replace(log_var=torch.cat([given.log_var[:, :-2], torch.tensor([-8.0, 4.0]).expand(PAIRS, 2)], 1))
    latent = given.mean[:, None] + draw(PAIRS, 7, WIDTH, seed=1)
    expected = normal(given.over(-2)).log_prob(latent).sum(-1)
    torch.testing.assert_close(log_density(latent, given), expected, rtol=1e-13, atol=1e-12)


def test_latents_are_split_and_clamped() -> None:
    found = gaussian(torch.tensor([1.0, 2.0, -9.0, 5.0]))
    assert found.mean.tolist() == [1, 2] and found.log_var.tolist() == [-8, 4]


def test_kl_and_implicit_rewards_equal_their_definitions() -> None:
    policy, prior = some(PAIRS, WIDTH), Gaussian(torch.zeros(WIDTH).double(), torch.zeros(WIDTH).double())
    torch.testing.assert_close(kl_to_prior(*policy), kl_divergence(normal(policy), normal(prior)))
    latent = draw(PAIRS, 7, WIDTH, seed=1)
    expected = log_density(latent, policy) - log_density(latent, prior)
    torch.testing.assert_close(implicit_rewards(latent, policy), expected)
    assert not implicit_rewards(latent, prior).any()


def test_response_rewards_equal_sampling() -> None:
    response, policy = some(3, WIDTH), some(3, WIDTH, seed=5)
    mean, variance = response_rewards(response, policy)
    sampled = implicit_rewards(draw_latents(response.over(-2), draw(3, 200_000, WIDTH, seed=2)), policy)
    assert ((sampled.mean(-1) - mean).abs() < 4 * (variance / 200_000) ** 0.5).all()
    torch.testing.assert_close(sampled.var(-1), variance, rtol=0.02, atol=0)


def test_expected_losses_equal_sampling_and_the_measured_number() -> None:
    """-0.86268 was measured for margins beta N(-3.1034, 1.951), with -0.86263 from sampling."""
    one = torch.ones(1).double()
    measured = expected_bt_losses(BETA * -3.1034 * one, BETA**2 * 1.951 * one, one)
    assert measured.item() == pytest.approx(0.86268, abs=5e-6)
    mean, variance, target = draw(4), 2 * draw(4, seed=1).square(), torch.tensor([1.0, 0.5, 0.0, 1.0]).double()
    sampled = bt_losses(mean[:, None] + variance.sqrt()[:, None] * draw(4, 400_000, seed=2), target[:, None])
    found = expected_bt_losses(mean, variance, target)
    assert ((sampled.mean(-1) - found).abs() < 4 * sampled.std(-1) / 400_000**0.5).all()


def test_closed_form_is_the_expectation_of_direct_for_unit_variance() -> None:
    policy = Gaussian(3 * draw(PAIRS, WIDTH), torch.zeros(PAIRS, WIDTH).double())
    responses = some(PAIRS, 2, WIDTH, seed=6)
    found = preference_losses("closed_form", policy, responses, grades_of(1, 0), None, BETA)
    many = Noise(draw(1), draw(PAIRS, 2, 100_000, WIDTH, seed=8))
    sampled = preference_losses("direct", policy, responses, grades_of(1, 0), many, BETA)
    torch.testing.assert_close(found, sampled, rtol=0, atol=4e-3)  # four standard errors of the sampling
    without = response_losses(BETA * implicit_rewards(responses.mean, policy), None, grades_of(1, 0))
    assert (found - without).abs().max() > 0.02


# ---------------------------------------------------------------------- latent rewards
def test_the_latent_reward_of_a_pair_is_a_sigmoid() -> None:
    responses, latent = some(PAIRS, 2, WIDTH), draw(PAIRS, 7, WIDTH, seed=2)
    first, second = (log_density(latent, Gaussian(*(part[:, k] for part in responses))) for k in (0, 1))
    torch.testing.assert_close(reward_logits(latent, responses, grades_of(1, 0)), first - second)
    torch.testing.assert_close(latent_rewards(latent, responses, grades_of(1, 0)), torch.sigmoid(first - second))
    tie = latent_rewards(latent, responses, grades_of(0.5, 0.5))
    torch.testing.assert_close(tie, torch.full_like(tie, 0.5))


def test_the_latent_reward_of_graded_responses_is_a_softmax() -> None:
    responses, latent, grades = some(PAIRS, 3, WIDTH), draw(PAIRS, 7, WIDTH, seed=2), grades_of(0.0, 0.3, 1.0)
    density = torch.stack([log_density(latent, Gaussian(*(part[:, k] for part in responses))) for k in range(3)], -1)
    expected = (torch.softmax(density, -1) * grades[:, None]).sum(-1)
    torch.testing.assert_close(latent_rewards(latent, responses, grades), expected)


def test_logits_order_latents_whose_rewards_have_rounded_to_one() -> None:
    responses = Gaussian(torch.tensor([[3.0], [-3.0]]), torch.full((2, 1), -2.0))
    latent = torch.tensor([[3.0], [4.0], [5.0]])
    assert latent_rewards(latent, responses, torch.tensor([1.0, 0.0])).tolist() == [1.0, 1.0, 1.0]
    assert reward_logits(latent, responses, torch.tensor([1.0, 0.0])).diff().min() > 1


# ---------------------------------------------------------------------- rules
def test_the_evidence_set_is_the_quantile_rule() -> None:
    """Over all ordered differences, ties at the threshold included; half of the unordered pairs are 576 of 1,128."""
    rewards = torch.sigmoid(3 * draw(3, 48))
    rewards[1] = rewards[1].round(decimals=1)  # many ties
    rewards[2] = rewards[2].round()
    fits = draw(3, 48, seed=1)
    for ratio in (0.5, 0.2, 1.0):
        found = evidence_losses(rewards, fits, ratio)
        for row in range(3):
            difference = rewards[row][:, None] - rewards[row][None, :]
            threshold = torch.quantile(difference.flatten(), 1 - ratio / 2)
            kept = [(i, j) for i, j in permutations(range(48), 2) if difference[i, j] >= threshold]
            assert row or ratio != 0.5 or len(kept) == 576
            losses = [softplus(float(fits[row, j] - fits[row, i])) for i, j in kept]
            assert found[row].item() == pytest.approx(np.mean(losses), abs=1e-12)


def test_all_pairs_topk_and_soft_equal_loops() -> None:
    logits, fits = draw(3, 12), draw(3, 12, seed=1)
    for row in range(3):
        fit, order = fits[row].tolist(), sorted(range(12), key=lambda i: -logits[row, i].item())
        every = [softplus(fit[worse] - fit[better]) for better, worse in combinations(order, 2)]
        assert all_pairs_losses(logits, fits)[row].item() == pytest.approx(np.mean(every), abs=1e-12)
        matched = [softplus(fit[order[-1 - rank]] - fit[order[rank]]) for rank in range(3)]
        assert topk_losses(logits, fits)[row].item() == pytest.approx(np.mean(matched), abs=1e-12)
        rewards = torch.sigmoid(logits[row]).tolist()
        soft = []
        for i, j in combinations(range(12), 2):
            label = 1 / (1 + math.exp(rewards[j] - rewards[i]))
            soft.append(label * softplus(fit[j] - fit[i]) + (1 - label) * softplus(fit[i] - fit[j]))
        assert soft_losses(torch.sigmoid(logits), fits)[row].item() == pytest.approx(np.mean(soft), abs=1e-12)


def test_the_pool_is_what_each_variant_draws() -> None:
    """Prior, or for topk the policy, and the posteriors; 48 latents for a pair and 16 draws each."""
    responses, policy, given = some(PAIRS, 2, WIDTH), some(PAIRS, WIDTH, seed=9), noise()
    pool = draw_pool(None, responses, given)
    assert pool.shape == (PAIRS, 3 * DRAWS, WIDTH) and torch.equal(pool[:, :DRAWS], given.prior)
    for k in (0, 1):
        scale = (0.5 * responses.log_var[:, k]).exp()[:, None]
        expected = responses.mean[:, k, None] + scale * given.posterior[:, k]
        torch.testing.assert_close(pool[:, (1 + k) * DRAWS : (2 + k) * DRAWS], expected)
    torch.testing.assert_close(
        draw_pool(policy, responses, given)[:, :DRAWS],
        policy.mean[:, None] + (0.5 * policy.log_var).exp()[:, None] * given.prior,
    )


@pytest.mark.parametrize("family", ["vector", "linear", "mlp"])
@pytest.mark.parametrize("variance", ["free", "unit", "fixed_entropy"])
def test_a_new_policy_is_the_prior_and_costs_ln_2(family: Any, variance: Variance) -> None:
    made = FAMILIES[family](WIDTH, 3, 4, variance)
    policy = made.policy(made.split(made.initial(0).double()[None]), draw(1, PAIRS, 3))
    policy = Gaussian(*(value[0] for value in policy))
    assert not policy.mean.any() and not policy.log_var.any() and not kl_to_prior(*policy).any()
    responses = some(PAIRS, 2, WIDTH)
    for rule in RULES:
        given = noise() if rule in SAMPLED else None
        for losses in (preference_losses, marginal_preference_losses) if rule in SAMPLED else (preference_losses,):
            found = losses(rule, policy, responses, grades_of(1, 0), given, BETA).expand(PAIRS)
            expected = torch.full_like(found, math.log(2))
            if rule == "expectation" and losses is preference_losses:
                expected = -latent_rewards(noise().prior, responses, grades_of(1, 0)).mean(-1)
            if rule != "expectation" or losses is preference_losses:
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_tie_orders_nothing() -> None:
    policy, responses, tie = some(PAIRS, WIDTH), some(PAIRS, 2, WIDTH, seed=5), grades_of(0.5, 0.5)
    swapped = Gaussian(*(value.flip(1) for value in responses))
    for rule in RULES:
        given = noise() if rule in SAMPLED else None
        mirrored = None if given is None else given._replace(posterior=given.posterior.flip(1))
        one = preference_losses(rule, policy, responses, tie, given, BETA)
        two = preference_losses(rule, policy, swapped, tie, mirrored, BETA)
        torch.testing.assert_close(one, two, msg=rule)
        if rule in POOLED and rule != "soft":
            assert not one.any()


def test_graded_responses_are_pairs_in_every_order_of_grades() -> None:
    """By sampling and in closed form; equal grades are half a win."""
    policy, responses, grades = some(PAIRS, WIDTH), some(PAIRS, 3, WIDTH, seed=5), grades_of(0.4, 1.0, 0.4)
    given = noise(3)
    for rule in ("direct", "closed_form", "newton"):
        total = torch.zeros(PAIRS).double()
        for i, j in combinations(range(3), 2):
            label = grades_of(0.5, 0.5) if grades[0, i] == grades[0, j] else grades_of(0, 1)
            label = label.flip(1) if grades[0, i] > grades[0, j] else label
            pair = Gaussian(*(value[:, [i, j]] for value in responses))
            some_noise = given._replace(posterior=given.posterior[:, [i, j]])
            total += preference_losses(rule, policy, pair, label, some_noise, BETA) / 3  # type: ignore[arg-type]
        found = preference_losses(rule, policy, responses, grades, given, BETA)  # type: ignore[arg-type]
        torch.testing.assert_close(found, total)


@pytest.mark.parametrize("rule", ["closed_form", "direct", "newton"])
def test_pairs_of_graded_responses_are_the_graded_loss(rule: RuleName) -> None:
    """Pairs as a file of ratings gives them, 2 / (K (K - 1)) each: prompts with 3 and with 2 responses count once."""
    policy, total, weights, losses = some(1, WIDTH), 0.0, [], []
    for size, grades in ((3, (0.4, 1.0, 0.4)), (2, (0.2, 0.9))):
        own = some(1, size, WIDTH, seed=size)
        given = Noise(draw(1, DRAWS, WIDTH), draw(1, size, DRAWS, WIDTH, seed=9))
        total += float(preference_losses(rule, policy, own, torch.tensor([grades]).double(), given, BETA)) / 2
        for i, j in combinations(range(size), 2):
            sides = [i, j] if grades[i] >= grades[j] else [j, i]
            pair = Gaussian(*(value[:, sides] for value in own))
            own_grades = pair_grades(torch.tensor([grades[i] == grades[j]]), pair.mean)
            noise_of = Noise(given.prior, given.posterior[:, sides])
            losses.append(preference_losses(rule, policy, pair, own_grades, noise_of, BETA))
            weights.append(2 / (size * (size - 1)))
    weight = unit_mean_per_user(torch.tensor(weights, dtype=torch.float64), torch.zeros(4).long(), 1)
    assert (weight * torch.cat(losses)).mean().item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("grades", [(1.0, 0.0), (0.5, 0.5), (0.4, 1.0, 0.4)])
def test_closed_form_slopes_are_the_derivative(grades: tuple[float, ...]) -> None:
    """Of the loss with unit variance, by autograd, and at one place by differences; weights and KL included."""
    responses, mean = some(PAIRS, len(grades), WIDTH, seed=5), (2.0 * draw(PAIRS, WIDTH)).requires_grad_()

    def losses(at: Tensor) -> Tensor:
        return preference_losses(
            "closed_form", Gaussian(at, torch.zeros_like(at)), responses, grades_of(*grades), None, BETA
        )

    found = closed_form_slopes(mean.detach(), responses, grades_of(*grades), BETA)
    (expected,) = torch.autograd.grad(losses(mean).sum(), mean)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    step = torch.zeros(WIDTH).double()
    step[1] = 1e-6
    with torch.no_grad():
        torch.testing.assert_close(found[:, 1], (losses(mean + step) - losses(mean - step)) / 2e-6, rtol=0, atol=1e-8)
    weight, key = draw(1, PAIRS).abs(), torch.zeros(1).long()
    batch = Minibatch(
        Gaussian(*(value[None] for value in responses)), grades_of(*grades)[None], weight, None, key, key, key
    )
    policy, options = Gaussian(mean[None], torch.zeros_like(mean)[None]), Options(kl_coef=0.3, beta=BETA)
    (expected,) = torch.autograd.grad(user_losses(policy, batch, options).sum(), mean)
    torch.testing.assert_close(mean_slopes(mean.detach()[None], batch, options)[0], expected, rtol=1e-9, atol=1e-12)


def test_marginal_rules_are_one_problem_per_dimension() -> None:
    policy, responses, given = some(PAIRS, WIDTH), some(PAIRS, 2, WIDTH, seed=5), noise()
    for rule in SAMPLED:
        total = torch.zeros(PAIRS).double()
        for d in range(WIDTH):
            total += preference_losses(
                rule,
                Gaussian(*(value[:, [d]] for value in policy)),
                Gaussian(*(value[:, :, [d]] for value in responses)),
                grades_of(1, 0),
                Noise(*(value[..., [d]] for value in given)),
                BETA,
            )
        found = marginal_preference_losses(rule, policy, responses, grades_of(1, 0), given, BETA)
        torch.testing.assert_close(found, total / WIDTH, msg=rule)


def test_expectation_maximises_reward_minus_kl() -> None:
    policy, responses, given = some(PAIRS, WIDTH), some(PAIRS, 2, WIDTH, seed=5), noise()
    drawn = policy.mean[:, None] + (0.5 * policy.log_var).exp()[:, None] * given.prior
    rewards = torch.sigmoid(
        log_density(drawn, Gaussian(*(part[:, 0] for part in responses)))
        - log_density(drawn, Gaussian(*(part[:, 1] for part in responses)))
    )
    prior = Gaussian(torch.zeros(WIDTH).double(), torch.zeros(WIDTH).double())
    expected = BETA * kl_divergence(normal(policy), normal(prior)).sum(-1) - rewards.mean(-1)
    torch.testing.assert_close(
        preference_losses("expectation", policy, responses, grades_of(1, 0), given, BETA), expected
    )


# ---------------------------------------------------------------------- points: logistic regression
def test_unit_variance_is_logistic_regression_on_latent_differences() -> None:
    policy = Gaussian(draw(PAIRS, WIDTH), torch.zeros(PAIRS, WIDTH).double())
    responses = some(PAIRS, 2, WIDTH, seed=5)
    margin = BETA * (policy.mean * (responses.mean[:, 0] - responses.mean[:, 1])).sum(-1)
    found = preference_losses("newton", policy, responses, grades_of(1, 0), None, BETA)
    torch.testing.assert_close(found, bt_losses(margin, torch.ones(PAIRS).double()))


def test_newton_finds_what_scikit_learn_finds() -> None:
    """Ridge = KL coefficient per pair; people of different sizes, with weights and ties."""
    sizes = torch.tensor([40, 0, 100, 7])
    user = torch.repeat_interleave(torch.arange(4), sizes)
    difference, kl_coef = draw(len(user), 32), 0.01
    difference[:, 0] += 1.5
    target = torch.where(torch.arange(len(user)) % 9 == 0, 0.5, 1.0).double()
    weight = torch.linspace(0.5, 1.5, len(user)).double()
    means = fit_means(difference, target, weight, user, 4, BETA, kl_coef)
    assert not means[1].any()
    for person in (0, 2, 3):
        mine = user == person
        x, share = BETA * difference[mine].numpy(), (weight[mine] / weight[mine].mean()).numpy()
        both, label = np.concatenate([x, x]), np.repeat([1, 0], len(x))
        counted = np.concatenate([share * target[mine].numpy(), share * (1 - target[mine].numpy())])
        keep = counted > 0
        peer = LogisticRegression(C=1 / (len(x) * kl_coef), fit_intercept=False, tol=1e-10, max_iter=1000)
        peer.fit(np.concatenate([both[keep], -both[keep]]), np.concatenate([label[keep], 1 - label[keep]]),
                 sample_weight=np.concatenate([counted[keep]] * 2) / 2)  # fmt: skip
        np.testing.assert_allclose(means[person], peer.coef_[0], atol=1e-5)
        # the stationary point of the stated objective
        mean = means[person].clone().requires_grad_()
        margin = BETA * (difference[mine] @ mean)
        loss = (torch.as_tensor(share) * bt_losses(margin, target[mine])).mean() + kl_coef / 2 * mean.square().sum()
        (slope,) = torch.autograd.grad(loss, mean)
        assert slope.abs().max() < 5e-9


# ---------------------------------------------------------------------- people together, and drawing
def test_a_mixture_has_the_mixed_implicit_reward() -> None:
    """Up to a constant, which is what makes it a density."""
    people, weights = some(3, WIDTH), torch.tensor([0.5, 0.3, 0.1]).double()
    mixed, latent = product_of_experts(people, weights), draw(9, WIDTH, seed=4)
    parts = sum(w * implicit_rewards(latent, Gaussian(*(v[a] for v in people))) for a, w in enumerate(weights))
    apart = implicit_rewards(latent, mixed) - parts
    torch.testing.assert_close(apart, apart[:1].expand(9))
    unit = people._replace(log_var=torch.zeros(3, WIDTH).double())
    mixed = product_of_experts(unit, weights)
    torch.testing.assert_close(mixed.mean, weights @ unit.mean)
    assert not mixed.log_var.any()
    with pytest.raises(ValueError, match="positive, got \\[-5"):
        product_of_experts(some(1, WIDTH)._replace(log_var=torch.full((1, WIDTH), -1.0).double()), -5 * weights[:1] * 2)


def test_latents_to_generate_from() -> None:
    policy, given = some(PAIRS, WIDTH), draw(PAIRS, WIDTH, seed=7)
    assert torch.equal(draw_latents(policy, given, 0.0), policy.mean)
    torch.testing.assert_close(
        draw_latents(policy, given, 2.0), normal(policy).mean + 2.0 * normal(policy).stddev * given
    )
    long = draw_latents(policy, given, 3.0)
    capped = draw_latents(policy, given, 3.0, max_norm=2.5)
    norm = long.norm(dim=-1) / WIDTH**0.5
    assert (norm > 2.5).any() and (norm < 2.5).any()
    torch.testing.assert_close(capped.norm(dim=-1) / WIDTH**0.5, norm.clamp_max(2.5))
    torch.testing.assert_close(torch.cosine_similarity(capped, long), torch.ones(PAIRS).double())
