from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from plm.data import rows
from plm.data.collate import (
    EpochPlace,
    EvalBatches,
    FeaturedPairs,
    SupportDraws,
    TrainBatches,
    build_context,
    pair_batch,
    split_weights,
)
from plm.data.keys import content_keys
from plm.data.rows import FeatureRows
from plm.data.schema import PairTable, pair_table
from plm.data.splits import user_circle
from plm.types import PreferenceBatch

NUM_USERS, PAIRS = 6, 10


@pytest.fixture
def table() -> PairTable:
    total = NUM_USERS * PAIRS
    return pair_table(
        [f"u{index}" for index in range(NUM_USERS)],
        ["p0", "p1"],
        [f"r{index}" for index in range(2 * total)],
        user=np.repeat(np.arange(NUM_USERS), PAIRS),
        prompt=np.arange(total) % 2,
        chosen=2 * np.arange(total),
        rejected=2 * np.arange(total) + 1,
        weight=np.linspace(0.5, 2, total).astype(np.float32),
        tie=np.arange(total) % 7 == 0,
    )


@pytest.fixture
def data(table: PairTable) -> FeaturedPairs:
    """The first feature says whose and which response it is: pair n compares responses 2n and 2n + 1."""
    features = np.stack([table.items[:, 1], np.ones(len(table.items))], axis=1).astype(np.float32)
    return FeaturedPairs(
        table, FeatureRows(features), FeatureRows(np.eye(2, dtype=np.float32)), np.array([0, 1, 2, -1, -1, -1])
    )


def place(rank: int = 0, world_size: int = 1, epoch: int = 0) -> Any:
    return lambda: EpochPlace(rank, world_size, epoch)


def train(data: FeaturedPairs, batch_size: int | None, **where: int) -> TrainBatches:
    """Users 0, 1 and 2 train on 10, 9 and 7 pairs, which stand in no order."""
    rows = np.random.default_rng(0).permutation([*range(10), *range(10, 19), *range(20, 27)])
    return TrainBatches(data, rows, split_weights(data.table, rows, True), batch_size, 0, place(**where))


TRAINED = sorted(2.0 * row for row in [*range(10), *range(10, 19), *range(20, 27)])


def evaluation(
    data: FeaturedPairs, draws: list[tuple[int | None, int]] | None, few_shot: bool = False, **where: int
) -> EvalBatches:
    table, keys = data.table, content_keys(data.table)
    seen, query = table.user < 3, np.arange(len(table.user)) % PAIRS >= 6
    rows = np.flatnonzero(query & (seen if draws is None else ~seen))
    pool = np.flatnonzero(~query & ~seen)
    users = np.arange(3) if draws is None else np.arange(3, 6)
    circle = users[user_circle(keys.user[users])]
    support = None if draws is None else SupportDraws(pool, keys.pair[pool], draws, 0)
    weight = split_weights(table, rows, True)
    return EvalBatches(data, rows, weight, circle, support, few_shot, place(**where))


def items(batches: list[PreferenceBatch]) -> list[float]:
    return sorted(value for batch in batches for value in batch.chosen[:, 0].tolist())  # type: ignore[index]


def test_pair_batch_gathers(data: FeaturedPairs) -> None:
    rows = np.array([41, 0])
    batch = pair_batch(data, rows, np.ones(2, np.float32), evaluation=True)
    assert batch.chosen[:, 0].tolist() == (2 * rows).tolist()  # type: ignore[index]
    assert batch.rejected[:, 0].tolist() == (2 * rows + 1).tolist()  # type: ignore[index]
    assert batch.user_index.tolist() == [-1, 0]
    assert batch.user_row is not None and batch.user_row.tolist() == [4, 0]
    assert batch.prompt is not None and batch.prompt[:, 1].tolist() == [1, 0]  # type: ignore[index]
    assert batch.tie.tolist() == [False, True]
    assert pair_batch(data, rows, np.ones(2, np.float32), evaluation=False).user_row is None


def test_context_is_padded_in_the_order_asked_for(data: FeaturedPairs) -> None:
    rows = np.array([30, 31, 50, 10, 32])
    context = build_context(data, rows, np.array([5, 4, 3]))
    assert context.mask.tolist() == [[True, False, False], [False] * 3, [True] * 3]
    assert context.chosen[2, :, 0].tolist() == [60, 62, 64]
    assert context.rejected[0, 0, 0] == 101
    assert (context.chosen[~context.mask] == 0).all() and (context.weight[~context.mask] == 0).all()
    assert context.weight[2].tolist() == data.table.weight[[30, 31, 32]].tolist()
    assert context.tie is not None and context.prompt is not None and context.num_users == 3


