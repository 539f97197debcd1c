from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plm.data.keys import content_keys
from plm.data.schema import PairTable, make_pairs, pair_table
from plm.data.sources.synthetic import SyntheticPairs
from plm.data.splits import (
    LEFT_OUT,
    SEEN,
    TEST,
    TRAIN,
    UNSEEN,
    VAL,
    check_leakage,
    dialogue_keys,
    nested_supports,
    shuffled_users,
    split_pairs,
    user_circle,
)

Array = Any


def table_of(
    num_users: int = 30, pairs: int = 20, prompts: int = 1, responses: int = 60, seed: int = 0, **optional: Any
) -> PairTable:
    """Random pairs of each user over shared prompts and responses; 0 responses = every pair has its own two."""
    rng = np.random.default_rng(seed)
    total = num_users * pairs
    chosen = rng.integers(responses, size=total) if responses else 2 * np.arange(total)
    away = 1 + rng.integers(responses - 1, size=total) if responses else np.ones(total, np.int64)
    responses = responses or 2 * total
    return pair_table(
        [f"u{index:03d}" for index in range(num_users)],
        [f"prompt {index}" for index in range(prompts)],
        [f"response {index}" for index in range(responses)],
        user=np.repeat(np.arange(num_users), pairs),
        prompt=rng.integers(prompts, size=total),
        chosen=chosen,
        rejected=(chosen + away) % responses,
        **optional,
    )


def sides(table: PairTable, stage: Array, column: str) -> dict[tuple[int, int], set[int]]:
    """(user, unit) -> stages in which it occurs."""
    out: dict[tuple[int, int], set[int]] = {}
    for row in np.flatnonzero(stage != LEFT_OUT):
        out.setdefault((table.user[row], getattr(table, column)[row]), set()).add(stage[row])
    return out


@pytest.mark.parametrize("responses", [8, 20, 60, 0])
def test_no_response_is_on_two_sides(responses: int) -> None:
    table = table_of(responses=responses)
    splits = split_pairs(table)
    assert splits.group_by == "response"
    found: dict[tuple[int, int], set[int]] = {}
    for row in np.flatnonzero(splits.stage != LEFT_OUT):
        for item in (table.chosen[row], table.rejected[row]):
            found.setdefault((int(table.user[row]), int(item)), set()).add(int(splits.stage[row]))
    assert all(len(stages) == 1 for stages in found.values())
    assert (splits.stage == LEFT_OUT).sum() == splits.num_crossing
    assert (splits.stage == TEST).sum() > 0 and (splits.stage == VAL).sum() > 0
    if responses == 0:  # no two pairs share a response: nothing needs to be lost
        assert splits.num_crossing == 0
    if responses == 8:
        assert splits.num_crossing > 0


def test_shares_by_prompt() -> None:
    table = table_of(num_users=40, pairs=50, prompts=200)
    splits = split_pairs(table, unseen_users=0.25, val_rows=0.2, test_rows=0.4)
    assert splits.group_by == "prompt" and splits.num_crossing == 0
    assert (splits.user_split == UNSEEN).sum() == 10
    seen = splits.user_split[table.user] == SEEN
    share = [np.mean(splits.stage[seen] == stage) for stage in (TRAIN, VAL, TEST)]
    assert share == pytest.approx([0.48, 0.12, 0.4], abs=0.03)
    assert not (splits.stage[~seen] == VAL).any()
    assert all(len(stages) == 1 for stages in sides(table, splits.stage, "prompt").values())


