"""Training batches of tokens: texts of similar length together, or the same number of pairs of every user.

Axes: B pairs in a batch, W processes, U users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest

import numpy as np

from plm.arrays import Float32Array, IntArray
from plm.data.collate import EpochPlace, FeaturedPairs, TrainBatches, pair_batch
from plm.data.keys import KeyArray
from plm.data.rows import TokenRows
from plm.types import PreferenceBatch, ResumableBatches

WINDOW = 32
"""Batches that are sorted by length together: enough to save padding, few enough to keep batches random."""


class TokenBatches(ResumableBatches):
    """Training batches of this process, from any batch of an epoch on, so that a fit can be resumed in the middle.

    By pair, an epoch is a random order of all pairs, in which windows of 32 batches are sorted by length; W processes
    share out each batch, so that they take the same steps as one process with W times the ``batch_size``. By user,
    every batch holds ``pairs_per_user`` pairs of as many users as ``batch_size`` allows, in an order that depends on
    nothing but the seed, the epoch and the user: a user's batches are the same whoever is trained beside. Groups of
    users that do not fit one batch take turns, batch by batch, in another order every epoch. W processes
    share out the users of each batch; where fewer users have pairs left than that, some take the same at less weight.
    By prompt, a batch holds all pairs of ``prompts_per_batch`` prompts and process, in an order made as that of pairs.

    Args:
        data: Table and tokens.
        rows: Training rows.
        weight: Their weights, mean one.
        batch_size: Most pairs per batch and process.
        pairs_per_user: Pairs of every user per batch; None = batches by pair.
        seed: Seed of the order.
        user_keys: ``(U,)`` content hashes of all users.
        place: Tells rank, world size and epoch when an epoch starts.
        prompts_per_batch: Prompts per batch and process; None = batches by pair or by user.
    """

    def __init__(
        self,
        data: FeaturedPairs,
        rows: IntArray,
        weight: Float32Array,
        batch_size: int,
        pairs_per_user: int | None,
        seed: int,
        user_keys: KeyArray,
        place: Callable[[], EpochPlace],
        prompts_per_batch: int | None = None,
    ) -> None:
        assert isinstance(data.items, TokenRows)
        self.data, self.rows, self.weight = data, rows, weight
        self.batch_size, self.pairs_per_user, self.seed = batch_size, pairs_per_user, seed
        self.user_keys, self.place, self.prompts_per_batch = user_keys, place, prompts_per_batch
        length = data.items.lengths
        self.length = np.maximum(length[data.table.chosen[rows]], length[data.table.rejected[rows]])

    def __len__(self) -> int:
        """Batches per epoch on every process."""
        return len(self._order(self.place()))

    def __iter__(self) -> Iterator[PreferenceBatch]:
        """Yield the batches of one epoch, or what `skip` left of them."""
        order = self._order(self.place())
        for index, share in order[self.take_skipped() :]:
            # processes hold different numbers of pairs: with this factor the mean over them of their means is exact
            weight = self.weight[index] * np.float32(share)
            yield pair_batch(self.data, self.rows[index], weight, evaluation=False)

    def whole_users(self) -> Iterator[PreferenceBatch]:
        """Every training pair of this process once, a user's in one batch; each user belongs to one process."""
        size = self.data.items.max_rows // 2
        return TrainBatches(self.data, self.rows, self.weight, size, self.seed, self.place).whole_users()

    def _order(self, place: EpochPlace) -> list[tuple[IntArray, float]]:
        """Positions in ``rows`` and the weight factor of every batch of an epoch."""
        if self.prompts_per_batch is not None:
            return self._by_prompt(place, self.prompts_per_batch)
        if self.pairs_per_user is not None:
            return self._by_user(place, self.pairs_per_user)
        return self._by_length(place, self.length, self.batch_size, "pair")

    def _by_prompt(self, place: EpochPlace, prompts_per_batch: int) -> list[tuple[IntArray, float]]:
        prompt = self.data.table.prompt[self.rows]
        by_prompt = np.argsort(prompt, kind="stable")
        start = np.flatnonzero(np.diff(prompt[by_prompt], prepend=-1))
        pairs = np.split(by_prompt, start[1:])
        longest = np.maximum.reduceat(self.length[by_prompt], start)
        order = self._by_length(place, longest, prompts_per_batch, "prompt")
        return [(np.concatenate([pairs[one] for one in prompts]), share) for prompts, share in order]

    def _by_length(self, place: EpochPlace, length: IntArray, size: int, name: str) -> list[tuple[IntArray, float]]:
        """Batches of ``size`` pairs or prompts, sorted in windows by their length ``(n,)``."""
        rank, world_size, epoch = place
        if len(length) < world_size:
            raise ValueError(f"expected a training {name} for each of {world_size} processes, got {len(length)} in all")
        generator = np.random.default_rng((self.seed, epoch))
        num_batches = max(1, min(-(-len(length) // (size * world_size)), len(length) // world_size))
        batches = np.array_split(generator.permutation(len(length)), num_batches)
        together: list[IntArray] = []
        for start in range(0, num_batches, WINDOW):
            window = np.concatenate(batches[start : start + WINDOW])
            by_length = window[np.argsort(length[window], kind="stable")]
            together += np.split(by_length, np.cumsum([len(part) for part in batches[start : start + WINDOW]])[:-1])
        order = []
        for number in generator.permutation(num_batches):
            whole = together[number]
            part = whole[rank::world_size]
            order.append((part, len(part) * world_size / len(whole)))
        return order

    def _by_user(self, place: EpochPlace, pairs_per_user: int) -> list[tuple[IntArray, float]]:
        rank, world_size, epoch = place
        user = self.data.table.user[self.rows]
        everyone = np.unique(user)
        if len(everyone) < world_size:
            raise ValueError(f"expected a user to train for each of {world_size} processes, got {len(everyone)} in all")
        num_groups = -(-len(everyone) // (world_size * max(1, self.batch_size // pairs_per_user)))
        by_user = np.argsort(user, kind="stable")
        start = np.searchsorted(user[by_user], np.arange(self.data.table.num_users + 1))
        rounds: list[list[tuple[IntArray, float]]] = []
        groups = np.array_split(everyone, num_groups)
        for number in np.random.default_rng((self.seed, epoch)).permutation(num_groups):
            group, order = groups[number], []
            shuffled = [self._shuffled(by_user[start[one] : start[one + 1]], one, epoch) for one in group.tolist()]
            for begin in range(0, max(map(len, shuffled)), pairs_per_user):
                parts = [rows[begin : begin + pairs_per_user] for rows in shuffled if len(rows) > begin]
                copies = 1
                mine = np.array_split(np.arange(len(parts)), world_size)[rank]
                if len(parts) < world_size:  # none may have nothing: some take the same user
                    mine = np.array([rank % len(parts)])
                    copies = len(range(rank % len(parts), world_size, len(parts)))
                index = np.concatenate([parts[one] for one in mine])
                order.append((index, len(index) * world_size / (sum(map(len, parts)) * copies)))
            rounds.append(order)
        return [batch for batches in zip_longest(*rounds) for batch in batches if batch is not None]

    def _shuffled(self, rows: IntArray, user: int, epoch: int) -> IntArray:
        """Pairs of a user in an order that depends on nothing but the seed, the epoch and the user."""
        return np.random.default_rng((self.seed, epoch, int(self.user_keys[user]))).permutation(rows)