def test_context_without_any_pair_has_one_masked_slot(data: FeaturedPairs) -> None:
    context = build_context(data, np.array([], dtype=np.int64), np.array([3, 4]))
    assert context.chosen.shape == (2, 1, 2) and not context.mask.any()


def test_weights_have_mean_one_and_users_count_alike(table: PairTable) -> None:
    rows = np.array([0, 1, 2, 10, 20, 21])
    macro = split_weights(table, rows, True)
    assert macro.mean() == pytest.approx(1)
    assert np.bincount(table.user[rows], weights=macro).tolist() == pytest.approx([2, 2, 2])
    assert (macro[:2] / macro[1:3]).tolist() == pytest.approx((table.weight[:2] / table.weight[1:3]).tolist())
    micro = split_weights(table, rows, False)
    assert micro.mean() == pytest.approx(1) and (micro / table.weight[rows]).std() < 1e-6
    with pytest.raises(ValueError, match="expected a positive weight somewhere, got 0 for all 6 pairs"):
        split_weights(replace(table, weight=0 * table.weight), rows, True)


def mean(batches: list[PreferenceBatch]) -> float:
    """What training minimises, with the first feature as the loss: the mean over steps and ranks of weighted means."""
    return float(np.mean([(batch.weight * batch.chosen[:, 0]).mean() for batch in batches]))  # type: ignore[index]


def test_whole_split_is_built_once(data: FeaturedPairs) -> None:
    loader = train(data, None)
    (batch,), (again,) = list(loader), list(loader)
    assert len(loader) == 1 and batch is again
    assert items([batch]) == TRAINED and batch.weight.mean().item() == pytest.approx(1)
    assert batch.user_index.tolist() == [0] * 10 + [1] * 9 + [2] * 7


