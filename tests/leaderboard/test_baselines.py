"""Baselines on tables small enough to count by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from plm.backbones import HashingBackbone
from plm.data.agreement import Repeats, majority, repeated_comparisons
from plm.data.datamodule import PreferenceDataModule
from plm.data.schema import PairTable, pair_table
from plm.data.sources.synthetic import SyntheticPairs
from plm.data.splits import SEEN, TEST, TRAIN, UNSEEN, VAL, Splits
from plm.data.surface import measure
from plm.leaderboard.baselines import baselines, evaluate_margins, probe

TEXTS = ["a", "bb", "cccc", "dddddddd"]


def table(pairs: list[tuple[int, int, int]]) -> PairTable:
    """(user, chosen text, rejected text) -> a table of one prompt."""
    user, chosen, rejected = (np.array(column) for column in zip(*pairs, strict=True))
    prompt = np.zeros(len(pairs), dtype=np.int64)
    users = [f"u{row}" for row in range(user.max() + 1)]
    return pair_table(users, [""], TEXTS, user=user, prompt=prompt, chosen=chosen, rejected=rejected)


def item(pairs: PairTable, text: str) -> int:
    return next(row for row, (_, response) in enumerate(pairs.texts()) if response == text)


def test_majority_counts_training_pairs_of_seen_users_only():
    pairs = table([(0, 1, 0), (0, 1, 0), (0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 3, 0)])
    stage = np.array([TRAIN, TRAIN, TRAIN, TEST, TRAIN, TEST])
    splits = Splits(np.array([SEEN, UNSEEN]), stage, "pair", 0, "")
    margins = majority(pairs, splits)
    # "bb" won 2 of 3 and "a" 1 of 3; "cccc" and "dddddddd" were never seen
    score = {"a": math.log(2 / 3), "bb": math.log(3 / 2), "cccc": 0.0, "dddddddd": 0.0}
    expected = [score[TEXTS[c]] - score[TEXTS[r]] for c, r in [(1, 0), (1, 0), (0, 1), (1, 2), (0, 1), (3, 0)]]
    np.testing.assert_allclose(margins, expected)
    groups = evaluate_margins(margins, pairs, splits)
    assert groups["seen"].accuracy.tolist() == [1.0] and groups["unseen"].accuracy.tolist() == [1.0]
    assert groups["seen"].num_pairs.tolist() == [1.0] and np.isnan(groups["seen"].global_accuracy).all()


def test_what_users_repeat_bounds_what_a_model_can_know():
    pairs = table([(0, 1, 0)] * 3 + [(0, 0, 1), (1, 0, 1), (1, 2, 1), (2, 3, 0)])
    pairs = replace(pairs, dropped={"duplicates": 2})
    # user 0 was asked again five times and said the opposite once: 4 / 5 = p^2 + (1 - p)^2
    assert repeated_comparisons(pairs) == Repeats(agreeing=4, contradicting=1)
    assert repeated_comparisons(pairs).noise_ceiling == pytest.approx((1 + math.sqrt(0.6)) / 2)
    assert math.isnan(Repeats(0, 0).noise_ceiling)


def test_probe_learns_the_sign_of_length():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(300):
        one, two = rng.choice(4, size=2, replace=False)
        short, long = min(one, two), max(one, two)
        rows.append((0, short, long) if rng.random() < 0.8 else (0, long, short))
    pairs = table(rows)
    stage = np.where(np.arange(300) < 200, TRAIN, np.where(np.arange(300) < 250, VAL, TEST))
    splits = Splits(np.array([SEEN]), stage, "pair", 0, "")
    features = measure(pairs.responses, {"log": lambda text: math.log(len(text))})[pairs.items[:, 1]]
    assert features[item(pairs, "cccc")] == math.log(4)
    margins = probe(features, pairs, splits)
    prefers_short = np.array([chosen < rejected for _, chosen, rejected in rows])
    assert ((margins > 0) == prefers_short).all()
    with pytest.raises(ValueError, match="expected validation pairs to pick the ridge by, got none"):
        probe(features, pairs, Splits(np.array([SEEN]), np.where(stage == VAL, TEST, stage), "pair", 0, ""))
    flat = probe(np.zeros_like(features), pairs, splits)
    assert not flat.any()
    assert evaluate_margins(flat, pairs, splits)["seen"].accuracy.tolist() == [0.5]


def test_oracle_knows_the_planted_answers(tmp_path: Path):
    source = SyntheticPairs(num_users=120, pairs_per_user=40, noise=0.2, seed=1)
    data = PreferenceDataModule(source, HashingBackbone(dim=16), cache_dir=str(tmp_path))
    made = baselines(data)
    assert list(made) == ["majority", "length", "surface", "oracle"]
    groups = evaluate_margins(made["oracle"](data.splits), data.table, data.splits)
    accuracy = np.average(groups["seen"].accuracy, weights=groups["seen"].num_pairs)
    assert abs(accuracy - source.truth.best_accuracy) < 0.04
    assert groups["seen"].calibration_error < 0.06  # margins are the true log-odds
    for name in ("majority", "length", "surface"):
        margins = made[name](data.splits)
        assert np.isfinite(margins).all() and len(margins) == data.table.num_pairs
        assert evaluate_margins(margins, data.table, data.splits)["seen"].accuracy.mean() < accuracy
