"""Latent DPO of many people side by side, each exactly as if trained alone.

The loss of all is the sum of the people's own losses, never their mean, and the optimizer keeps rows apart.

Axes: U people, R of them that take a step, P numbers of one person.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from plm.methods.latent_dpo.families import Family
from plm.methods.latent_dpo.maths import Gaussian, draw_latents, implicit_rewards, kl_to_prior, latent_rewards
from plm.methods.latent_dpo.options import Options
from plm.methods.latent_dpo.people import Minibatch, People
from plm.methods.latent_dpo.rules import POOLED, SAMPLED, marginal_preference_losses, preference_losses
from plm.optimizer import RowAdam, clip_rows, row_gradient

MAX_FLOATS = {"cpu": 2**24, "cuda": 2**29}
"""About how many numbers one step may touch on a device; more people than that are taken in parts. A processor is
fastest while they stay in its cache, a GPU while it is full."""

NUM_REWARD_DRAWS = 8
"""Latents per prompt that `latent/reward_policy` averages."""


def person_losses(table: Tensor, family: Family, batch: Minibatch, options: Options) -> tuple[Tensor, Gaussian]:
    """Loss of each person, ``(R, P)`` -> ``(R,)``: preference loss plus KL to the prior; and the policies."""
    policy = family.policy(table, batch.prompts)
    losses = marginal_preference_losses if options.marginal else preference_losses
    value = losses(
        options.rule,
        policy,
        batch.responses,
        batch.grades,
        batch.noise(options.num_samples) if options.rule in SAMPLED else None,
        options.beta,
        options.evidence_ratio,
        options.posterior_draws,
    )
    return (batch.weight * (value + options.kl_coef * kl_to_prior(policy).sum(-1))).sum(-1), policy


def people_in_parts(people: People, family: Family, options: Options) -> list[Tensor]:
    """Rows ``(r,)`` of people who are trained together; which are makes no difference to any of them."""
    latent_dim, num_pairs = people.responses.shape[-1] // 2, min(options.pairs_per_step, people.slots.shape[1])
    num_responses = people.grades.shape[-1]
    per_pair = 8 * num_responses * latent_dim
    if options.rule in SAMPLED:
        pool = options.num_samples * (1 + num_responses)
        per_pair += 6 * pool * latent_dim * num_responses
        if options.rule in POOLED and options.rule != "topk":
            per_pair += 4 * pool * pool * (latent_dim if options.marginal else 1)
    if people.prompts is not None:
        per_pair += people.prompts.shape[-1] + 4 * options.hidden_dim
    most = MAX_FLOATS.get(people.num_pairs.device.type, MAX_FLOATS["cpu"])
    size = max(1, most // (num_pairs * per_pair + 8 * family.size))
    return list(torch.split(torch.arange(people.num_people, device=people.num_pairs.device), size))


class Step(NamedTuple):
    """What people learn at one step."""

    losses: Tensor
    """``(R,)``."""
    gradient: Tensor
    """``(R, P)``, each row that of the person's own loss."""
    metrics: dict[str, Tensor]
    """Name -> ``(R,)``, see `person_metrics`."""


def one_step(table: Tensor, family: Family, batch: Minibatch, options: Options, with_metrics: bool = False) -> Step:
    """Losses and gradients of people ``(R, P)`` on their minibatches."""
    with torch.enable_grad():
        own = table.detach().requires_grad_()
        losses, policy = person_losses(own, family, batch, options)
        (gradient,) = torch.autograd.grad(losses.sum(), own)
    return Step(losses.detach(), gradient, person_metrics(batch, policy, options) if with_metrics else {})


def step_in_parts(table: Tensor, family: Family, people: People, step: Tensor, options: Options) -> Step:
    """`one_step` of people ``(R, P)`` at their own steps ``(R,)``, as many at a time as fit into memory."""
    size, found = options.pairs_per_step, []
    for part in people_in_parts(people, family, options):
        batch = people.take(part).minibatch(step[part], size)
        found.append(one_step(table[part], family, batch, options, with_metrics=True))
    metrics = {name: torch.cat([part.metrics[name] for part in found]) for name in found[0].metrics}
    return Step(torch.cat([part.losses for part in found]), torch.cat([part.gradient for part in found]), metrics)


