"""Preference maths shared by two or more methods: losses and batched solvers for user weights.

Axes: N pairs, U users, K weights of one user. The solvers take the pairs of all users as one flat list with the row of
each pair's user, so that users of very different size share a call without padding, and nothing loops over users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plm.types import Context, PreferenceBatch

MAX_CELLS = 2**22
"""Numbers of padded pairs that a chunk of users has at most (32 MiB in float64)."""

LOG_VAR_BOUNDS = (-8.0, 4.0)
"""Where log-variances of latents are clamped, of posteriors and of policies."""


def targets(tie: Tensor) -> Tensor:
    """Probability that chosen wins according to the label: ``(N,)`` bool -> 1, or one half for a tie.

    >>> targets(torch.tensor([False, True])).tolist()
    [1.0, 0.5]
    """
    return 1.0 - 0.5 * tie.to(torch.get_default_dtype())


def project(features: Tensor, directions: Tensor) -> Tensor:
    """Features along directions, ``features @ directions``: ``(..., D)`` and ``(D, K)`` -> ``(..., K)``.

    The directions are multiplied column by column. Where K is below 16, matrix libraries take several times as long for
    rows of K numbers, and above all for the gradient: torch multiplies ``(gradient.T @ features).T`` where directions
    lie as columns, and ``features.T @ gradient``, up to fifteen times slower on a CPU, where they lie as rows.
    """
    return features @ directions.T.contiguous().T


def bt_losses(margin: Tensor, target: Tensor) -> Tensor:
    """Bradley-Terry negative log-likelihood of each pair, in nats (Bradley & Terry 1952), finite for any margin.

    Args:
        margin: ``(..., N)`` reward of chosen minus reward of rejected.
        target: ``(N,)`` probability that chosen wins, see `targets`.

    >>> bt_losses(torch.tensor([0.0, -1e4]), torch.ones(2)).tolist()
    [0.6931471824645996, 10000.0]
    """
    return F.softplus(-margin) + (1.0 - target) * margin


def win_probability(reward: Tensor, reference: Tensor) -> Tensor:
    """Expected probability to be preferred to a reference response: ``(..., B)``, ``(..., R)`` -> ``(..., B)``.

    Preferences fix rewards only up to a constant and say little about their scale, which differs between users; this
    puts all users on one scale, so that none outweighs the others in what is optimised for many (Poddar et al., arXiv
    2408.10075, on reward scaling).

    >>> win_probability(torch.tensor([0.0, 100.0]), torch.tensor([0.0, -100.0])).tolist()
    [0.75, 1.0]
    """
    return torch.sigmoid(reward[..., :, None] - reference[..., None, :]).mean(-1)


def kl_to_prior(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) of each dimension: ``(..., Z)`` each -> ``(..., Z)`` nats.

    >>> kl_to_prior(torch.tensor([2.0, 0.0]), torch.zeros(2))
    tensor([2., 0.])
    """
    return 0.5 * (log_var.exp() + mean.square() - 1.0 - log_var)


