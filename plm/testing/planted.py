"""Planted users with known answers in feature space, and a backbone that needs nothing.

Axes: U users, S pairs of one user, B pairs in a batch, D feature width, R planted rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import lightning as L
import torch
from torch import Tensor

from plm.backbones import Backbone, Key
from plm.types import Context, PreferenceBatch


class TinyBackbone(Backbone):
    """Features of a text as the mean of random vectors, one per word, fixed by the word: instant, and no download.

    Args:
        dim: Width of the features.
    """

    def __init__(self, dim: int = 8) -> None:
        self.dim = dim

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return self.dim

    def key(self) -> Key:
        """Identity of the cache."""
        return {"engine": "plm.testing.TinyBackbone", "dim": self.dim}

    def render(self, prompt: str, response: str) -> str:
        """The response alone."""
        return response

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Features ``(N, D)`` of N texts."""
        return torch.stack([torch.stack([self._vector(word) for word in text.split(" ")]).mean(0) for text in texts])

    def _vector(self, word: str) -> Tensor:
        """``(D,)`` standard normal numbers."""
        seed = int.from_bytes(blake2b(word.encode(), digest_size=7).digest(), "big")
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))


class Batches:
    """A loader of ready batches; Lightning would take a plain list apart.

    Args:
        batches: What it hands out.
    """

    def __init__(self, *batches: PreferenceBatch) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        """Hand out every batch once."""
        return iter(self.batches)


