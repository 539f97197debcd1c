"""What the pairs alone foretell of a test: the majority's answers, and how often users repeat their own.

Axes: N pairs of a table, I items.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from plm.arrays import Float64Array
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


def repeated_comparisons(table: PairTable) -> Repeats:
    """Count the comparisons that users answered again; ties are left out."""
    rows = np.flatnonzero(~table.tie)
    _, number = number_pairs(table.user[rows], table.comparison[rows])
    forward = np.bincount(number, weights=(table.chosen < table.rejected)[rows])
    backward = np.bincount(number) - forward
    again = table.dropped.get("duplicates", 0) + sum(np.maximum(each - 1, 0).sum() for each in (forward, backward))
    return Repeats(int(again), int(((forward > 0) & (backward > 0)).sum()))
