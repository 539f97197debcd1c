"""Baselines that read no features: majority, length, surface of the text, and the planted truth.

Each gives every pair of a table a margin; none knows its user, except the truth. A method that does not beat them has
learned less than they hold.

Axes: N pairs, I items, F surface features, U users.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from plm.arrays import Float64Array, IntArray
from plm.data.agreement import majority
from plm.data.datamodule import PreferenceDataModule
from plm.data.schema import PairTable
from plm.data.splits import SEEN, TEST, TRAIN, UNSEEN, VAL, Splits
from plm.data.surface import FORMAT, LENGTH, measure
from plm.functional import PairList, fit_gaussian
from plm.metrics import PreferenceMetric, UserTable

RIDGES = (0.1, 1.0, 10.0, 100.0)
"""Candidate precisions of the normal prior of a probe; validation pairs pick."""


def probe(features: Float64Array, table: PairTable, splits: Splits) -> Float64Array:
    """Fit a ridge logistic model on ``(I, F)`` item features to training pairs of seen users; returns margins ``(N,)``.

    Signs and scales are learned; all pairs weigh the same. Nothing but training and validation pairs is looked at.

    Raises:
        ValueError: If there are no validation pairs.
    """
    difference = features[table.chosen] - features[table.rejected]
    seen = splits.user_split[table.user] == SEEN
    train, val = seen & (splits.stage == TRAIN) & ~table.tie, seen & (splits.stage == VAL) & ~table.tie
    if not val.any():
        raise ValueError("expected validation pairs to pick the ridge by, got none; raise data.val_rows")
    scale = np.sqrt((difference[train] ** 2).mean(axis=0))
    difference = np.divide(difference, scale, out=np.zeros_like(difference), where=scale > 0)
    fits = [_logistic(difference[train], ridge) for ridge in RIDGES]
    losses = [np.logaddexp(0, -difference[val] @ weights).mean() for weights in fits]
    margins: Float64Array = difference @ fits[int(np.argmin(losses))]
    return margins


def _logistic(difference: Float64Array, ridge: float) -> Float64Array:
    """Weights ``(F,)`` of a logistic model in which chosen wins every pair."""
    design = torch.from_numpy(difference) / ridge**0.5
    ones, zeros = torch.ones(len(design), dtype=torch.float64), torch.zeros(len(design), dtype=torch.float64)
    mode = fit_gaussian(PairList(design, zeros, ones, ones, zeros.long(), 1)).mean[0] / ridge**0.5
    weights: Float64Array = mode.numpy()
    return weights


def evaluate_margins(margin: Float64Array, table: PairTable, splits: Splits) -> dict[str, UserTable]:
    """Measure what margins ``(N,)`` get right on the test pairs of seen and unseen users."""
    groups = {}
    for name, code in (("seen", SEEN), ("unseen", UNSEEN)):
        rows: IntArray = np.flatnonzero((splits.user_split[table.user] == code) & (splits.stage == TEST))
        if len(rows):
            metric = PreferenceMetric(table.num_users)
            metric.update(*(torch.from_numpy(values[rows]) for values in (margin, table.user, table.tie)))
            groups[name] = metric.table()
    return groups


def baselines(data: PreferenceDataModule) -> dict[str, Callable[[Splits], Float64Array]]:
    """Name every baseline that these data allow -> what computes its margins ``(N,)`` from a split of the pairs."""
    table = data.table
    response = table.items[:, 1]

    @cache  # the texts are those of every split
    def measured(with_format: bool) -> Float64Array:
        features: Float64Array = measure(table.responses, {**LENGTH, **FORMAT} if with_format else LENGTH)[response]
        return features

    margins: dict[str, Callable[[Splits], Float64Array]] = {
        "majority": lambda splits: majority(table, splits),
        "length": lambda splits: probe(measured(False), table, splits),
        "surface": lambda splits: probe(measured(True), table, splits),
    }
    if (planted := data.source.planted_log_odds()) is not None:
        margins["oracle"] = lambda splits: planted  # no method can know more
    return margins
