"""Networks of VPL: pair encoder, set encoders, decoders, and the small maths of its bound.

Axes: N pairs, B responses, T target pairs, U users or episodes, S context pairs of one user (padded), M posterior
samples, D feature width, H hidden width, Z latent width, P prepared width.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from plm.functional import bt_losses, per_user_sum

SLOPE = 0.2
"""Slope of LeakyReLU, as published."""

Bounds = Literal["smooth", "clamp"]
Anneal = Literal["none", "linear", "cosine", "logistic"]


# ---------------------------------------------------------------------- maths
class Gaussian(NamedTuple):
    """Diagonal normal distributions over the latent."""

    mean: Tensor
    """``(U, Z)``."""
    log_var: Tensor
    """``(U, Z)``."""

    def sample(self, num_samples: int) -> Tensor:
        """``(U, M, Z)`` reparametrised draws."""
        shape = (len(self.mean), num_samples, self.mean.shape[-1])
        noise = torch.randn(shape, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean[:, None] + (0.5 * self.log_var).exp()[:, None] * noise


def target_bound(margin: Tensor, target: Tensor, weight: Tensor, user: Tensor, num_users: int) -> Tensor:
    """Negative log of the mean likelihood over samples of all targets of each user: ``(T, M)`` -> ``(U,)``.

    ``-log 1/M sum_m prod_t p(y_t | z_m)``. With one sample it is the summed Bradley-Terry loss of the paper; with more
    it is a tighter bound (Burda et al. 2016), whose optimum is the posterior that predicts all targets jointly best.

    >>> target_bound(torch.zeros(2, 3), torch.ones(2), torch.ones(2), torch.tensor([0, 0]), 1)
    tensor([1.3863])
    """
    losses = per_user_sum(bt_losses(margin, target[:, None]) * weight[:, None], user, num_users)
    return math.log(margin.shape[1]) - torch.logsumexp(-losses, -1)


def bounded(value: Tensor, low: float, high: float, bounds: Bounds) -> Tensor:
    """Keep a value inside ``[low, high]``: cut off, or smoothly, so that a gradient is left everywhere.

    The smooth bound has slope one at zero when zero is the middle.

    >>> bounded(torch.tensor([-9.0, 0.5]), -1.0, 1.0, "clamp").tolist()
    [-1.0, 0.5]
    """
    if bounds == "clamp":
        return value.clamp(low, high)
    half = (high - low) / 2
    return low + half + half * torch.tanh(value / half)


def on_sphere(latent: Tensor) -> Tensor:
    """Project ``(..., Z)`` to the sphere of radius ``sqrt(Z)``.

    >>> on_sphere(torch.tensor([3.0, 4.0])).square().sum().item()
    2.0
    """
    return F.normalize(latent, dim=-1) * math.sqrt(latent.shape[-1])


def anneal_factor(step: int, num_steps: int, shape: Anneal, cyclical: bool) -> float:
    """Share of the KL weight at an optimizer step: from 0.1 to 1 over ``num_steps``.

    >>> [round(anneal_factor(t, 10_000, "cosine", True), 3) for t in (0, 2500, 5000, 9999, 10_000)]
    [0.1, 0.232, 0.55, 1.0, 0.1]
    """
    if shape == "none":
        return 1.0
    progress = (step % num_steps if cyclical else min(step, num_steps)) / num_steps
    if shape == "cosine":
        progress = (1 + math.cos(math.pi * (progress - 1))) / 2
    elif shape == "logistic":
        progress = 1 / (1 + math.exp(-10 * (progress - 0.5)))
    return 0.1 + 0.9 * progress


def warn_of_short_annealing(num_steps: float, anneal_steps: int, shape: Anneal, kl_weight: float) -> None:
    """Warn where a fit of ``num_steps`` optimizer steps ends before the KL weight is reached."""
    if kl_weight > 0 and shape != "none" and num_steps < anneal_steps:
        share = anneal_factor(int(num_steps), anneal_steps, shape, cyclical=False)
        rank_zero_warn(
            f"the KL weight ends at {share:.2f} of model.kl_weight: it grows over {anneal_steps:,} optimizer steps "
            f"(model.anneal_steps), and the fit takes {num_steps:,.0f}; raise trainer.max_epochs, set data.batch_size "
            "for more steps in an epoch, or lower model.anneal_steps"
        )


def swap_guide(posterior: Gaussian, swapped: Gaussian) -> Tensor:
    """Measure how far swapped pairs are from opposite mean and equal spread (SPL): 0 at best, 1.1 at worst, ``()``."""
    mean = 0.5 * (1 + F.cosine_similarity(posterior.mean, swapped.mean, dim=-1))
    spread = 0.5 * (1 - F.cosine_similarity(posterior.log_var, swapped.log_var, dim=-1))
    return (mean + 0.1 * spread).mean()


# ---------------------------------------------------------------------- encoder
class PairTokens(NamedTuple):
    """What the set encoder reads of each pair."""

    direction: Tensor
    """``(N, H)`` what the pair says; changes sign when it is swapped, unless features are concatenated."""
    strength: Tensor
    """``(N, H)`` how much it says; the same for the swapped pair, unless features are concatenated."""


class PairEncoder(nn.Module):
    """Pairs to tokens.

    Args:
        feature_dim: Width D.
        hidden_dim: Width H.
        odd_even: True = one network reads each response and the token is difference and sum of its outputs; False =
            one network reads both responses side by side, as published.
    """

    def __init__(self, feature_dim: int, hidden_dim: int, odd_even: bool) -> None:
        super().__init__()
        self.odd_even = odd_even
        self.net = nn.Sequential(
            nn.Linear(feature_dim if odd_even else 2 * feature_dim, hidden_dim),
            nn.LeakyReLU(SLOPE),
            nn.Linear(hidden_dim, hidden_dim),
            nn.LeakyReLU(SLOPE),
        )

    def forward(self, chosen: Tensor, rejected: Tensor, target: Tensor) -> PairTokens:
        """``(N, D)``, ``(N, D)``, ``(N,)`` probability that chosen wins -> tokens; a tie is half of each order."""
        if self.odd_even:
            one, two = self.net(chosen), self.net(rejected)
            return PairTokens((one - two) * (2 * target - 1)[:, None], one + two)
        token = self.net(torch.cat([chosen, rejected], -1))
        tie = target < 1
        if tie.any():
            other = self.net(torch.cat([rejected[tie], chosen[tie]], -1))
            share = target[tie, None]
            token = token.index_put((tie.nonzero()[:, 0],), share * token[tie] + (1 - share) * other)
        return PairTokens(token, token)


class ProductPosterior(nn.Module):
    """Every pair adds its evidence: precisions add up, so that the variance falls with every pair.

    With ``gain_s >= 0`` and ``vote_s`` read off pair s, ``precision = 1 + sum_s gain_s`` and
    ``mean = sum_s gain_s * vote_s / precision``: a product of normal experts with the standard normal prior.
    """

    limit = 4.0

    def __init__(self, hidden_dim: int, latent_dim: int, odd_even: bool, bounds: Bounds) -> None:
        super().__init__()
        self.bounds: Bounds = bounds
        self.vote = nn.Linear(hidden_dim, latent_dim, bias=not odd_even)
        self.gain = nn.Linear(hidden_dim, latent_dim)
        nn.init.zeros_(self.gain.weight)
        nn.init.constant_(self.gain.bias, -2.0)

    def forward(self, tokens: PairTokens, weight: Tensor, user: Tensor, num_users: int) -> Gaussian:
        """Tokens ``(N, H)``, ``(N,)`` weights, ``(N,)`` rows of users -> posteriors of U users."""
        gain = F.softplus(self.gain(tokens.strength)) * weight[:, None]
        vote = bounded(self.vote(tokens.direction), -self.limit, self.limit, self.bounds).to(gain.dtype)  # autocast
        zeros = vote.new_zeros(num_users, vote.shape[-1])
        precision = 1.0 + zeros.index_add(0, user, gain)
        return Gaussian(zeros.index_add(0, user, gain * vote) / precision, -precision.log())


class AttentionPosterior(nn.Module):
    """Single-head self-attention over the pairs of each user, padded and masked, averaged; two linear heads.

    Averaging the outputs over queries is averaging the attention over queries first, which is all that is computed.
    """

    def __init__(self, hidden_dim: int, latent_dim: int, odd_even: bool, bounds: Bounds) -> None:
        super().__init__()
        self.bounds: Bounds = bounds
        self.token = nn.Linear(hidden_dim, latent_dim, bias=not odd_even)
        self.strength = nn.Linear(hidden_dim, latent_dim) if odd_even else self.token
        self.query, self.key = nn.Linear(latent_dim, latent_dim), nn.Linear(latent_dim, latent_dim)
        self.value = nn.Linear(latent_dim, latent_dim, bias=not odd_even)
        self.spread = nn.Linear(latent_dim, latent_dim) if odd_even else self.value
        self.mean = nn.Linear(latent_dim, latent_dim, bias=not odd_even)
        self.log_var = nn.Linear(latent_dim, latent_dim)

    def forward(self, tokens: PairTokens, weight: Tensor, user: Tensor, num_users: int) -> Gaussian:
        """Tokens ``(N, H)``, ``(N,)`` weights, ``(N,)`` rows of users -> posteriors of U users; no pairs: the prior."""
        count = torch.bincount(user, minlength=num_users)
        size = count.clamp_min(1).double().log2().ceil()  # users of about equally many pairs share a padded product
        mean, log_var = (weight.new_zeros(num_users, self.mean.out_features) for _ in range(2))
        for value in torch.unique(size):
            users = (size == value).nonzero()[:, 0]
            place = torch.full_like(count, -1).index_put((users,), torch.arange(len(users), device=users.device))
            rows = (place[user] >= 0).nonzero()[:, 0]
            part = PairTokens(tokens.direction[rows], tokens.strength[rows])
            posterior = self._padded(part, weight[rows], place[user[rows]], len(users))
            mean = mean.index_put((users,), posterior.mean.to(mean))
            log_var = log_var.index_put((users,), posterior.log_var.to(log_var))
        return Gaussian(mean, log_var)

    def _padded(self, tokens: PairTokens, weight: Tensor, user: Tensor, num_users: int) -> Gaussian:
        """The same for users who are padded to the longest."""
        count = torch.bincount(user, minlength=num_users)
        order = torch.argsort(user, stable=True)
        mask = torch.arange(max(int(count.max()), 1), device=user.device) < count[:, None]  # (U, S)

        def pad(flat: Tensor) -> Tensor:
            return flat.new_zeros(*mask.shape, *flat.shape[1:]).index_put(mask.nonzero().unbind(-1), flat[order])

        direction, strength = pad(self.token(tokens.direction)), pad(self.strength(tokens.strength))
        share = pooled_attention(self.query(strength), self.key(strength), mask) * pad(weight)
        share = share / share.sum(-1, keepdim=True).clamp_min(1e-12)
        direction = torch.einsum("us,usz->uz", share, self.value(direction))
        strength = torch.einsum("us,usz->uz", share, self.spread(strength))
        limits = (1.0, -1.0, 1.0) if self.bounds == "clamp" else (3.0, -6.0, 2.0)
        mean = bounded(self.mean(direction), -limits[0], limits[0], self.bounds)
        log_var = bounded(self.log_var(strength), *limits[1:], self.bounds)
        has_pairs = (count > 0)[:, None]
        return Gaussian(mean * has_pairs, log_var * has_pairs)


def pooled_attention(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Attention of each pair, averaged over the queries of its user: ``(U, S, Z)`` twice, ``(U, S)`` -> ``(U, S)``.

    Rows sum to one; padding gets zero, and so does everything of a user without pairs.
    """
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~mask[:, None], -torch.finfo(scores.dtype).max)
    share = torch.softmax(scores, -1) * mask[:, :, None] * mask[:, None]
    return share.sum(1) / mask.sum(-1, keepdim=True).clamp_min(1)


