"""Episodes: which pairs of a user are context and which are targets, drawn anew at every training step.

Axes: N pairs in a batch, D feature width, E episodes (one per user of the batch), M nodes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from plm.types import PreferenceBatch

TargetRule = Literal["response", "rest", "any"]


class Episodes(NamedTuple):
    """Rows of a batch; every user of the batch is one episode."""

    context: Tensor
    """``(C,)`` int64 rows the posterior sees."""
    targets: Tensor
    """``(T,)`` int64 rows it has to predict."""


def response_ids(chosen: Tensor, rejected: Tensor) -> Tensor:
    """One number per distinct response, ``(N, 2)`` int64, equal where all features are equal bit for bit.

    Integer arithmetic on the bits is exact, so equal rows meet however the sum is ordered.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> response_ids(x, x.flip(0)).tolist() in ([[0, 1], [1, 0]], [[1, 0], [0, 1]])
    True
    """
    rows = torch.cat([chosen, rejected]).float().contiguous().view(torch.int32)
    draw = torch.Generator().manual_seed(0)
    factors = torch.randint(2**31, (rows.shape[1],), generator=draw).to(rows.device) * 2 + 1
    codes = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for start in range(0, rows.shape[1], 32):  # bounds the memory of int64
        codes += (rows[:, start : start + 32] * factors[start : start + 32]).sum(-1)
    rows_of: Tensor = torch.unique(codes, return_inverse=True)[1]
    return rows_of.view(2, -1).T


def response_nodes(responses: Tensor, user: Tensor) -> Tensor:
    """What must fall on one side of an episode: ``(N, 2)`` ids, ``(N,)`` -> ``(N, 2)`` int64 nodes, numbered from 0.

    A node is one response of one user. A response that occurs in a single pair of its user takes its partner's node:
    a pair without common responses is one node, and no pair is lost where responses do not repeat.

    >>> nodes = response_nodes(torch.tensor([[0, 1], [1, 2], [5, 6]]), torch.tensor([0, 0, 0]))
    >>> bool((nodes[0] == nodes[1]).all()), bool(nodes[2, 0] == nodes[2, 1]), bool(nodes[0, 0] == nodes[2, 0])
    (True, True, False)
    """
    keys = user[:, None] * (responses.max() + 1) + responses
    _, nodes, count = torch.unique(keys, return_inverse=True, return_counts=True)
    left, right = nodes.unbind(-1)
    single_left, single_right = count[left] == 1, count[right] == 1
    return torch.stack(
        [torch.where(single_left, right, left), torch.where(single_right & ~single_left, left, right)], -1
    )


class Arranged(NamedTuple):
    """A batch in an order of its own content, so that what is drawn for a user does not depend on who comes first."""

    batch: PreferenceBatch
    user: Tensor
    """``(N,)`` int64 users from 0, ascending."""
    nodes: Tensor | None
    """``(N, 2)`` see `response_nodes`; None where episodes may share responses."""


def pairs_that_count(batch: PreferenceBatch) -> PreferenceBatch:
    """The batch without pairs of weight 0, which are as if they were not there; as it is where no pair has another."""
    counts = batch.weight > 0
    return batch.take(counts.nonzero()[:, 0]) if counts.any() and not counts.all() else batch


def content_keys(difference: Tensor) -> Tensor:
    """Product of each pair's difference with one fixed random direction: ``(N, D)`` -> ``(N,)``, float64.

    It tells pairs apart by what they hold, whatever row they stand in.
    """
    draw = torch.Generator().manual_seed(0)
    direction = torch.randn(difference.shape[1], generator=draw, dtype=torch.float64).to(difference.device)
    # not a matrix product, which may round equal rows differently
    return torch.cat([(part.double() * direction).sum(-1) for part in torch.split(difference, 2**14)])


def shuffling_keys(difference: Tensor, scale: Tensor) -> Tensor:
    """A number in [0, 1) for each pair ``(N,)`` by its `content_keys` in units of ``scale`` ``()``, whoever won.

    Among the pairs of a user those with the lowest numbers are a random choice that no order of pairs moves.
    """
    mixed = (content_keys(difference).abs() / scale.double()) * 2.0**16
    return mixed - mixed.floor()


def arrange(batch: PreferenceBatch, with_nodes: bool) -> Arranged:
    """Order users, and the pairs of each, by the product of their differences with one fixed direction.

    Neither the names nor the order of users enter, nor the unit of the features, nor what both responses of a pair
    share: the same numbers are drawn for the same user then. Nodes are numbered by where they first occur.
    """
    with torch.no_grad():
        key = content_keys(batch.difference.detach())
        _, user = torch.unique(batch.user_index, return_inverse=True)
        of_user = torch.zeros(int(user.max()) + 1, dtype=key.dtype, device=key.device).index_add(0, user, key)
        place = torch.empty_like(of_user, dtype=torch.long)
        place[torch.argsort(of_user, stable=True)] = torch.arange(len(place), device=key.device)
        order = torch.argsort(key, stable=True)
        order = order[torch.argsort(place[user[order]], stable=True)]
        user = place[user[order]]
    batch = batch.take(order)
    if not with_nodes:
        return Arranged(batch, user, None)
    nodes = response_nodes(response_ids(*(side.detach() for side in batch.features)), user)
    first = torch.full((int(nodes.max()) + 1,), nodes.numel(), device=nodes.device)
    first = first.scatter_reduce(0, nodes.flatten(), torch.arange(nodes.numel(), device=nodes.device), "amin")
    return Arranged(batch, user, torch.argsort(torch.argsort(first))[nodes])


def rank_within_user(user: Tensor, key: Tensor) -> Tensor:
    """Place of every row among the rows of its user by ascending ``key``: ``(N,)``, ``(N,)`` -> ``(N,)`` from 0.

    >>> rank_within_user(torch.tensor([1, 0, 1]), torch.tensor([0.5, 0.9, 0.1])).tolist()
    [1, 0, 0]
    """
    order = torch.argsort(key)
    rank = torch.empty_like(user)
    rank[order] = places(user[order])
    return rank


def places(owner: Tensor) -> Tensor:
    """Place of every row among the rows of its owner, in their order: ``(N,)`` int64 -> ``(N,)`` from 0.

    >>> places(torch.tensor([1, 0, 1, 1])).tolist()
    [0, 0, 1, 2]
    """
    order, count = torch.argsort(owner, stable=True), torch.bincount(owner)
    place = torch.empty_like(owner)
    place[order] = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner[order]]
    return place


def draw_episodes(
    user: Tensor,
    nodes: Tensor | None,
    rule: TargetRule,
    min_context: int,
    max_context: int,
    num_targets: int,
) -> Episodes:
    """Draw a context and targets for every user of a batch, from torch's random numbers; no loop over users or pairs.

    Args:
        user: ``(N,)`` int64 row of the user of each pair, numbered from 0.
        nodes: ``(N, 2)`` see `response_nodes`; only with the rule ``response``.
        rule: What a target may share with the context: ``response`` nothing, ``rest`` responses but not the pair,
            ``any`` even the pair. With ``response`` every user's share of context is uniform in [0, 1] and every node
            falls on one side; pairs across both sides are left out of the episode.
        min_context: Least context pairs of a user with enough pairs (not with ``response``).
        max_context: Most context pairs.
        num_targets: Most targets of a user.

    Returns:
        Rows of context and targets, each sorted by user.
    """
    num_users = int(user.max()) + 1
    rank = rank_within_user(user, torch.rand(len(user), device=user.device))
    if rule == "response":
        assert nodes is not None
        side = (
            torch.rand(int(nodes.max()) + 1, device=user.device)[nodes]
            < torch.rand(num_users, device=user.device)[user, None]
        )
        in_context, is_target = side.all(-1), ~side.any(-1)
        in_context &= rank_within_user(user * 2 + ~in_context, rank) < max_context
        is_target &= rank_within_user(user * 2 + ~is_target, rank) < num_targets
    else:
        count = torch.bincount(user, minlength=num_users)
        most = (count if rule == "any" else count - 1).clamp(max=max_context)
        least = most.clamp(max=min_context)
        size = least + (torch.rand(num_users, device=user.device) * (most - least + 1)).long()
        in_context = rank < size[user]
        if rule == "any":
            is_target = rank_within_user(user, torch.rand(len(user), device=user.device)) < num_targets
        else:
            is_target = ~in_context & (rank < (size + num_targets)[user])
    order = torch.argsort(user, stable=True)
    return Episodes(order[in_context[order]], order[is_target[order]])