def test_dialogues_stay_together() -> None:
    dialogue = np.tile(np.arange(20) // 4, 30)
    table = table_of(prompts=50, dialogue=dialogue, dialogues=[f"d{index}" for index in range(5)])
    splits = split_pairs(table)
    assert splits.group_by == "dialogue"
    assert all(len(stages) == 1 for stages in sides(table, splits.stage, "dialogue").values())
    assert {TRAIN, VAL, TEST} == set(splits.stage.tolist())


def test_every_seen_user_trains() -> None:
    for responses, pairs in ((3, 1), (3, 2), (4, 3), (5, 9)):
        table = table_of(pairs=pairs, responses=responses)
        splits = split_pairs(table, group_by="response", test_rows=0.6, val_rows=0.5)
        trained = np.unique(table.user[splits.stage == TRAIN])
        assert set(np.flatnonzero(splits.user_split == SEEN)) <= set(trained)
        assert (splits.user_split != LEFT_OUT).all()


def test_user_with_one_pair_only_trains_or_supports() -> None:
    splits = split_pairs(table_of(pairs=1))
    assert set(splits.stage.tolist()) == {TRAIN}
    assert set(splits.user_split.tolist()) == {SEEN, UNSEEN}


def test_columns_of_the_corpus_stand() -> None:
    row_split, user_split = np.tile([0] * 12 + [2] * 8, 30), np.repeat([0, 1], 300)
    table = table_of(responses=0, row_split=row_split, user_split=user_split)
    splits = split_pairs(table)
    assert (splits.user_split == np.repeat([SEEN, UNSEEN], 15)).all()
    assert ((splits.stage == TEST) == (row_split == 2)).all()
    assert (splits.stage[user_split == 1] != VAL).all()
    assert (splits.stage == VAL).sum() == pytest.approx(0.15 * 15 * 12, abs=8)
    own = split_pairs(replace(table, row_split=np.tile([0] * 10 + [1] * 2 + [2] * 8, 30)))
    turn = np.arange(600) % 20
    assert ((own.stage == VAL) == ((turn >= 10) & (turn < 12) & (user_split == 0))).all()


def test_auto_takes_the_first_level_the_corpus_respects() -> None:
    table = table_of(prompts=6, responses=0, row_split=np.tile([0, 2], 300))
    assert split_pairs(table).group_by == "response"
    with pytest.raises(
        ValueError, match=r"expected every prompt of a user on one side.*pair \d+ \(train\).*row_split: null"
    ):
        split_pairs(table, group_by="prompt")
    with pytest.warns(UserWarning, match="shares prompts and responses"):
        splits = split_pairs(table_of(prompts=6, responses=10, row_split=np.tile([0, 2], 300)))
    assert splits.group_by == "pair"


def test_pair_on_both_sides_leaves_training() -> None:
    table = pair_table(
        ["u"],
        ["p"],
        ["a", "b", "c", "d"],
        user=np.zeros(3, np.int64),
        prompt=np.zeros(3, np.int64),
        chosen=np.array([0, 1, 2]),
        rejected=np.array([1, 0, 3]),
        row_split=np.array([0, 2, 0]),
    )
    splits = split_pairs(table, unseen_users=0)
    assert splits.stage.tolist() == [LEFT_OUT, TEST, TRAIN] and splits.num_crossing == 1


def test_seen_user_without_training_pairs_is_left_out() -> None:
    table = table_of(num_users=3, responses=0, row_split=np.repeat([0, 2, 0], 20), user_split=np.repeat([0, 0, 1], 20))
    splits = split_pairs(table)
    assert splits.user_split.tolist() == [SEEN, LEFT_OUT, UNSEEN]
    assert (splits.stage[20:40] == LEFT_OUT).all()


def test_leakage_is_found() -> None:
    table = table_of(num_users=1, pairs=4, prompts=1)
    with pytest.raises(ValueError, match="every prompt of a user on one side of the split, got 4 pairs of 1 users"):
        check_leakage(table, np.array([TRAIN, TRAIN, TEST, TEST]), "prompt")
    check_leakage(table, np.array([TRAIN, TRAIN, LEFT_OUT, LEFT_OUT]), "prompt")


def test_partly_given_split_is_refused() -> None:
    with pytest.raises(ValueError, match="expected row_split for all pairs or none, got it for 1 of 600"):
        split_pairs(table_of(row_split=np.array([0] + [-1] * 599)))


def test_order_of_rows_and_other_users_do_not_matter() -> None:
    table = table_of(prompts=30)
    splits = split_pairs(table)
    order = np.random.default_rng(1).permutation(table.num_pairs)
    shuffled = split_pairs(table.take(order))
    assert shuffled.hash == splits.hash
    assert (shuffled.stage == splits.stage[order]).all()
    assert split_pairs(table, seed=1).hash != splits.hash
    half = table.user < 15
    assert (split_pairs(table.take(half), unseen_users=0).stage == split_pairs(table, unseen_users=0).stage[half]).all()


SCRIPT = """
from plm.data.sources.synthetic import SyntheticPairs
from plm.data.splits import split_pairs
print(split_pairs(SyntheticPairs(num_users=8, pairs_per_user=6, seed=3).load()).hash)
"""


def test_same_in_every_process() -> None:
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    here = split_pairs(SyntheticPairs(num_users=8, pairs_per_user=6, seed=3).load()).hash
    assert done.stdout.strip() == here and len(here) == 64


def test_supports_are_nested_and_seeded() -> None:
    table = table_of(num_users=5, pairs=10)
    rows = np.arange(table.num_pairs)
    keys = content_keys(table).pair

    def draw(shots: int | None, repeat: int = 0, seed: int = 0) -> set[int]:
        return set(nested_supports(rows, table.user, keys, shots, repeat, seed).tolist())

    sizes = [0, 1, 2, 4, 8, 16]
    draws = [draw(shots) for shots in sizes]
    assert [len(one) for one in draws] == [0, 5, 10, 20, 40, 50]
    assert all(few <= many for few, many in pairwise(draws))
    assert draw(None) == set(rows.tolist())
    assert draw(4, repeat=1) != draws[3] and draw(4, seed=1) != draws[3]
    alone = table.user == 3
    assert set(nested_supports(rows[alone], table.user[alone], keys[alone], 4).tolist()) == draw(4) & set(
        rows[alone].tolist()
    )


def test_a_shot_may_be_a_dialogue_with_all_its_pairs() -> None:
    """Users have dialogues of one, two, three and four pairs; fewer shots are a subset of more."""
    rows = [
        {
            "user_id": user,
            "prompt": f"{user} {dialogue} {pair}",
            "chosen": "a",
            "rejected": "b",
            "dialogue_id": dialogue,
        }
        for user in ("anna", "ben", "cleo")
        for dialogue in (f"{user}-{number}" for number in range(1, 5))
        for pair in range(int(dialogue[-1]))
    ]
    table = make_pairs(rows, "rows")
    keys, dialogues, every = content_keys(table).pair, dialogue_keys(table), np.arange(table.num_pairs)

    def draw(shots: int | None, repeat: int = 0) -> list[int]:
        return nested_supports(every, table.user, keys, shots, repeat, dialogues=dialogues).tolist()

    size = np.bincount(table.dialogue)
    for shots in range(6):
        drawn = draw(shots)
        assert set(draw(max(shots - 1, 0))) <= set(drawn)
        for user in range(3):
            mine = table.dialogue[[row for row in drawn if table.user[row] == user]]
            assert len(np.unique(mine)) == min(shots, 4) and len(mine) == size[np.unique(mine)].sum()
            assert (np.diff(mine) != 0).sum() == max(len(np.unique(mine)) - 1, 0)  # one after the other
    assert draw(None) == draw(4) and sorted(draw(4)) == every.tolist() and draw(0) == []
    first = {tuple(table.dialogue[draw(1, repeat)].tolist()) for repeat in range(8)}
    assert len(first) > 1
    mixed = np.random.default_rng(0).permutation(table.num_pairs)
    assert draw(2) == nested_supports(mixed, table.user[mixed], keys[mixed], 2, dialogues=dialogues[mixed]).tolist()


def test_pairs_without_a_dialogue_are_shots_by_prompt() -> None:
    rows = [{"user_id": "anna", "prompt": "p", "chosen": text, "rejected": "b"} for text in ("a", "c")]
    rows.append({"user_id": "anna", "prompt": "q", "chosen": "a", "rejected": "b", "dialogue_id": "d"})
    table = make_pairs(rows, "rows")
    keys = dialogue_keys(table)
    of_prompt = {keys[row] for row in range(3) if table.prompts[table.prompt[row]] == "p"}
    assert len(of_prompt) == 1 and len(set(keys.tolist())) == 2
    with pytest.raises(ValueError, match="expected dialogues in the data, got none"):
        dialogue_keys(make_pairs(rows[:2], "rows"))


def test_every_user_stands_once_on_the_circle_and_its_order_is_drawn() -> None:
    keys = content_keys(table_of(num_users=50)).user
    circle = user_circle(keys)
    assert sorted(circle.tolist()) == list(range(50))
    assert (np.diff(circle) != 1).any() and (user_circle(keys, seed=1) != circle).any()


def test_shuffling_keeps_the_counts_of_every_user() -> None:
    table = table_of(prompts=30)
    splits = split_pairs(table)
    user = shuffled_users(table, splits)
    for stage in (TRAIN, VAL, TEST):
        rows = splits.stage == stage
        assert (np.bincount(user[rows], minlength=30) == np.bincount(table.user[rows], minlength=30)).all()
    assert (splits.user_split[user] == splits.user_split[table.user]).all()
    assert np.mean(user == table.user) < 0.15