# ---------------------------------------------------------------------- decoder
class BilinearDecoder(nn.Module):
    """``reward = population @ x + z @ bases @ x``: what is not in the population's direction has to go through z."""

    def __init__(self, feature_dim: int, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.population = nn.Parameter(torch.zeros(feature_dim))
        self.bases = nn.Parameter(torch.randn(latent_dim, feature_dim) * 0.3 / math.sqrt(feature_dim))

    def prepare(self, responses: Tensor) -> Tensor:
        """The part without z: ``(B, D)`` -> ``(B, P)``."""
        return torch.cat([(responses @ self.population)[:, None], responses @ self.bases.T], -1)

    def reward(self, prepared: Tensor, latent: Tensor) -> Tensor:
        """``(..., P)``, ``(..., Z)`` -> ``(...)``."""
        return prepared[..., 0] + (prepared[..., 1:] * latent).sum(-1)


class FilmDecoder(nn.Module):
    """Hidden units that z scales and shifts before the nonlinearity (FiLM), plus a linear path, `BilinearDecoder`."""

    def __init__(self, feature_dim: int, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.linear = BilinearDecoder(feature_dim, hidden_dim, latent_dim)
        self.hidden = nn.Linear(feature_dim, hidden_dim)
        self.modulation = nn.Linear(latent_dim, 2 * hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, 1, bias=False)

    def prepare(self, responses: Tensor) -> Tensor:
        """The part without z: ``(B, D)`` -> ``(B, P)``."""
        return torch.cat([self.hidden(responses), self.linear.prepare(responses)], -1)

    def reward(self, prepared: Tensor, latent: Tensor) -> Tensor:
        """``(..., P)``, ``(..., Z)`` -> ``(...)``."""
        hidden, linear = prepared.tensor_split([self.hidden.out_features], -1)
        scale, shift = self.modulation(latent).chunk(2, -1)
        reward: Tensor = self.out(F.leaky_relu((1 + scale) * hidden + shift, SLOPE))[..., 0]
        return reward + self.linear.reward(linear, latent)


class ConcatDecoder(nn.Module):
    """Two hidden layers on response and z side by side, as published."""

    def __init__(self, feature_dim: int, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.response = nn.Linear(feature_dim, hidden_dim)
        self.latent = nn.Linear(latent_dim, hidden_dim, bias=False)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, 1)

    def prepare(self, responses: Tensor) -> Tensor:
        """The part without z: ``(B, D)`` -> ``(B, P)``."""
        hidden: Tensor = self.response(responses)
        return hidden

    def reward(self, prepared: Tensor, latent: Tensor) -> Tensor:
        """``(..., P)``, ``(..., Z)`` -> ``(...)``."""
        hidden = F.leaky_relu(prepared + self.latent(latent), SLOPE)
        reward: Tensor = self.out(F.leaky_relu(self.hidden(hidden), SLOPE))[..., 0]
        return reward


POSTERIORS: dict[str, type[ProductPosterior] | type[AttentionPosterior]] = {
    "product": ProductPosterior,
    "attention": AttentionPosterior,
}
DECODERS: dict[str, type[BilinearDecoder] | type[FilmDecoder] | type[ConcatDecoder]] = {
    "bilinear": BilinearDecoder,
    "film": FilmDecoder,
    "concat": ConcatDecoder,
}
