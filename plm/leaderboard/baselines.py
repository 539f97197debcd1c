"""Opponents that read no features: majority, length, surface of the text, and the planted truth.

Each gives every pair of a table a margin; none knows its user, except the truth. A method that does not beat them has
learned less than they hold.

Axes: N pairs, I items, F surface features, U users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from plm.data.datamodule import PreferenceDataModule
from plm.data.schema import PairTable
from plm.data.splits import SEEN, TEST, TRAIN, UNSEEN, VAL, Splits
from plm.data.surface import FORMAT, LENGTH
from plm.functional import PairList, fit_gaussian
from plm.metrics import FloatArray, IntArray, PreferenceMetric, UserTable

RIDGES = (0.1, 1.0, 10.0, 100.0)
"""Candidate precisions of the normal prior of a probe; validation pairs pick."""


def text_features(table: PairTable, features: Mapping[str, Callable[[str], float]]) -> FloatArray:
    """Features of every item's response, ``(I, F)``."""
    values = np.array([[feature(text) for feature in features.values()] for text in table.responses], dtype=np.float64)
    rows: FloatArray = values.reshape(len(table.responses), len(features))[table.items[:, 1]]
    return rows


def probe(features: FloatArray, table: PairTable, splits: Splits) -> FloatArray:
    """Margins ``(N,)`` of a ridge logistic model on ``(I, F)`` item features, fitted on training pairs of seen users.

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
    fits = [_one_user(difference[train], ridge) for ridge in RIDGES]
    losses = [np.logaddexp(0, -difference[val] @ weights).mean() for weights in fits]
    margins: FloatArray = difference @ fits[int(np.argmin(losses))]
    return margins


def _one_user(difference: FloatArray, ridge: float) -> FloatArray:
    """Weights ``(F,)`` of a logistic model whose every pair is won by chosen."""
    design = torch.from_numpy(difference) / ridge**0.5
    one, zero = torch.ones(len(design), dtype=torch.float64), torch.zeros(len(design), dtype=torch.float64)
    mode = fit_gaussian(PairList(design, zero, one, one, zero.long(), 1)).mean[0] / ridge**0.5
    weights: FloatArray = mode.numpy()
    return weights


def majority(table: PairTable, splits: Splits) -> FloatArray:
    """Margins ``(N,)`` from how often each item won among training pairs of seen users.

    An item's score is the logit of ``(wins + 1) / (pairs + 2)``: even for an item never seen.
    """
    rows = (splits.user_split[table.user] == SEEN) & (splits.stage == TRAIN) & ~table.tie
    wins = np.bincount(table.chosen[rows], minlength=len(table.items))
    losses = np.bincount(table.rejected[rows], minlength=len(table.items))
    score = np.log((wins + 1.0) / (losses + 1.0))
    margins: FloatArray = score[table.chosen] - score[table.rejected]
    return margins


def judge(margin: FloatArray, table: PairTable, splits: Splits) -> dict[str, UserTable]:
    """What margins ``(N,)`` get right on the test pairs of seen and unseen users."""
    groups = {}
    for name, code in (("seen", SEEN), ("unseen", UNSEEN)):
        rows: IntArray = np.flatnonzero((splits.user_split[table.user] == code) & (splits.stage == TEST))
        if len(rows):
            metric = PreferenceMetric(table.num_users)
            metric.update(*(torch.from_numpy(values[rows]) for values in (margin, table.user, table.tie)))
            groups[name] = metric.table()
    return groups


def baselines(data: PreferenceDataModule) -> dict[str, Callable[[], FloatArray]]:
    """Name of each baseline these data allow -> what computes its margins ``(N,)``."""
    table, splits = data.table, data.splits

    made: dict[str, Callable[[], FloatArray]] = {
        "majority": lambda: majority(table, splits),
        "length": lambda: probe(text_features(table, LENGTH), table, splits),
        "surface": lambda: probe(text_features(table, {**LENGTH, **FORMAT}), table, splits),
    }
    if (planted := data.source.planted_log_odds()) is not None:
        made["oracle"] = lambda: planted  # no method can know more
    return made
