"""The pairs of many users, and the minibatch each of them learns from at a step.

A user's minibatches and draws are named by the content of the user's pairs: they depend neither on who shares the
batch nor on the order of anything.

Axes: U users, S pairs of one user (padded), N pairs of all users, B pairs of a minibatch, K responses of a pair, F
width of prompt features, Z latent width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from plm.functional import per_user_sum, targets, unit_mean_per_user
from plm.methods.latent_dpo.maths import Gaussian, gaussian
from plm.methods.latent_dpo.noise import fold, normals, row_keys
from plm.methods.latent_dpo.rules import Noise
from plm.types import Context, PreferenceBatch, Tokens, take_rows

Prompts = Tensor | Tokens
"""Features of prompts ``(..., F)``, or their tokens ``(..., T)``."""


class Minibatch(NamedTuple):
    """Pairs of U users, padded to B with weight zero."""

    responses: Gaussian
    """Posteriors, ``(U, B, K, Z)``."""
    grades: Tensor
    """``(U, B, K)``."""
    weight: Tensor
    """``(U, B)``; the loss of a user is the sum of weighted losses."""
    prompts: Prompts | None
    """``(U, B, F)``, or tokens ``(U, B, T)``."""
    key: Tensor
    """``(U,)`` int64, what each user's draws are named by."""
    step: Tensor
    """``(U,)`` int64, the step of each user that these pairs are for."""
    response_key: Tensor
    """``(U, B, K)`` int64, the content of each response."""

    def noise(self, num_samples: int) -> Noise:
        """Draws named by user, step and pair; those of a posterior by the response, whichever side it is on."""
        latent_dim = self.responses.mean.shape[-1]
        key = fold(self.key, -1 - self.step)  # orders of passes have names >= 0
        of_response = fold(key[:, None, None], self.response_key)
        of_pair = fold(of_response.sum(-1), 0)
        prior, posterior = (
            normals(key, num_samples * latent_dim).view(*key.shape, num_samples, latent_dim)
            for key in (of_pair, of_response)
        )
        return Noise(prior.to(self.responses.mean), posterior.to(self.responses.mean))


