"""Which text is read with which adapter.

Axes: U users, B texts, G groups of B / G texts, P numbers of one adapter.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Owned(NamedTuple):
    """Adapters, or prefixes, of a table, and which text reads with which."""

    table: Tensor
    """``(U, P)``."""
    row: Tensor | None = None
    """``(B,)`` int64 row of each text; None = all read with the only row."""

    def take(self, rows: Tensor) -> Owned:
        """The adapters of some of the texts, ``(n,)`` int64."""
        return self if self.row is None else Owned(self.table, self.row[rows])

    def twice(self) -> Owned:
        """The adapters of the texts, followed by as many other texts of the same owners."""
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