def log_densities(latent: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Exact normal log-density of every dimension, ``(..., Z)`` each, in nats.

    >>> log_densities(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    tensor([-0.9189])
    """
    return -0.5 * (math.log(math.tau) + log_var + (latent - mean).square() * (-log_var).exp())


def per_user_sum(values: Tensor, user: Tensor, num_users: int) -> Tensor:
    """Sum rows by user: ``(N, ...)``, ``(N,)`` -> ``(U, ...)``.

    >>> per_user_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1]), 3).tolist()
    [2.0, 5.0, 0.0]
    """
    return values.new_zeros((num_users, *values.shape[1:])).index_add_(0, user, values)


def unit_mean_per_user(weight: Tensor, user: Tensor, num_users: int) -> Tensor:
    """Scale pair weights to mean one within each user: they say which pairs matter more, not how many there are.

    A pair of weight 0 is as if it were not there.

    >>> unit_mean_per_user(torch.tensor([1.0, 3.0, 0.0, 5.0]), torch.tensor([0, 0, 0, 1]), 2).tolist()
    [0.5, 1.5, 0.0, 1.0]
    """
    total = per_user_sum(weight, user, num_users)
    count = per_user_sum((weight > 0).to(weight), user, num_users)
    return weight * torch.where(total > 0, count / total, 0.0)[user]  # a user whose pairs weigh nothing has none


def held_out_losses(margin: Tensor, batch: PreferenceBatch, num_users: int) -> Tensor:
    """Summed Bradley-Terry loss of the pairs of every seen user at margins ``(B,)``: ``(U,)``, float64."""
    loss = batch.weight * bt_losses(margin, targets(batch.tie).to(margin))
    return per_user_sum(loss.double(), batch.user_index, num_users)


class SequenceLogps(NamedTuple):
    """Log-probabilities of B responses, token by token; n tokens in all."""

    total: Tensor
    """``(B,)`` summed over the tokens of each response."""
    length: Tensor
    """``(B,)`` int64, how many tokens each response has."""
    token: Tensor
    """``(n,)`` log-probability of every token, in reading order."""
    row: Tensor
    """``(n,)`` int64, the response each token belongs to."""


def response_logps(token_logps: Tensor, row: Tensor, num_rows: int) -> SequenceLogps:
    """Log-probability of responses from those of their tokens.

    Args:
        token_logps: ``(n,)``.
        row: ``(n,)`` int64, the response each token belongs to.
        num_rows: Number B of responses.

    >>> response_logps(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 1, 1]), 3).total.tolist()
    [-1.0, -6.0, 0.0]
    """
    length = torch.zeros(num_rows, dtype=torch.long, device=row.device).index_add(0, row, torch.ones_like(row))
    total = token_logps.new_zeros(num_rows).index_add(0, row, token_logps)
    return SequenceLogps(total, length, token_logps, row)


class PairList(NamedTuple):
    """Pairs of several users, seen through K numbers per pair; the margin of pair n is ``design_n @ w + offset_n``."""

    design: Tensor
    """``(N, K)``."""
    offset: Tensor
    """``(N,)`` part of the margin that no weight changes."""
    target: Tensor
    """``(N,)`` probability that chosen wins, see `targets`."""
    weight: Tensor
    """``(N,)``."""
    user: Tensor
    """``(N,)`` int64, the row of the pair's user."""
    num_users: int


