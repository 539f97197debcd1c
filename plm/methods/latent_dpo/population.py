"""Learns the policy of the population: what one user would be who had the pairs of all seen users.

The prior cannot be the control: under it all responses are equally good, so that whatever anybody learns, also what
everybody wants, would look like a gain of personalisation. A mean of users' policies would not do for every family
either, as networks have no mean in the space of their numbers, and a product of all policies is not one row of a table.
One user with everybody's pairs, learned as each of them is, is defined for all families, and served at the price of
one user. It costs as many steps as one user takes; under ``num_steps: 0`` as many as all take.

Axes: U users, N pairs of all of them, P numbers of one user.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plm.distributed import gathered_rows
from plm.functional import unit_mean_per_user
from plm.methods.latent_dpo.families import Family
from plm.methods.latent_dpo.newton import solve_users
from plm.methods.latent_dpo.options import Options
from plm.methods.latent_dpo.training import train_users
from plm.methods.latent_dpo.user_pairs import Prompts, UserPairs, make_user_pairs
from plm.types import Tokens, take_rows


def pooled(parts: list[UserPairs], seed: int) -> UserPairs:
    """One user with the pairs of all users, each of whom counts the same; every process gets those of all.

    Args:
        parts: Users with their pairs, no user in two parts.
        seed: Seed of all draws.
    """
    rows, shares = [], []
    for pairs in parts:
        row, user = pairs.owners()
        weight = unit_mean_per_user(pairs.weight[row], user, pairs.num_users)
        shares.append(weight / pairs.num_pairs[user])
        rows.append(row)
    pairs_and_rows = list(zip(parts, rows, strict=True))
    responses = gathered_rows(torch.cat([pairs.responses[row] for pairs, row in pairs_and_rows]))
    grades = gathered_rows(torch.cat([pairs.grades[row] for pairs, row in pairs_and_rows]))
    prompts = _gathered([take_rows(pairs.prompts, row) for pairs, row in pairs_and_rows])
    user = torch.zeros(len(responses), dtype=torch.long, device=responses.device)
    return make_user_pairs(responses, grades, gathered_rows(torch.cat(shares)), prompts, user, 1, seed)


def _gathered(parts: list[Prompts | None]) -> Prompts | None:
    """The prompts of all parts and processes, one below the other."""
    features = [part for part in parts if isinstance(part, Tensor)]
    if features:
        return gathered_rows(torch.cat(features))
    tokens = [part for part in parts if isinstance(part, Tokens)]
    if not tokens:
        return None
    read = Tokens.cat(tokens)
    widths = gathered_rows(torch.tensor([read.input_ids.shape[1]], device=read.input_ids.device))
    return read.map(lambda value: gathered_rows(F.pad(value, (0, int(widths.max()) - value.shape[1]))))


def learn(pairs: UserPairs, start: Tensor, family: Family, options: Options) -> Tensor:
    """Policies of users who are not in a table: from ``start`` ``(P,)``, or exactly -> ``(U, P)``."""
    with torch.no_grad():
        if options.rule == "newton":
            return solve_users(pairs, options.beta, options.kl_coef)
        return train_users(start, family, pairs, options)
