"""Who reads with which adapter, and texts written by a mixture of adapters.

Axes: U users, B texts, G groups of B / G texts, P numbers of one adapter, K bases, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plm.backbones import Writing
from plm.types import Tokens


class Owned(NamedTuple):
    """Adapters, or prefixes, of a table, and which text reads with which."""

    table: Tensor
    """``(U, P)``."""
    row: Tensor | None = None
    """``(B,)`` int64 row of each text; None = all read with the only row."""

    def take(self, rows: Tensor) -> Owned:
        """Those of some texts, ``(n,)`` int64."""
        return self if self.row is None else Owned(self.table, self.row[rows])

    def twice(self) -> Owned:
        """Those of the same texts side by side with as many others of the same owners."""
        return self if self.row is None else Owned(self.table, torch.cat([self.row, self.row]))

    def groups(self) -> Tensor:
        """``(G, P)`` adapters of G consecutive equal groups of the texts; the gradient of a table is sparse."""
        if self.row is None:
            return self.table
        return F.embedding(grouped(self.row), self.table, sparse=self.table.requires_grad)


def grouped(row: Tensor) -> Tensor:
    """Owner of each of as few equal consecutive groups as there can be: ``(B,)`` -> ``(G,)``.

    >>> grouped(torch.tensor([4, 4, 4, 4, 1, 1])).tolist()
    [4, 4, 1]
    """
    owner: Tensor
    owner, count = torch.unique_consecutive(row, return_counts=True)
    counts = count.tolist()
    size = math.gcd(*counts) if counts else 1
    return owner if max(counts, default=size) == size else owner.repeat_interleave(count // size)


class MixedWriting:
    """Texts written by a mixture of policies: the next token is drawn from their weighted geometric mean.

    With weights that sum to one, log p = sum_k w_k log p_k up to a constant at each place, as log-ratios to the
    reference are mixed in training.

    Args:
        parts: One batch of the same texts for every policy.
        weights: ``(B, K)`` non-negative, each row summing to one.
    """

    def __init__(self, parts: Sequence[Writing], weights: Tensor) -> None:
        """See the class."""
        self.parts, self.weights = parts, weights

    def start(self, prompts: Tokens) -> Tensor:
        """Read the prompts, padded on the left; logits ``(B, V)`` of the first token."""
        return self._mix([part.start(prompts) for part in self.parts])

    def step(self, token: Tensor) -> Tensor:
        """Write one token ``(B,)`` to every text; logits ``(B, V)`` of the next."""
        return self._mix([part.step(token) for part in self.parts])

    def take(self, rows: Tensor) -> None:
        """Go on with these of the B texts, ``(n,)`` int64."""
        for part in self.parts:
            part.take(rows)
        self.weights = self.weights[rows]

    def _mix(self, logits: Sequence[Tensor]) -> Tensor:
        mixed = torch.zeros_like(logits[0])
        for part, weight in zip(logits, self.weights.to(mixed).unbind(1), strict=True):
            mixed += weight[:, None] * part.log_softmax(-1)
        return mixed
