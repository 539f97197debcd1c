"""Rows of a table to batches: large index-sliced ``PreferenceBatch``es, no Python per pair.

Loaders are plain iterables of ready batches. A ``DataLoader`` would add worker processes, per-item collation and a
sampler that Lightning replaces under DDP; ready batches need none of them and share the work between ranks themselves.

Axes: N pairs, I items, P prompts, U users, D feature width, S support pairs of one user (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from plm.arrays import Float32Array, IntArray
from plm.data.keys import KeyArray, rows_of_runs
from plm.data.rows import BatchRows, TokenRows
from plm.data.schema import PairTable
from plm.data.splits import nested_supports
from plm.types import Context, PreferenceBatch, ResumableBatches, Tokens


@dataclass(frozen=True)
class FeaturedPairs:
    """A table together with the features, or tokens, of its texts."""

    table: PairTable
    items: BatchRows
    """One row per item."""
    prompts: BatchRows | None
    """One row per prompt alone, or None."""
    user_index: IntArray
    """``(U,)`` row of every user in the training table, -1 if unseen."""


class EpochPlace(NamedTuple):
    """The process and the epoch that a loader runs in."""

    rank: int
    world_size: int
    epoch: int


def pair_batch(data: FeaturedPairs, rows: IntArray, weight: Float32Array, *, evaluation: bool) -> PreferenceBatch:
    """Gather the pairs at ``rows``.

    Args:
        data: Table and features.
        rows: ``(B,)`` rows of the table.
        weight: ``(B,)`` loss weights.
        evaluation: Whether to say which pair of the table each is, and of which of all users (``pair_row``,
            ``user_row``).

    Returns:
        A batch without context.
    """
    table = data.table
    return PreferenceBatch(
        chosen=data.items.gather(table.chosen[rows]),
        rejected=data.items.gather(table.rejected[rows]),
        user_index=torch.from_numpy(data.user_index[table.user[rows]]),
        weight=torch.from_numpy(weight),
        tie=torch.from_numpy(table.tie[rows]),
        prompt=None if data.prompts is None else data.prompts.gather(table.prompt[rows]),
        chosen_score=torch.from_numpy(table.chosen_score[rows]),
        rejected_score=torch.from_numpy(table.rejected_score[rows]),
        user_row=torch.from_numpy(table.user[rows]) if evaluation else None,
        pair_row=torch.from_numpy(rows) if evaluation else None,
    )


def build_context(data: FeaturedPairs, rows: IntArray, users: IntArray) -> Context:
    """Support pairs of ``users``, padded to the longest (at least one, masked, where nobody has any).

    Args:
        data: Table and features.
        rows: ``(n,)`` rows of the table; those of other users are ignored.
        users: ``(U,)`` rows of ``user_ids``, in the order of the context.

    Returns:
        The context; a user without rows has an empty mask.
    """
    table = data.table
    place = np.full(table.num_users, -1, dtype=np.int64)
    place[users] = np.arange(len(users))
    owner = place[table.user[rows]]
    order = np.argsort(owner, kind="stable")
    order = order[owner[order] >= 0]
    rows, owner = rows[order], owner[order]
    count = np.bincount(owner, minlength=len(users))
    mask = np.arange(max(int(count.max(initial=0)), 1))[None, :] < count[:, None]  # (U, S)

    slots = torch.from_numpy(mask)

    def pad(values: Tensor) -> Tensor:
        out = values.new_zeros((*mask.shape, *values.shape[1:]))
        out[slots] = values
        return out

    def side(source: BatchRows, which: IntArray) -> Tensor | Tokens:
        gathered = source.gather(which)
        return gathered.map(pad) if isinstance(gathered, Tokens) else pad(gathered)

    return Context(
        chosen=side(data.items, table.chosen[rows]),
        rejected=side(data.items, table.rejected[rows]),
        mask=slots,
        weight=pad(torch.from_numpy(table.weight[rows])),
        prompt=None if data.prompts is None else side(data.prompts, table.prompt[rows]),
        tie=pad(torch.from_numpy(table.tie[rows])),
    )


def split_weights(table: PairTable, rows: IntArray, macro: bool, *, evaluation: bool = False) -> Float32Array:
    """Loss weights of mean one over ``rows``; with ``macro`` every user's sum to the same.

    Raises:
        ValueError: If all weights of training pairs are zero.
    """
    weight = table.weight[rows].astype(np.float64)
    if macro:
        total = np.bincount(table.user[rows], weights=weight, minlength=table.num_users)[table.user[rows]]
        weight = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    if len(rows) and not weight.any():
        if evaluation:
            return np.ones(len(rows), dtype=np.float32)
        raise ValueError(
            f"expected a positive weight somewhere, got 0 for all {len(rows)} pairs; correct the weight column"
        )
    return (weight / (weight.mean() if len(rows) else 1.0)).astype(np.float32)


class TrainBatches(ResumableBatches):
    """Training batches of this rank, made of whole users; every user goes to one rank.

    A method that solves for a user while it trains needs all of that user's pairs at once.

    Args:
        data: Table and features.
        rows: Training rows.
        weight: Their weights, mean one.
        batch_size: About how many pairs per batch and rank, users in another order every epoch; None = all in one
            batch, built once.
        seed: Seed of the order.
        place: Tells rank, world size and epoch when an epoch starts.
    """

    def __init__(
        self,
        data: FeaturedPairs,
        rows: IntArray,
        weight: Float32Array,
        batch_size: int | None,
        seed: int,
        place: Callable[[], EpochPlace],
    ) -> None:
        order = np.argsort(data.table.user[rows], kind="stable")
        self.data, self.rows, self.weight = data, rows[order], weight[order]
        self.batch_size, self.seed, self.place = batch_size, seed, place
        user = data.table.user[self.rows]
        self.start = np.flatnonzero(np.diff(user, prepend=-1))  # first row of every user
        self.whole: tuple[PreferenceBatch, np.float32] | None = None

    def _num_batches(self, world_size: int) -> int:
        """Batches per epoch on every rank."""
        if self.batch_size is None:
            return 1
        return max(1, min(-(-len(self.rows) // (world_size * self.batch_size)), len(self.start) // world_size))

    def __len__(self) -> int:
        """Batches per epoch on every rank."""
        return self._num_batches(self.place().world_size)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        """Yield the batches of one epoch, or what `skip` left of them."""
        for batch, _ in self._epoch(self.take_skipped()):
            yield batch

    def whole_users(self) -> Iterator[PreferenceBatch]:
        """Every training pair of this process once, with its own weight: losses are summed, not averaged by batch."""
        for batch, factor in self._epoch(0):
            yield batch if factor == 1 else batch._replace(weight=batch.weight / float(factor))

    def _epoch(self, skipped: int) -> Iterator[tuple[PreferenceBatch, np.float32]]:
        """The batches of an epoch after those skipped, and what their weights were multiplied by."""
        rank, world_size, epoch = self.place()
        if len(self.start) < world_size:
            raise ValueError(
                f"expected at least one user to train on per process, got {len(self.start)} for {world_size} processes"
            )
        num_batches = self._num_batches(world_size)
        if num_batches == 1 and self.whole is not None:
            yield self.whole
            return
        users = np.random.default_rng((self.seed, epoch if num_batches > 1 else 0)).permutation(len(self.start))
        end = np.append(self.start[1:], len(self.rows))
        # ranks hold different numbers of pairs: with this factor the mean over ranks of their means is the exact mean
        for number, batch_users in enumerate(np.array_split(users, num_batches * world_size)):
            if number % world_size != rank or number // world_size < skipped:
                continue
            batch_users = np.sort(batch_users)
            index = rows_of_runs(self.start[batch_users], end[batch_users])
            factor = np.float32(len(index) * num_batches * world_size / len(self.rows))
            batch = pair_batch(self.data, self.rows[index], self.weight[index] * factor, evaluation=False)
            if num_batches == 1:
                self.whole = batch, factor
            yield batch, factor


class SupportDraws(NamedTuple):
    """The pool that the support of unseen users is drawn from, and the draws."""

    rows: IntArray
    """Pool of support pairs."""
    keys: KeyArray
    """Their content hashes."""
    draws: Sequence[tuple[int | None, int]]
    """(shots, repeat) to evaluate, in order; shots None = all."""
    seed: int
    dialogues: KeyArray | None = None
    """`plm.data.splits.dialogue_keys` of the pool, where a shot is a dialogue and not a pair."""


class EvalBatches:
    """Evaluation batches of this rank: whole users, chunked to bound memory; every user goes to one rank.

    Of fewer seen users than ranks, tokens are shared out by pair: metrics are sums by user, whoever adds to them.
    Methods on features keep the users they solve for on one rank.

    Args:
        data: Table and features.
        rows: Pairs to predict.
        weight: Their weights, mean one.
        circle: Users to evaluate, as rows of ``user_ids``; each one's other-user control is the next.
        support: Support pairs for unseen users; None for seen users.
        few_shot: Whether to mark batches with shots and repeat, and leave out the other-user control.
        place: Tells rank and world size when an epoch starts.
    """

    def __init__(
        self,
        data: FeaturedPairs,
        rows: IntArray,
        weight: Float32Array,
        circle: IntArray,
        support: SupportDraws | None,
        few_shot: bool,
        place: Callable[[], EpochPlace],
    ) -> None:
        self.data, self.circle, self.support, self.few_shot, self.place = data, circle, support, few_shot, place
        order = np.argsort(data.table.user[rows], kind="stable")
        self.rows, self.weight = rows[order], weight[order]
        self.start = np.searchsorted(data.table.user[self.rows], np.arange(data.table.num_users + 1))
        self.other = np.full(data.table.num_users, -1, dtype=np.int64)
        self.other[circle] = np.roll(circle, -1)

    def _chunks(self, num_shots: int | None) -> list[IntArray]:
        """Consecutive users of this rank's part of the circle, as many as fit into one batch."""
        rank, world_size, _ = self.place()
        num_query = np.diff(self.start)
        num_support = np.zeros_like(num_query)
        if self.support is not None:
            num_support = np.bincount(self.data.table.user[self.support.rows], minlength=len(num_query))
            if num_shots is not None and self.support.dialogues is None:
                num_support = np.minimum(num_support, num_shots)
            if not self.few_shot:
                num_support = np.maximum(num_support, num_support[self.other])
        limit = max(1, self.data.items.max_rows // 2)
        queried = self.circle[num_query[self.circle] > 0]
        users = queried if self._by_pair(len(queried)) else np.array_split(queried, world_size)[rank]
        chunks: list[IntArray] = []
        while len(users):
            candidates = users[:limit]  # each has at least one pair
            longest = np.maximum.accumulate(num_support[candidates])
            size = np.cumsum(num_query[candidates]) + longest * np.arange(2, len(candidates) + 2)
            taken = max(1, int(np.searchsorted(size, limit, side="right")))
            chunks.append(users[:taken])
            users = users[taken:]
        return chunks

    def __len__(self) -> int:
        """Batches on this rank."""
        draws = [(None, 0)] if self.support is None else self.support.draws
        length = {shots: len(self._chunks(shots)) for shots, _ in draws}
        return sum(length[shots] for shots, _ in draws)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        """Yield every batch once."""
        if self.support is None:
            for users in self._chunks(None):
                yield self._seen(users)
            return
        rows, keys, draws, seed, dialogues = self.support
        chunks = {shots: self._chunks(shots) for shots, _ in draws}
        for shots, repeat in draws:
            pool = nested_supports(rows, self.data.table.user[rows], keys, shots, repeat, seed, dialogues)
            for users in chunks[shots]:
                batch = self._unseen(users, pool)
                if self.few_shot:
                    like = torch.ones_like(batch.user_index)
                    batch = batch._replace(num_shots=like * int(shots or 0), repeat=like * repeat)
                yield batch

    def _by_pair(self, num_users: int) -> bool:
        """Whether so many users are fewer than the ranks, so that this one takes some pairs of each of them."""
        return self.support is None and isinstance(self.data.items, TokenRows) and num_users < self.place().world_size

    def _pairs(self, users: IntArray) -> tuple[PreferenceBatch, IntArray]:
        """Pairs of users, or this rank's part of them, and the user of each pair, ``(B,)``."""
        index = rows_of_runs(self.start[users], self.start[users + 1])
        if self._by_pair(int((np.diff(self.start)[self.circle] > 0).sum())):
            rank, world_size, _ = self.place()
            index = index[rank::world_size]
        batch = pair_batch(self.data, self.rows[index], self.weight[index], evaluation=True)
        return batch, self.data.table.user[self.rows[index]]

    def _seen(self, users: IntArray) -> PreferenceBatch:
        batch, user = self._pairs(users)
        if len(self.circle) < 2:
            return batch
        return batch._replace(other_index=torch.from_numpy(self.data.user_index[self.other[user]]))

    def _unseen(self, users: IntArray, pool: IntArray) -> PreferenceBatch:
        batch, user = self._pairs(users)
        with_other = not self.few_shot and len(self.circle) > 1
        wanted = np.concatenate([users, np.setdiff1d(self.other[users], users)]) if with_other else users
        place = np.full(self.data.table.num_users, -1, dtype=np.int64)
        place[wanted] = np.arange(len(wanted))
        batch = batch._replace(
            context=build_context(self.data, pool, wanted),
            context_row=torch.from_numpy(place[user]),
        )
        return batch._replace(other_row=torch.from_numpy(place[self.other[user]])) if with_other else batch