class UserPairs(NamedTuple):
    """Pairs of U users in one flat list, and where each user's are."""

    responses: Tensor
    """``(N, K, 2Z)`` posterior means and log-variances side by side."""
    grades: Tensor
    """``(N, K)`` in [0, 1]."""
    weight: Tensor
    """``(N,)`` of mean one for each user."""
    prompts: Prompts | None
    """``(N, F)``, or tokens ``(N, T)``."""
    slots: Tensor
    """``(U, S)`` int64 rows of each user's pairs, ordered by content; beyond ``num_pairs`` any row."""
    num_pairs: Tensor
    """``(U,)`` int64, pairs of each user."""
    response_key: Tensor
    """``(N, K)`` int64, the content of each response beside its prompt."""
    key: Tensor
    """``(U,)`` int64, what each user's draws are named by."""

    @property
    def num_users(self) -> int:
        """Number of users, U."""
        return len(self.num_pairs)

    def take(self, rows: Tensor) -> UserPairs:
        """The pairs of some of the users: ``(R,)`` int64."""
        count = self.num_pairs[rows]
        longest = int(count.max()) if len(count) else 0
        return self._replace(slots=self.slots[rows, :longest], num_pairs=count, key=self.key[rows])

    def owners(self) -> tuple[Tensor, Tensor]:
        """Rows ``(n,)`` of all pairs of these users, and the user ``(n,)`` of each."""
        is_pair = torch.arange(self.slots.shape[1], device=self.num_pairs.device) < self.num_pairs[:, None]
        return self.slots[is_pair], is_pair.nonzero()[:, 0]

    def num_batches(self, batch_size: int) -> Tensor:
        """Minibatches of one pass over each user's pairs, ``(U,)``."""
        return -(-self.num_pairs // batch_size)

    def order(self, step: Tensor, batch_size: int) -> Tensor:
        """``(U, S)`` as ``slots``, in the order of the pass that each user's step ``(U,)`` is in: all differ."""
        if self.slots.shape[1] <= batch_size:
            return self.slots
        number = step // self.num_batches(batch_size).clamp_min(1)
        place = torch.arange(self.slots.shape[1], device=step.device).expand_as(self.slots)
        shuffled = fold(fold(self.key, number)[:, None], self.response_key.sum(1)[self.slots])
        shuffled = torch.where(place >= self.num_pairs[:, None], torch.iinfo(torch.int64).max, shuffled)
        # pairs that one batch holds stay as they are
        shuffled = torch.where(self.num_pairs[:, None] > batch_size, shuffled, place)
        return self.slots.gather(1, shuffled.argsort(1))

    def minibatch(self, step: Tensor, batch_size: int, order: Tensor | None = None) -> Minibatch:
        """Each user's pairs at the user's step ``(U,)``, at most B.

        Args:
            step: Of each user.
            batch_size: B.
            order: What `order` says of this step, where it is known.
        """
        order = self.order(step, batch_size) if order is None else order
        num_batches = self.num_batches(batch_size).clamp_min(1)
        place = torch.arange(min(batch_size, self.slots.shape[1]), device=step.device)
        place = place + (step % num_batches)[:, None] * batch_size
        is_pair = place < self.num_pairs[:, None]
        rows = order.gather(1, place.clamp_max(self.slots.shape[1] - 1))
        present = is_pair.sum(1, keepdim=True).clamp_min(1)
        return Minibatch(
            gaussian(self.responses[rows]),
            self.grades[rows],
            self.weight[rows] * is_pair / present,
            take_rows(self.prompts, rows),
            self.key,
            step,
            self.response_key[rows],
        )

    def minibatches(self, steps: range, batch_size: int) -> Iterator[Minibatch]:
        """`minibatch` of all users at each of the steps; a user is shuffled where one of the user's passes begins."""
        num_batches = self.num_batches(batch_size).clamp_min(1)
        lengths, now = set(num_batches.tolist()), torch.full_like(self.num_pairs, steps.start)
        order = self.order(now, batch_size)
        batch = self.minibatch(now, batch_size, order)
        yield batch
        for step in steps[1:]:
            now = torch.full_like(now, step)
            if lengths == {1}:
                batch = batch._replace(step=now)  # all pairs again
            else:
                if any(step % length == 0 for length in lengths):
                    begins = (now % num_batches == 0).nonzero()[:, 0]
                    fresh = self.take(begins).order(now[begins], batch_size)
                    order[begins, : fresh.shape[1]] = fresh
                batch = self.minibatch(now, batch_size, order)
            yield batch


def make_user_pairs(
    responses: Tensor,
    grades: Tensor,
    weight: Tensor,
    prompts: Prompts | None,
    user: Tensor,
    num_users: int,
    seed: int,
) -> UserPairs:
    """Index a flat list of pairs by user.

    Args:
        responses: ``(N, K, 2Z)``.
        grades: ``(N, K)`` in [0, 1].
        weight: ``(N,)``.
        prompts: Of N pairs, where policies read them.
        user: ``(N,)`` int64, the user of each pair.
        num_users: Number of users U.
        seed: Seed of all draws.

    Raises:
        ValueError: If a number is not finite: it would be in every policy of who learns from it.
    """
    bad = ~responses.flatten(1).isfinite().all(1)
    if isinstance(prompts, Tensor):
        bad |= ~prompts.isfinite().all(1)
    if bad.any():
        rows, users = bad.nonzero()[:, 0], torch.unique(user[bad])
        raise ValueError(
            f"expected finite latents and prompt features, got others in {len(rows)} of {len(bad)} pairs, rows "
            f"{rows[:5].tolist()!r}, of {len(users)} of {num_users} people, numbers {users[:5].tolist()!r}; look at "
            "the responses there, and at the checkpoint that made their latents"
        )
    response_key = row_keys(responses)
    if prompts is not None:
        prompt_key = row_keys(*prompts[:2]) if isinstance(prompts, Tokens) else row_keys(prompts)
        response_key = fold(prompt_key[:, None], response_key)
    pair_key = response_key.sum(1)  # the same with chosen and rejected exchanged
    order = pair_key.argsort(stable=True)
    order = order[user[order].argsort(stable=True)]
    count = torch.bincount(user, minlength=num_users)
    place = torch.arange(max(int(count.max()), 1), device=user.device)
    slots = ((count.cumsum(0) - count)[:, None] + place).clamp_max(max(len(user) - 1, 0))
    slots = order[slots] if len(order) else torch.zeros_like(slots)
    key = fold(torch.full_like(count, seed), per_user_sum(fold(pair_key, 0), user, num_users))
    weight = unit_mean_per_user(weight, user, num_users)
    return UserPairs(responses, grades, weight, prompts, slots, count, response_key, key)


def pairs_of_batch(batch: PreferenceBatch, seed: int) -> tuple[Tensor, UserPairs]:
    """Rows ``(U,)`` of the seen users of a batch in the training table, and their pairs."""
    users, user = torch.unique(batch.user_index, return_inverse=True)
    return users, _made(batch, user, len(users), seed)


def pairs_of_context(context: Context, seed: int) -> UserPairs:
    """The pairs of unseen users."""
    pairs = context.pairs
    return _made(pairs, pairs.user_index, context.num_users, seed)


def _made(batch: PreferenceBatch, user: Tensor, num_users: int, seed: int) -> UserPairs:
    """`make_user_pairs` of a batch, of whose pairs ``user`` ``(B,)`` int64 are the users."""
    responses = torch.stack(batch.features, 1)
    grades = pair_grades(batch.tie, responses)
    return make_user_pairs(responses, grades, batch.weight, batch.prompt, user, num_users, seed)


def pair_grades(tie: Tensor, like: Tensor) -> Tensor:
    """Grades of chosen and rejected: ``(N,)`` bool -> ``(N, 2)``, one half each at a tie."""
    target = targets(tie).to(like)
    return torch.stack([target, 1.0 - target], -1)
