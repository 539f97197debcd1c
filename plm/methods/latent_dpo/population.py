"""The policy of the population: what one person would be who had the pairs of all seen users.

The prior cannot be the control: under it all responses are equally good, so that whatever anybody learns, also what
everybody wants, would look like a gain of personalisation. A mean of users' policies would not do for every family
either, as networks have no mean in the space of their numbers, and a product of all policies is not one row of a table.
One person with everybody's pairs, learned as each of them is, is defined for all families, and served at the price of
one person. It costs as many steps as one person takes; under ``num_steps: 0`` as many as all take.

Axes: U users, N pairs of all of them, P numbers of one person.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plm.distributed import gathered_rows
from plm.functional import unit_mean_per_user
from plm.methods.latent_dpo.families import Family
from plm.methods.latent_dpo.newton import solve_people
from plm.methods.latent_dpo.options import Options
from plm.methods.latent_dpo.people import People, make_people
from plm.methods.latent_dpo.training import train_people


def pooled(parts: list[People], seed: int) -> People:
    """One person with the pairs of all users, each of whom counts the same; every process gets those of all.

    Args:
        parts: Users with their pairs, no user in two parts.
        seed: Seed of all draws.
    """
    rows, shares = [], []
    for people in parts:
        row, user = people.owners()
        weight = unit_mean_per_user(people.weight[row], user, people.num_people)
        shares.append(weight / people.num_pairs[user])
        rows.append(row)
    own = list(zip(parts, rows, strict=True))
    responses = gathered_rows(torch.cat([people.responses[row] for people, row in own]))
    grades = gathered_rows(torch.cat([people.grades[row] for people, row in own]))
    asked = [people.prompts[row] for people, row in own if people.prompts is not None]
    prompts = gathered_rows(torch.cat(asked)) if asked else None
    one = torch.zeros(len(responses), dtype=torch.long, device=responses.device)
    return make_people(responses, grades, gathered_rows(torch.cat(shares)), prompts, one, 1, seed)


def learn(people: People, start: Tensor, family: Family, options: Options) -> Tensor:
    """Policies of people who are not in a table: from ``start`` ``(P,)``, or exactly -> ``(U, P)``."""
    with torch.no_grad():
        if options.rule == "newton":
            return solve_people(people, options.beta, options.kl_coef)
        return train_people(start, family, people, options)
