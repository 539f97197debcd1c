"""Adapters of unseen users, trained from their pairs alone, and simplex weights of unseen users of a basis.

Axes: U users, S pairs of one user, B pairs of several users, P numbers of one adapter, K bases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from plm.distributed import summed
from plm.functional import PairList, fit_simplex, targets
from plm.methods.lora_dpo.adapters import Owned
from plm.methods.lora_dpo.pairs import PairLogps
from plm.optimizer import RowAdam
from plm.types import Context, Tokens


class Support(NamedTuple):
    """The real pairs of a context, one user after the other."""

    chosen: Tokens
    rejected: Tokens
    tie: Tensor
    """``(B,)`` bool."""
    weight: Tensor
    """``(B,)`` as the context has it."""
    user: Tensor
    """``(B,)`` int64 row of the pair's user."""

    @classmethod
    def of(cls, context: Context, users: Tensor) -> Support:
        """The pairs of some users ``(n,)`` of a context, who become the users 0 to n - 1."""
        mask = context.mask[users]
        chosen, rejected = (side.map(lambda value: value[users][mask]).trimmed() for side in context.tokens)
        user = mask.nonzero()[:, 0]
        tie = mask.new_zeros(len(user)) if context.tie is None else context.tie[users][mask]
        return cls(chosen, rejected, tie, context.weight[users][mask], user)

    def take(self, pairs: slice) -> Support:
        """Some of the pairs, without padding that only others need."""
        chosen, rejected = (side.map(lambda value: value[pairs]).trimmed() for side in (self.chosen, self.rejected))
        return Support(chosen, rejected, self.tie[pairs], self.weight[pairs], self.user[pairs])

    def chunks(self, max_tokens: int) -> list[Support]:
        """Consecutive pairs whose padded texts have at most ``max_tokens`` tokens together; at least one pair each."""
        lengths = [side.attention_mask.sum(-1) for side in (self.chosen, self.rejected)]
        chunks, start, longest = [], 0, 0
        for pair, length in enumerate(torch.maximum(*lengths).tolist()):
            longest = max(longest, length)
            if pair > start and 2 * longest * (pair + 1 - start) > max_tokens:
                chunks.append(self.take(slice(start, pair)))
                start, longest = pair, length
        return [*chunks, self.take(slice(start, len(self.user)))]

    def shares(self, num_users: int) -> Tensor:
        """Weights ``(B,)`` that sum to one for each user with any."""
        return user_shares(self.weight, self.user, num_users)


def user_shares(weight: Tensor, user: Tensor, num_users: int, *, everywhere: bool = False) -> Tensor:
    """Pair weights that sum to one for each user: ``(B,)``, ``(B,)`` -> ``(B,)``; ``everywhere``, over all processes.

    >>> user_shares(torch.tensor([1.0, 3.0, 5.0, 0.0]), torch.tensor([2, 2, 0, 1]), 3).tolist()
    [0.25, 0.75, 1.0, 0.0]
    """
    total = weight.new_zeros(num_users).index_add(0, user, weight)
    total = summed(total) if everywhere else total
    return weight / total[user].clamp_min(torch.finfo(weight.dtype).tiny)


def train_rows(
    fresh: Tensor,
    support: Support,
    num_users: int,
    read: Callable[[Owned, Support], PairLogps],
    losses: Callable[[PairLogps, Tensor], Tensor],
    *,
    max_tokens: int,
    num_steps: int,
    lr: float,
    weight_decay: float,
) -> Tensor:
    """Full-batch steps of one adapter for each user: ``(U, P)``; a user without pairs keeps the fresh one.

    Args:
        fresh: ``(P,)`` the adapter that all users start from.
        support: Pairs of U users.
        num_users: U.
        read: Log-probabilities of pairs, read with such adapters.
        losses: Losses ``(B,)`` of all pairs from their log-probabilities and which of them are ties.
        max_tokens: Most tokens that are read at once.
        num_steps: Steps.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """
    table = fresh.repeat(num_users, 1).requires_grad_()
    if not len(support.user):
        return table.detach()
    optimizer = RowAdam([{"params": [table], "weight_decay": weight_decay}], lr=lr)
    share, chunks = support.shares(num_users), support.chunks(max_tokens)
    for _ in range(num_steps):

        def loss(pairs: PairLogps) -> Tensor:
            return (share * losses(pairs, support.tie)).sum()

        if len(chunks) == 1:
            (table.grad,) = torch.autograd.grad(loss(read(Owned(table, support.user), support)), table)
        else:
            table.grad = _gradient_in_chunks(table, chunks, read, loss)
        optimizer.step()
    return table.detach()


def _gradient_in_chunks(
    table: Tensor,
    chunks: list[Support],
    read: Callable[[Owned, Support], PairLogps],
    loss: Callable[[PairLogps], Tensor],
) -> Tensor:
    """Gradient of a loss of all pairs for ``table``, by the chain rule at their log-probabilities.

    Each chunk is read twice: without gradient, for the slope of the loss in every log-probability, and with. So the
    loss may compare pairs of different chunks, as those of a user that are sorted or averaged over.
    """
    with torch.no_grad():
        values = PairLogps.cat([read(Owned(table, chunk.user), chunk) for chunk in chunks])
    values = values._replace(**{key: value.requires_grad_() for key, value in values.of_policy().items()})
    inputs = values.of_policy()
    slopes = dict(
        zip(inputs, torch.autograd.grad(loss(values), [*inputs.values()], materialize_grads=True), strict=True)
    )
    gradient, start = torch.zeros_like(table).to_sparse(1), 0
    for chunk in chunks:
        pairs = slice(start, start := start + len(chunk.user))
        outputs = read(Owned(table, chunk.user), chunk).of_policy()
        gradient += torch.autograd.grad([*outputs.values()], table, [slopes[key][pairs] for key in outputs])[0]
    return gradient


def fit_weights(context: Context, base_margins: Callable[[Tokens, Tokens], Tensor], centre: Tensor) -> Tensor:
    """Simplex weights ``(U, K)`` of every user, by the convex logistic fit to the margins of the bases.

    Args:
        context: Support pairs.
        base_margins: Rewards of chosen minus rewards of rejected, ``(B, K)``.
        centre: ``(K,)`` weights of a user without pairs; they pull a little at all others.
    """
    support = Support.of(context, torch.arange(context.num_users, device=context.mask.device))
    design = base_margins(support.chosen, support.rejected)
    offset, target = design.new_zeros(len(design)), targets(support.tie).to(design)
    pairs = PairList(design, offset, target, support.weight, support.user, context.num_users)
    return fit_simplex(pairs, centre, precision=0.01).mean
