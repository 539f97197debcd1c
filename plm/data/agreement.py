"""What the pairs alone foretell of a test: the majority's answers, and how often users repeat their own.

Axes: N pairs of a table, I items, C comparisons.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from plm.arrays import Float64Array, IntArray
from plm.data.keys import number_pairs
from plm.data.schema import PairTable
from plm.data.splits import SEEN, TRAIN, Splits
from plm.data.surface import wilson


def majority(table: PairTable, splits: Splits) -> Float64Array:
    """Compute margins ``(N,)`` from how often each item won among training pairs of seen users.

    An item's score is the logit of ``(wins + 1) / (pairs + 2)``: even for an item never seen.
    """
    rows = (splits.user_split[table.user] == SEEN) & (splits.stage == TRAIN) & ~table.tie
    wins = np.bincount(table.chosen[rows], minlength=len(table.items))
    losses = np.bincount(table.rejected[rows], minlength=len(table.items))
    score = np.log((wins + 1.0) / (losses + 1.0))
    margins: Float64Array = score[table.chosen] - score[table.rejected]
    return margins


class Repeats(NamedTuple):
    """Comparisons that a user was asked again."""

    agreeing: int
    """Answers that a user had given before to the same two responses, those that the table left out included."""
    contradicting: int
    """Comparisons that a user answered both ways."""

    @property
    def noise_ceiling(self) -> float:
        """A bound on the accuracy of a model that knows every user's more frequent answer; nan where none was repeated.

        Somebody who gives it with probability p agrees with themselves in ``a = p^2 + (1 - p)^2`` of the repetitions,
        so that ``p = (1 + sqrt(2 a - 1)) / 2``. That is exact where nobody was asked the same more than twice. With
        more answers a comparison counts as contradicted once, and the bound is too high; so it is with copied rows.

        >>> round(Repeats(agreeing=82, contradicting=18).noise_ceiling, 2)
        0.9
        """
        num_repeated = self.agreeing + self.contradicting
        return _ceiling(self.agreeing / num_repeated) if num_repeated else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the ceiling, from the score interval of how often users agreed, over repetitions.

        >>> [round(bound, 2) for bound in Repeats(agreeing=82, contradicting=18).interval]
        [0.84, 0.94]
        """
        share = wilson(self.agreeing, self.agreeing + self.contradicting)
        return _ceiling(share.low), _ceiling(share.high)


def _ceiling(agreement: float) -> float:
    """Chance of the more frequent answer of somebody who repeats it with this chance."""
    return (1 + math.sqrt(max(2 * agreement - 1, 0.0))) / 2


def _answers(table: PairTable, owner: IntArray) -> tuple[IntArray, IntArray]:
    """First row ``(C,)`` of each comparison of an owner ``(N,)``, and how often its items were chosen, ``(2, C)``.

    Ties are left out.
    """
    rows = np.flatnonzero(~table.tie)
    first, number = number_pairs(owner[rows], table.comparison[rows])
    is_lower = (table.chosen < table.rejected)[rows]
    counts = [np.bincount(number[which], minlength=len(first)) for which in (is_lower, ~is_lower)]
    return rows[first], np.stack(counts)


def repeated_comparisons(table: PairTable) -> Repeats:
    """Count the comparisons that users answered again; ties are left out."""
    _, counts = _answers(table, table.user)
    again = table.dropped.get("duplicates", 0) + np.maximum(counts - 1, 0).sum()
    return Repeats(int(again), int(counts.all(0).sum()))


def conflicts(table: PairTable) -> IntArray:
    """First row of every comparison that its user answered both ways."""
    first, counts = _answers(table, table.user)
    return first[counts.all(0)]


def agreement(table: PairTable) -> tuple[int, float]:
    """Pairs judged by several users, and the best accuracy on them of a model that does not know the user."""
    _, counts = _answers(table, np.zeros_like(table.user))
    several = counts[:, counts.sum(0) > 1]
    total = int(several.sum())
    return total, float(several.max(0).sum()) / max(total, 1)