def test_small_batches_are_whole_users_in_another_order_every_epoch(data: FeaturedPairs) -> None:
    epochs = [list(train(data, 9, epoch=epoch)) for epoch in range(8)]
    for batches in epochs:
        assert len(batches) == len(train(data, 9)) == 3 and items(batches) == TRAINED
        assert sorted(user for batch in batches for user in set(batch.user_index.tolist())) == [0, 1, 2]
    orders = {tuple(int(batch.user_index[0]) for batch in batches) for batches in epochs}
    assert len(orders) > 2
    again = list(train(data, 9, epoch=3))
    assert all(torch.equal(one.chosen, two.chosen) for one, two in zip(epochs[3], again, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch_size", "count"), [(1, 3), (12, 3), (13, 2), (25, 2), (26, 1), (99, 1)])
def test_batch_size_is_a_target_and_users_are_never_split(data: FeaturedPairs, batch_size: int, count: int) -> None:
    assert len(list(train(data, batch_size))) == len(train(data, batch_size)) == count


@pytest.mark.parametrize("batch_size", [None, 5, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_ranks_share_out_whole_users_and_their_mean_is_exact(
    data: FeaturedPairs, batch_size: int | None, world_size: int, epoch: int
) -> None:
    whole = mean(list(train(data, None)))
    ranks = [list(train(data, batch_size, rank=rank, world_size=world_size, epoch=epoch)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(train(data, batch_size, world_size=world_size))}
    batches = [batch for batches in ranks for batch in batches]
    assert items(batches) == TRAINED  # each pair once
    owners = [set(batch.user_index.tolist()) for batch in batches]
    assert sum(map(len, owners)) == 3 and set.union(*owners) == {0, 1, 2}  # each user in one batch of one rank
    assert mean(batches) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("batch_size", [None, 5, 13])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_pass_has_the_weights_of_the_pairs_however_they_are_batched(
    data: FeaturedPairs, batch_size: int | None, world_size: int
) -> None:
    """Nothing is left of the factors that make means of batches exact, and what an epoch is to skip is there."""
    ranks = [train(data, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [batch for rank in ranks for batch in rank.whole_users()]
    assert items(batches) == TRAINED
    (whole,) = train(data, None)
    for user in range(3):
        found = torch.cat([batch.weight[batch.user_index == user] for batch in batches])
        assert found.tolist() == pytest.approx(whole.weight[whole.user_index == user].tolist(), rel=1e-6)
    again = train(data, 9)
    again.skip(2)
    assert items(list(again.whole_users())) == TRAINED and len(list(again)) == 1


@pytest.mark.parametrize("where", [{}, {"rank": 1, "world_size": 2}])
def test_an_epoch_goes_on_after_the_batches_that_are_left_out(data: FeaturedPairs, where: dict[str, int]) -> None:
    again = train(data, 9, epoch=3, **where)
    whole = [items([batch]) for batch in again]
    again.skip(len(whole) - 1)
    assert [items([batch]) for batch in again] == whole[len(whole) - 1 :]
    assert [items([batch]) for batch in again] == whole, "the next epoch is whole again"
    again.skip(len(whole))
    assert [items([batch]) for batch in again] == whole, "after a whole epoch comes the next"


def test_more_ranks_than_users_is_refused(data: FeaturedPairs) -> None:
    with pytest.raises(ValueError, match="at least one user to train on per process, got 3 for 4"):
        list(train(data, None, world_size=4))


def test_seen_users_get_another_seen_user(data: FeaturedPairs) -> None:
    (batch,) = list(evaluation(data, None))
    assert batch.other_index is not None and batch.context is None and batch.num_shots is None
    assert (batch.other_index != batch.user_index).all() and set(batch.other_index.tolist()) == {0, 1, 2}
    assert len(set(zip(batch.user_index.tolist(), batch.other_index.tolist(), strict=True))) == 3


def test_unseen_batch_holds_own_and_other_support(data: FeaturedPairs) -> None:
    (batch,) = list(evaluation(data, [(None, 0)]))
    assert batch.context is not None and batch.context_row is not None and batch.other_row is not None
    assert batch.user_row is not None and (batch.user_index == -1).all()
    assert (batch.context_row != batch.other_row).all()
    owner = batch.context.chosen[batch.context_row][:, :, 0] // 2 // PAIRS  # features say whose pair it is
    assert (owner == batch.user_row[:, None]).all() and batch.context.mask.sum(1).tolist() == [6, 6, 6]
    other = batch.context.chosen[batch.other_row][:, 0, 0] // 2 // PAIRS
    assert (other != batch.user_row).all()
    query = set(batch.chosen[:, 0].tolist())  # type: ignore[index]
    assert not query & set(batch.context.chosen[..., 0].flatten().tolist())


def others(batches: list[PreferenceBatch]) -> dict[int, int]:
    """User -> user whose support is its control, read from the features."""
    out = {}
    for batch in batches:
        assert batch.context is not None and batch.other_row is not None and batch.user_row is not None
        control = batch.context.chosen[batch.other_row][:, 0, 0] // 2 // PAIRS
        out.update(zip(batch.user_row.tolist(), control.int().tolist(), strict=True))
    return out


def test_chunks_and_ranks_change_nothing(data: FeaturedPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(evaluation(data, [(None, 0)]))
    monkeypatch.setattr(rows, "MAX_FLOATS", 60)
    loader = evaluation(data, [(None, 0)])
    chunks = list(loader)
    assert len(chunks) == len(loader) == 3 and items(chunks) == items(whole)
    ranks = [batch for rank in range(2) for batch in evaluation(data, [(None, 0)], rank=rank, world_size=2)]
    assert items(ranks) == items(whole)
    assert others(chunks) == others(ranks) == others(whole)


def test_few_shot_draws(data: FeaturedPairs) -> None:
    draws: list[tuple[int | None, int]] = [(shots, repeat) for repeat in range(2) for shots in (0, 2, 4, 99)]
    loader = evaluation(data, draws, few_shot=True)
    batches = list(loader)
    assert len(batches) == len(loader) == 8
    supports: dict[tuple[int, int], set[float]] = {}
    for batch, (shots, repeat) in zip(batches, draws, strict=True):
        assert batch.num_shots is not None and batch.repeat is not None and batch.context is not None
        assert set(batch.num_shots.tolist()) == {shots} and set(batch.repeat.tolist()) == {repeat}
        assert batch.other_row is None and batch.other_index is None
        assert items([batch]) == items(batches[:1])
        assert batch.context.mask.sum(1).tolist() == [min(shots or 0, 6)] * 3
        supports[repeat, shots or 0] = set(batch.context.chosen[batch.context.mask][:, 0].tolist())
    for repeat in range(2):
        assert supports[repeat, 2] < supports[repeat, 4] < supports[repeat, 99]
    assert supports[0, 4] != supports[1, 4]