class PlantedData(L.LightningDataModule):
    """Users with known low-rank preferences straight in feature space, as much of a datamodule as a method reads.

    A response with features x has the reward ``x @ directions[u]`` for user u, with
    ``directions = signal * (mean + spread * deviations) @ basis.T``, where ``mean`` is the first unit vector and the
    deviations are standard normal. Users choose by the Bradley-Terry model; feature differences are standard normal.

    Args:
        num_users: Number of seen users.
        num_unseen: Number of unseen users.
        pairs_per_user: Training pairs of a seen user.
        num_shots: Support pairs of an unseen user.
        num_test: Validation pairs of a seen user, test pairs of a seen user, and query pairs of an unseen user.
        feature_dim: Width D.
        rank: Rank R of the planted preferences; the population's direction is in their span.
        spread: Standard deviation of the users around the population, whose own direction has length 1.
        unseen_spread: The same of the unseen users; null = as the seen ones.
        signal: What rewards are multiplied by: how sure users are.
        shuffle_users: Deal the pairs of each part out to its users at random: the control without personal signal.
        seed: Another seed plants other users.
    """

    view = "features"
    reference_head: Tensor | None = None

    def __init__(
        self,
        num_users: int = 12,
        num_unseen: int = 6,
        pairs_per_user: int = 30,
        num_shots: int = 10,
        num_test: int = 20,
        feature_dim: int = 8,
        rank: int = 2,
        spread: float = 1.0,
        unseen_spread: float | None = None,
        signal: float = 2.0,
        shuffle_users: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_users, self.feature_dim = num_users, feature_dim
        self.user_ids = [f"seen-{row}" for row in range(num_users)]
        self.all_user_ids = self.user_ids + [f"unseen-{row}" for row in range(num_unseen)]
        self._draw = torch.Generator().manual_seed(seed)
        self._shuffle = shuffle_users
        self.basis: Tensor = torch.linalg.qr(self._normal(feature_dim, rank)).Q
        """``(D, R)`` orthonormal; the first column is the population's direction."""
        weights = spread * self._normal(num_users + num_unseen, rank)
        if unseen_spread is not None:
            weights[num_users:] = unseen_spread * self._normal(num_unseen, rank)
        weights[:, 0] += 1.0
        self.directions = signal * weights @ self.basis.T
        """``(U, D)`` of all users, the seen ones first."""
        seen, unseen = torch.arange(num_users), torch.arange(num_users, num_users + num_unseen)
        self.train_batch = self._batch(seen, pairs_per_user)._replace(user_row=None)
        self.val_batch = self._batch(seen, num_test)
        other = (self.val_batch.user_index + 1) % num_users
        self.val_batch = self.val_batch._replace(other_index=other)
        self.test_batch = self._batch(seen, num_test)._replace(other_index=other)
        chosen, rejected = self._pairs(unseen, num_shots)
        self.context = Context(
            chosen, rejected, mask=torch.ones(num_unseen, num_shots).bool(), weight=torch.ones(num_unseen, num_shots)
        )
        """Support of the unseen users."""
        row = torch.arange(num_unseen).repeat_interleave(num_test)
        self.unseen_batch = self._batch(unseen, num_test)._replace(
            user_index=torch.full_like(row, -1),
            context=self.context,
            context_row=row,
            other_row=(row + 1) % num_unseen,
        )

    def change(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Replace both responses of every pair, wherever it occurs: chosen and rejected ``(..., D)`` -> the same."""

        def sides(pairs: PreferenceBatch | Context) -> dict[str, Any]:
            return dict(zip(("chosen", "rejected"), change(*pairs.features), strict=True))

        self.context = self.context._replace(**sides(self.context))
        for name in ("train_batch", "val_batch", "test_batch", "unseen_batch"):
            batch: PreferenceBatch = getattr(self, name)
            context = None if batch.context is None else self.context
            setattr(self, name, batch._replace(context=context, **sides(batch)))

    def reverse_users(self) -> None:
        """Give the seen users the opposite order and other names; the rows of what is evaluated keep their places."""

        def reversed_rows(batch: PreferenceBatch) -> PreferenceBatch:
            other = None if batch.other_index is None else self.num_users - 1 - batch.other_index
            return batch._replace(user_index=self.num_users - 1 - batch.user_index, other_index=other)

        self.user_ids = [f"renamed-{row}" for row in range(self.num_users)]
        self.val_batch, self.test_batch = map(reversed_rows, (self.val_batch, self.test_batch))
        train = reversed_rows(self.train_batch)
        order = torch.argsort(train.user_index, stable=True)
        fields: dict[str, Any] = {name: value for name, value in train._asdict().items() if isinstance(value, Tensor)}
        self.train_batch = train._replace(**{name: value[order] for name, value in fields.items()})

    def train_dataloader(self) -> Batches:
        """All training pairs as one batch."""
        return Batches(self.train_batch)

    def val_dataloader(self) -> list[Batches]:
        """Validation pairs of the seen users."""
        return [Batches(self.val_batch)]

    def test_dataloader(self) -> list[Batches]:
        """Test pairs of the seen users, then query pairs of the unseen users."""
        return [Batches(self.test_batch), Batches(self.unseen_batch)]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._draw)

    def _pairs(self, users: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """``count`` pairs of each user: chosen and rejected, ``(U, count, D)``."""
        left, right = (self._normal(len(users), count, self.feature_dim) / 2**0.5 for _ in range(2))
        chance = torch.sigmoid(((left - right) * self.directions[users, None]).sum(-1))
        left_wins = (torch.rand(chance.shape, generator=self._draw) < chance)[..., None]
        chosen, rejected = torch.where(left_wins, left, right), torch.where(left_wins, right, left)
        if self._shuffle:
            order = torch.randperm(len(users) * count, generator=self._draw)
            chosen, rejected = (value.flatten(0, 1)[order].view_as(value) for value in (chosen, rejected))
        return chosen, rejected

    def _batch(self, users: Tensor, count: int) -> PreferenceBatch:
        chosen, rejected = (value.flatten(0, 1) for value in self._pairs(users, count))
        row = users.repeat_interleave(count)
        return PreferenceBatch(
            chosen, rejected, row, torch.ones(len(row)), torch.zeros(len(row), dtype=torch.bool), user_row=row
        )