def flatten_context(context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real pairs of a padded context as flat lists: difference ``(N, D)``, target, weight and user, ``(N,)`` each.

    Weights have mean one within each user.
    """
    pairs = context.pairs
    weight = unit_mean_per_user(pairs.weight, pairs.user_index, context.num_users)
    return pairs.difference, targets(pairs.tie).to(weight), weight, pairs.user_index


class Posterior(NamedTuple):
    """Gaussian posterior of every user's weights."""

    mean: Tensor
    """``(U, K)`` the mode."""
    precision: Tensor
    """``(U, K, K)`` the Hessian there (Laplace's approximation)."""


class Padded(NamedTuple):
    """Users with about equally many pairs, padded to the longest; padding has weight zero. S pairs of one user."""

    users: Tensor
    """``(U,)`` their rows."""
    design: Tensor
    """``(U, S, K)``."""
    offset: Tensor
    """``(U, S)``."""
    target: Tensor
    """``(U, S)``."""
    weight: Tensor
    """``(U, S)``."""

    def loss(self, value: Tensor) -> Tensor:
        """Weighted Bradley-Terry loss of every user at weights ``(U, K)``, summed over its pairs: ``(U,)``."""
        margin = torch.einsum("usk,uk->us", self.design, value) + self.offset
        return (self.weight * bt_losses(margin, self.target)).sum(-1)

    def derivatives(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient ``(U, K)`` and Hessian ``(U, K, K)`` of ``loss``."""
        chance = torch.sigmoid(torch.einsum("usk,uk->us", self.design, value) + self.offset)
        gradient = torch.einsum("us,usk->uk", self.weight * (chance - self.target), self.design)
        curved = (self.weight * chance * (1 - chance))[..., None] * self.design
        return gradient, curved.mT @ self.design


class UserChunk(NamedTuple):
    """Some users of a flat list of pairs, n of them with m pairs."""

    users: Tensor
    """``(n,)`` int64, their rows, ascending."""
    rows: Tensor
    """``(m,)`` int64, the rows of their pairs, user by user, each user's in the order of the list."""
    user: Tensor
    """``(m,)`` int64, place in ``users`` of the user of each of these pairs."""


def user_chunks(user: Tensor, num_users: int, width: int, own: int = 0, most: int | None = None) -> Iterator[UserChunk]:
    """Split users into chunks whose padded pairs are bounded, users of about equally many pairs together.

    A chunk is one user, or has ``users x (longest x width + own) <= most`` cells, where ``longest`` is the largest
    number of pairs in it. Users are taken in the order of their numbers of pairs, those without any first.

    Args:
        user: ``(N,)`` int64 in ``[0, num_users)``, the row of the user of each pair.
        num_users: Number of users, each of whom is in one chunk.
        width: Cells of one pair.
        own: Cells of one user besides those of pairs.
        most: Cells of a chunk; null = `MAX_CELLS`.

    >>> [chunk.users.tolist() for chunk in user_chunks(torch.tensor([1, 1, 1, 1, 3, 0]), 4, width=2, most=6)]
    [[0, 2, 3], [1]]
    """
    most = MAX_CELLS if most is None else most
    count = torch.bincount(user, minlength=num_users)
    order, first = torch.argsort(user, stable=True), count.cumsum(0) - count
    by_count = torch.argsort(count, stable=True)
    cells = count[by_count].clamp_min(1) * width + own
    start = 0
    while start < num_users:
        part = cells[start : start + max(1, most // max(1, int(cells[start])))]
        size = max(1, int((part * torch.arange(1, len(part) + 1, device=part.device) <= most).sum()))
        users = by_count[start : start + size].sort().values
        begin = count[users].cumsum(0) - count[users]
        place = torch.repeat_interleave(torch.arange(size, device=users.device), count[users])
        rows = order[first[users][place] + torch.arange(len(place), device=users.device) - begin[place]]
        yield UserChunk(users, rows, place)
        start += size


def padded_users(pairs: PairList) -> Iterator[Padded]:
    """Pairs of every user side by side, in float64, in bounded parts of users with about equally many pairs.

    Small dense products of padded users are several times faster than scattered sums over a flat list. In a part the
    numbers of pairs lie between two powers of two, so that padding stays below the number of pairs; it has at most
    `MAX_CELLS` cells, or is one user. Users without pairs are in the first part.
    """
    num_weights = pairs.design.shape[1]
    for chunk in user_chunks(pairs.user, pairs.num_users, num_weights, own=num_weights**2):
        count = torch.bincount(chunk.user, minlength=len(chunk.users))
        size_class = torch.where(count > 0, (count.clamp_min(1) - 1).double().log2().floor() + 1, 0).clamp_min(0)
        for value in torch.unique(size_class):
            part = size_class == value
            yield _padded(pairs, chunk.users[part], chunk.rows[part[chunk.user]], count[part])


def _padded(pairs: PairList, users: Tensor, rows: Tensor, count: Tensor) -> Padded:
    """Users with their pairs at ``rows``, user by user, as many of each as ``count`` ``(U,)`` says."""
    is_pair = torch.arange(max(int(count.max()), 1), device=count.device) < count[:, None]

    def padded(values: Tensor) -> Tensor:
        out = values.new_zeros(*is_pair.shape, *values.shape[1:], dtype=torch.float64)
        out[is_pair] = values[rows].double()
        return out

    return Padded(users, *(padded(values) for values in (pairs.design, pairs.offset, pairs.target, pairs.weight)))


def curvature(pairs: PairList, value: Tensor) -> Tensor:
    """Hessian of every user's summed Bradley-Terry loss at weights ``(U, K)``: ``(U, K, K)``, zero without pairs.

    >>> one = torch.ones(1)
    >>> curvature(PairList(2 * one[None], 0 * one, one, one, torch.zeros(1).long(), 1), torch.zeros(1, 1)).item()
    1.0
    """
    hessian = value.new_zeros(*value.shape, value.shape[1])
    for part in padded_users(pairs):
        hessian[part.users] = part.derivatives(value[part.users].double())[1].to(value)
    return hessian


def fit_gaussian(
    pairs: PairList, start: Tensor | None = None, num_steps: int = 30, tolerance: float = 1e-10
) -> Posterior:
    """Posterior mode of every user's weights under a standard normal prior, by damped Newton, all users at once.

    Minimises for each user ``sum_n weight_n * bt_n(design_n @ w + offset_n) + |w|^2 / 2``, strictly convex, so the mode
    is unique. Another prior is a change of variables of ``design`` and ``offset``. A step that raises a user's
    objective is halved for that user alone, so that the iteration converges from anywhere (Boyd & Vandenberghe 2004,
    9.5).

    Args:
        pairs: The data.
        start: ``(U, K)`` where to start; zero, the prior mean, by default.
        num_steps: Most Newton steps.
        tolerance: Stop when no user's Newton decrement, twice the predicted decrease in nats, exceeds it.

    Returns:
        Mode and Hessian in the dtype of ``design``.
    """
    start = pairs.design.new_zeros(pairs.num_users, pairs.design.shape[1]) if start is None else start
    return _solved(pairs, lambda part: _newton(part, start[part.users].double(), num_steps, tolerance))


def _solved(pairs: PairList, solve: Callable[[Padded], tuple[Tensor, Tensor]]) -> Posterior:
    """Weights and Hessians of all users, solved part by part, in the dtype of ``design``."""
    num_weights = pairs.design.shape[1]
    mean = pairs.design.new_zeros(pairs.num_users, num_weights)
    hessian = pairs.design.new_zeros(pairs.num_users, num_weights, num_weights)
    for part in padded_users(pairs):
        mean_part, hessian_part = solve(part)
        mean[part.users], hessian[part.users] = mean_part.to(mean), hessian_part.to(mean)
    return Posterior(mean, hessian)


def _newton(part: Padded, value: Tensor, num_steps: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """`fit_gaussian` of users padded to one length."""
    eye = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)

    def objective(value: Tensor) -> Tensor:
        return part.loss(value) + 0.5 * value.square().sum(-1)

    before = objective(value)
    gradient, hessian = part.derivatives(value)
    for _ in range(num_steps):
        gradient, hessian = gradient + value, hessian + eye
        step = torch.cholesky_solve(gradient[..., None], torch.linalg.cholesky(hessian))[..., 0]
        if (gradient * step).sum(-1).max() < tolerance:
            return value - step, hessian  # the last step costs nothing and squares the error
        size = torch.ones_like(before)
        after = objective(value - step)
        while (worse := after > before + 1e-12 * before.abs()).any() and size.min() > 1e-6:
            size = torch.where(worse, size / 2, size)
            after = objective(value - size[:, None] * step)
        value, before = value - size[:, None] * step, after
        gradient, hessian = part.derivatives(value)
    return value, hessian + eye


def fit_simplex(pairs: PairList, centre: Tensor, precision: float = 0.0) -> Posterior:
    """Best weights of every user on the simplex, by a primal-dual interior-point method, all users at once.

    Minimises for each user ``mean_n weight_n * bt_n(design_n @ w + offset_n) + precision * |w - centre|^2 / 2`` subject
    to ``w >= 0`` and ``sum(w) = 1``: LoRe's few-shot problem (arXiv 2504.14439, eq 11), convex in ``w``. With
    multipliers ``dual`` of ``w >= 0`` the optimum solves ``gradient - dual + shift = 0``, ``w * dual = 0``; each step
    is Newton on these equations with ``w * dual = barrier`` and ``barrier -> 0``, kept inside by the
    fraction-to-the-boundary rule (Boyd & Vandenberghe 2004, 11.7).

    Args:
        pairs: The data.
        centre: ``(K,)`` a point of the simplex: the prior mean, and the answer for a user without pairs.
        precision: Strength of the pull to ``centre``; 0 as published.

    Returns:
        Weights, and the Hessian of the summed (not averaged) objective without the barrier; for a user without pairs
        that of the pull.
    """
    return _solved(pairs, lambda part: _interior_point(part, centre.double(), precision))


def _interior_point(part: Padded, centre: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """`fit_simplex` of users padded to one length, in at most 40 steps."""
    count = part.weight.sum(-1)
    share = part._replace(weight=part.weight / count.clamp_min(1e-300)[:, None])
    # a tiny curvature keeps the problem strictly convex where the pairs say nothing; it pulls to the centre
    pull = precision + 1e-9
    num_weights = len(centre)
    eye = torch.eye(num_weights, dtype=centre.dtype, device=centre.device)
    value = centre.new_full((len(part.users), num_weights), 1.0 / num_weights)
    dual = torch.ones_like(value)
    for _ in range(40):
        gap = (value * dual).sum(-1)
        open_gap = gap >= 1e-9  # nats; a finished user stands still, so that no state depends on who shares the batch
        if not open_gap.any():
            break
        gradient, hessian = share.derivatives(value)
        gradient, hessian = gradient + pull * (value - centre), hessian + pull * eye
        barrier = 0.1 * gap / num_weights
        system = hessian + torch.diag_embed(dual / value)
        right = torch.stack([barrier[:, None] / value - gradient, torch.ones_like(value)], -1)
        free, along = torch.linalg.solve(system, right).unbind(-1)
        step = free - along * (free.sum(-1, keepdim=True) / along.sum(-1, keepdim=True))  # keeps sum(w) = 1
        dual_step = (barrier[:, None] - dual * step) / value - dual
        value = value + (open_gap * _inside(value, step))[:, None] * step
        dual = dual + (open_gap * _inside(dual, dual_step))[:, None] * dual_step
    value = value / value.sum(-1, keepdim=True)
    value = torch.where((count == 0)[:, None], centre, value)
    pairs_counted = torch.where(count == 0, 1.0, count)  # without pairs the pull itself remains
    return value, part.derivatives(value)[1] + precision * pairs_counted[:, None, None] * eye


@torch.enable_grad()
def fit_simplex_by_adam(pairs: PairList, centre: Tensor, num_steps: int = 500) -> Tensor:
    """LoRe's published few-shot fit: Adam on logits of the weights, all users at once, from uniform weights.

    The learning rate is 0.1, as published.

    Args:
        pairs: The data.
        centre: ``(K,)`` the answer for a user without pairs.
        num_steps: Steps; 500 as published.

    Returns:
        Weights ``(U, K)``.
    """
    logits = torch.zeros(pairs.num_users, len(centre), dtype=centre.dtype, device=centre.device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    count = per_user_sum(pairs.weight, pairs.user, pairs.num_users)
    share = pairs.weight / count.clamp_min(torch.finfo(count.dtype).tiny)[pairs.user]
    for _ in range(num_steps):
        margin = (pairs.design * torch.softmax(logits, -1)[pairs.user]).sum(-1) + pairs.offset
        loss = (share * bt_losses(margin, pairs.target)).sum()
        (logits.grad,) = torch.autograd.grad(loss, logits)
        optimizer.step()
    return torch.where((count == 0)[:, None], centre, torch.softmax(logits.detach(), -1))


def expected_losses(margin: Tensor, design: Tensor, target: Tensor, precision: Tensor, user: Tensor) -> Tensor:
    """Expected loss of each pair under its user's posterior N(mode, precision^-1), to second order: ``(N,)``.

    ``bt(z) + p (1 - p) / 2 * J' precision^-1 J`` with ``bt'' = p (1 - p)``, z and J at the mode: the part of the
    evidence lower bound that depends on the shared parameters. The second term is the price of not knowing the user;
    it keeps shared parameters from spreading users further than their pairs can tell.
    """
    chance = torch.sigmoid(margin.detach())
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision)).to(design)
    variance = torch.einsum("nj,njk,nk->n", design, covariance[user], design)
    return bt_losses(margin, target) + 0.5 * chance * (1 - chance) * variance


def _inside(value: Tensor, step: Tensor) -> Tensor:
    """Longest step ``(U,)``, at most 1, that keeps 0.5 % of the distance of ``value > 0`` to zero."""
    ratio = torch.where(step < 0, -value / step.clamp_max(-1e-300), torch.inf)
    return (0.995 * ratio.min(-1).values).clamp_max(1.0)
