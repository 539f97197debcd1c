"""Trains many users of Latent DPO side by side, each as if alone.

The loss of all is the sum of the users' own losses, never their mean, and the optimizer keeps rows apart. A user's
pairs, their order, draws and steps are the same to the bit whoever shares the call. Sums over a minibatch padded for
somebody with more pairs are rounded differently: after the default's 200 steps, 2.5e-6 was the most seen among numbers
of up to 1.6; users with as many pairs as a minibatch holds were equal to the bit.

Axes: U users, R of them that take a step, P numbers of one user.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from plm.functional import kl_to_prior
from plm.methods.latent_dpo.families import Family
from plm.methods.latent_dpo.maths import Gaussian, draw_latents, implicit_rewards, latent_rewards
from plm.methods.latent_dpo.options import Options
from plm.methods.latent_dpo.rules import (
    POOLED,
    SAMPLED,
    closed_form_slopes,
    marginal_preference_losses,
    preference_losses,
)
from plm.methods.latent_dpo.user_pairs import Minibatch, UserPairs
from plm.optimizer import RowAdam, adam_rows
from plm.types import Tokens

MAX_FLOATS = {"cpu": 2**23, "cuda": 2**29}
"""About how many numbers one step may touch on a device; more users than that are taken in parts. A processor is
fastest while they stay in its cache, a GPU while it is full."""

BETAS = (0.9, 0.95)
"""Decay of Adam's two moments, as published."""

NUM_REWARD_DRAWS = 8
"""Latents per prompt that `latent/reward_policy` averages."""


def user_losses(policy: Gaussian, batch: Minibatch, options: Options) -> Tensor:
    """Loss of each user, ``(R,)``: preference loss plus KL to the prior; of policies ``(R, B, Z)``."""
    losses = marginal_preference_losses if options.marginal else preference_losses
    value = losses(
        options.rule,
        policy,
        batch.responses,
        batch.grades,
        batch.noise(options.num_samples) if options.rule in SAMPLED else None,
        options.beta,
        options.evidence_ratio,
    )
    return (batch.weight * (value + options.kl_coef * kl_to_prior(*policy).sum(-1))).sum(-1)


def mean_slopes(mean: Tensor, batch: Minibatch, options: Options) -> Tensor:
    """Gradient ``(R, B, Z)`` of `user_losses` for closed forms with unit variance, in the means of the policies."""
    slopes = closed_form_slopes(mean, batch.responses, batch.grades, options.beta)
    return batch.weight[..., None] * (slopes + options.kl_coef * mean)  # the KL is half the square of the mean