@torch.no_grad()
def whole_losses(table: Tensor, family: Family, people: People, options: Options) -> Tensor:
    """Loss of each person over all pairs, ``(U, P)`` -> ``(U,)``, with the same draws at every call."""
    total, size = table.new_zeros(len(table)), options.pairs_per_step
    for part in people_in_parts(people, family, options):
        some, own = people.take(part), table[part]
        for number in range(int(some.num_batches(size).max())):
            batch = some.minibatch(torch.full_like(part, number), size)
            present = (some.num_pairs - number * size).clamp(0, size)
            total[part] += person_losses(own, family, batch, options)[0] * present / some.num_pairs.clamp_min(1)
    return total


def num_steps(people: People, options: Options) -> Tensor:
    """Steps of each person, ``(U,)`` int64; none without pairs."""
    if options.rule == "newton":
        return (people.num_pairs > 0).long()
    if options.num_steps == 0:
        return people.num_batches(options.pairs_per_step)
    return torch.where(people.num_pairs > 0, options.num_steps, 0)


def make_optimizer(table: Tensor, options: Options, wanted: Callable[[], Tensor]) -> RowAdam:
    """The optimizer of a table ``(U, P)`` whose people take ``wanted()`` ``(U,)`` steps.

    The learning rate of each person rises over the first of the person's own steps.
    """

    def rate(rows: Tensor, taken: Tensor) -> Tensor:
        rising = (options.warmup * wanted()[rows]).ceil().clamp_min(1)
        return ((taken + 1) / rising).clamp_max(1)

    groups = [{"params": [table], "weight_decay": options.weight_decay}]
    return RowAdam(groups, options.lr, betas=(0.9, 0.95), row_rate=rate if options.warmup else None)


def train_people(start: Tensor, family: Family, people: People, options: Options) -> Tensor:
    """Train everybody from the same start: ``(P,)`` -> ``(U, P)``."""
    table = start.repeat(people.num_people, 1)
    for part in people_in_parts(people, family, options):
        table[part] = _train(table[part], family, people.take(part), options)
    return table


def _train(table: Tensor, family: Family, people: People, options: Options) -> Tensor:
    """`train_people` of people who fit into memory together."""
    wanted = num_steps(people, options)
    optimizer = make_optimizer(table, options, lambda: wanted)
    rows, active, batch = torch.arange(len(table), device=table.device), people, None
    for step in range(int(wanted.max())):
        if (wanted[rows] <= step).any():  # finished people leave the batch
            rows, batch = (wanted > step).nonzero()[:, 0], None
            active = people.take(rows)
        now = torch.full_like(rows, step)
        if batch is not None and active.slots.shape[1] <= options.pairs_per_step:  # all pairs again
            batch = batch._replace(key=active.step_key(now))
        else:
            batch = active.minibatch(now, options.pairs_per_step)
        found = one_step(table if len(rows) == len(table) else table[rows], family, batch, options)
        table.grad = row_gradient(table, rows, found.gradient)
        if options.clip_norm:
            clip_rows(table, options.clip_norm)
        optimizer.step()
    return table


@torch.no_grad()
def person_metrics(batch: Minibatch, policy: Gaussian, options: Options) -> dict[str, Tensor]:
    """What tells whether training went well, ``(R,)`` each, in TRL's names where it has them.

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
        "latent/kl": kl_to_prior(policy).sum(-1),
        "latent/mu_norm": policy.mean.norm(dim=-1) / policy.mean.shape[-1] ** 0.5,
        "latent/reward_policy": latent_rewards(drawn, batch.responses, batch.grades).mean(-1),
    }
    found = {name: (weight * value).sum(-1) for name, value in columns.items()}
    log_var = policy.log_var.flatten(1)
    return {**found, "latent/logvar_min": log_var.amin(1), "latent/logvar_max": log_var.amax(1)}