def users_in_parts(pairs: UserPairs, family: Family, options: Options) -> list[Tensor]:
    """Split users into parts ``(r,)`` that fit into memory; who is in which part makes no difference to anybody."""
    latent_dim, num_pairs = pairs.responses.shape[-1] // 2, min(options.pairs_per_step, pairs.slots.shape[1])
    num_responses = pairs.grades.shape[-1]
    per_pair = 8 * num_responses * latent_dim
    if options.rule in SAMPLED:
        pool = options.num_samples * (1 + num_responses)
        per_pair += 6 * pool * latent_dim * num_responses
        if options.rule in POOLED and options.rule != "topk":
            per_pair += 4 * pool * pool * (latent_dim if options.marginal else 1)
    if pairs.prompts is not None:
        width = (pairs.prompts.input_ids if isinstance(pairs.prompts, Tokens) else pairs.prompts).shape[-1]
        per_pair += width + 4 * options.hidden_dim
    most = MAX_FLOATS.get(pairs.num_pairs.device.type, MAX_FLOATS["cpu"])
    size = max(1, most // (num_pairs * per_pair + 8 * family.size))
    return list(torch.split(torch.arange(pairs.num_users, device=pairs.num_pairs.device), size))


class Step(NamedTuple):
    """Gradients and metrics of users at one step."""

    gradients: list[Tensor]
    """Of each tensor of the family, ``(R, ...)``, each row that of the user's own loss."""
    metrics: dict[str, Tensor]
    """Name -> ``(R,)``: the loss, and those of `user_metrics`."""


def one_step(
    tensors: list[Tensor], family: Family, batch: Minibatch, options: Options, with_metrics: bool = False
) -> Step:
    """Gradients of R users, whose numbers the family has split, on minibatches whose prompts are its inputs."""
    with torch.enable_grad():
        weights = [value.detach().requires_grad_() for value in tensors]
        policy, losses = family.policy(weights, batch.prompts), None
        if options.rule == "closed_form" and options.variance == "unit" and not options.marginal:
            mean = policy.mean.expand(*batch.weight.shape, -1)
            gradients = torch.autograd.grad(mean, weights, mean_slopes(mean.detach(), batch, options))
        else:
            losses = user_losses(policy, batch, options)
            gradients = torch.autograd.grad(losses.sum(), weights)
    if not with_metrics:
        return Step(list(gradients), {})
    policy = Gaussian(policy.mean.detach(), policy.log_var.detach())
    losses = user_losses(policy, batch, options) if losses is None else losses.detach()
    return Step(list(gradients), {"loss": losses, **user_metrics(batch, policy, options)})


def step_in_parts(
    table: Tensor, family: Family, pairs: UserPairs, step: Tensor, options: Options
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient ``(R, P)`` and metrics of users ``(R, P)`` at their own steps ``(R,)``, so many at a time as fit."""
    size, steps = options.pairs_per_step, []
    for part in users_in_parts(pairs, family, options):
        batch = pairs.take(part).minibatch(step[part], size)
        batch = batch._replace(prompts=family.inputs(batch.prompts))
        steps.append(one_step(family.split(table[part]), family, batch, options, with_metrics=True))
    gradient = torch.cat([family.join(part.gradients) for part in steps])
    return gradient, {name: torch.cat([part.metrics[name] for part in steps]) for name in steps[0].metrics}


@torch.no_grad()
def whole_losses(table: Tensor, family: Family, pairs: UserPairs, options: Options) -> Tensor:
    """Loss of each user over all pairs, ``(U, P)`` -> ``(U,)``, with the same draws at every call."""
    total, size = table.new_zeros(len(table)), options.pairs_per_step
    for part in users_in_parts(pairs, family, options):
        part_pairs, weights = pairs.take(part), family.split(table[part])
        for number in range(int(part_pairs.num_batches(size).max())):
            batch = part_pairs.minibatch(torch.full_like(part, number), size)
            policy = family.policy(weights, family.inputs(batch.prompts))
            present = (part_pairs.num_pairs - number * size).clamp(0, size)
            total[part] += user_losses(policy, batch, options) * present / part_pairs.num_pairs.clamp_min(1)
    return total


def num_steps(pairs: UserPairs, options: Options) -> Tensor:
    """Steps of each user, ``(U,)`` int64; none without pairs."""
    if options.rule == "newton":
        return (pairs.num_pairs > 0).long()
    if options.num_steps == 0:
        return pairs.num_batches(options.pairs_per_step)
    return torch.where(pairs.num_pairs > 0, options.num_steps, 0)


def warmup_factor(taken: Tensor, wanted: Tensor, options: Options) -> Tensor:
    """Share of the learning rate of users after so many of their steps, ``(R,)`` each -> ``(R,)``: it rises first."""
    return ((taken + 1) / (options.warmup * wanted).ceil().clamp_min(1)).clamp_max(1)


def make_optimizer(table: Tensor, options: Options, wanted: Callable[[], Tensor]) -> RowAdam:
    """The optimizer of a table ``(U, P)`` whose users take ``wanted()`` ``(U,)`` steps."""

    def rate(rows: Tensor, taken: Tensor) -> Tensor:
        return warmup_factor(taken, wanted()[rows], options)

    groups = [{"params": [table], "weight_decay": options.weight_decay}]
    return RowAdam(groups, options.lr, betas=BETAS, row_rate=rate if options.warmup else None)


def train_users(start: Tensor, family: Family, pairs: UserPairs, options: Options) -> Tensor:
    """Train all users from the same start: ``(P,)`` -> ``(U, P)``."""
    pairs = pairs._replace(prompts=family.inputs(pairs.prompts))
    return torch.cat(
        [_train(start, family, pairs.take(part), options) for part in users_in_parts(pairs, family, options)]
    )


def _train(start: Tensor, family: Family, pairs: UserPairs, options: Options) -> Tensor:
    """`train_users` of users who fit into memory together; their prompts are the family's inputs.

    Everybody who is not done has taken the same number of steps, with what `make_optimizer` would do.
    """
    table, wanted = start.repeat(pairs.num_users, 1), num_steps(pairs, options)
    rows, rate = torch.arange(len(table), device=table.device), torch.full_like(table[:, 0], options.lr)
    values = [value.contiguous() for value in family.split(table)]
    means, squares = ([torch.zeros_like(value) for value in values] for _ in BETAS)
    for first, last in pairwise(sorted({0, *wanted.tolist()})):  # between two of these, nobody finishes
        going = wanted[rows] > first
        if not going.all():
            table[rows] = family.join(values)
            rows, rate = rows[going], rate[going]
            values, means, squares = ([value[going] for value in each] for each in (values, means, squares))
        for batch in pairs.take(rows).minibatches(range(first, last), options.pairs_per_step):
            gradients, taken = one_step(values, family, batch, options).gradients, batch.step.to(rate)
            if options.warmup:
                rate = options.lr * warmup_factor(taken, wanted[rows], options)
            adam_rows(values, gradients, means, squares, taken, rate, BETAS, options.weight_decay)
    table[rows] = family.join(values)
    return table


@torch.no_grad()
def user_metrics(batch: Minibatch, policy: Gaussian, options: Options) -> dict[str, Tensor]:
    """Metrics of how well training went, ``(R,)`` each, in TRL's names where it has them.

    ``rewards/*`` are ``beta h`` at the posterior means of chosen and rejected, accuracies count margins > 0.
    ``latent/kl`` is the KL of the policies to the prior in nats, ``latent/mu_norm`` the length of their means in units
    of sqrt(Z), the typical length of a draw of the prior, and ``latent/reward_policy`` the latent reward of their
    draws, one half at the prior.
    """
    weight = batch.weight / batch.weight.sum(-1, keepdim=True).clamp_min(torch.finfo(batch.weight.dtype).tiny)
    chosen, rejected = (options.beta * implicit_rewards(batch.responses.mean, policy)).unbind(-1)
    noise = batch.noise(NUM_REWARD_DRAWS).prior
    drawn = draw_latents(policy.over(-2), noise)
    columns = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen),
        "latent/kl": kl_to_prior(*policy).sum(-1),
        "latent/mu_norm": policy.mean.norm(dim=-1) / policy.mean.shape[-1] ** 0.5,
        "latent/reward_policy": latent_rewards(drawn, batch.responses, batch.grades).mean(-1),
    }
    found = {name: (weight * value).sum(-1) for name, value in columns.items()}
    log_var = policy.log_var.flatten(1)
    return {**found, "latent/logvar_min": log_var.amin(1), "latent/logvar_max": log_var.amax(1)}
