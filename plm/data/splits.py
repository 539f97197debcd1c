"""Who is seen, and which pairs train, validate and test: pure functions on index arrays.

Axes: N pairs, U users, G groups.

Everything random is a hash of content (user id, prompt, responses) and a seed. So a split is the same in every process
and for every order of the rows, and no user's split depends on who else is in the data but for the seen/unseen ranking.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from plm.arrays import BoolArray, Float64Array, IntArray
from plm.atomic import write_text
from plm.data.keys import (
    KeyArray,
    Keys,
    content_keys,
    digest,
    mix,
    number_pairs,
    owner_of,
    position_in_run,
    seed_key,
)
from plm.data.schema import PairTable
from plm.data.values import ROW_SPLITS

GroupBy = Literal["auto", "dialogue", "prompt", "response", "pair"]
ShotUnit = Literal["pair", "dialogue"]

TRAIN, VAL, TEST, LEFT_OUT = 0, 1, 2, -1
SEEN, UNSEEN = 0, 1


@dataclass(frozen=True)
class Splits:
    """Where every user and every pair of a table belongs."""

    user_split: IntArray
    """``(U,)`` SEEN, UNSEEN, or LEFT_OUT for a user without any training pair whom the corpus calls seen."""
    stage: IntArray
    """``(N,)`` TRAIN, VAL, TEST or LEFT_OUT; of an unseen user TRAIN is the support pool and TEST the query."""
    group_by: str
    """What is never on two sides of one user: dialogue, prompt, response or pair."""
    num_crossing: int
    """Pairs left out because their two responses fell on different sides."""
    hash: str
    """sha256 of the assignment, whatever the order of the rows."""


def split_pairs(
    table: PairTable,
    *,
    group_by: GroupBy = "auto",
    unseen_users: float = 0.2,
    val_rows: float = 0.15,
    test_rows: float = 0.3,
    seed: int = 0,
) -> Splits:
    """Assign users to seen/unseen and pairs to train/val/test.

    What the corpus says (``user_split``, ``row_split``) stands; the rest is drawn. Validation pairs are carved from the
    training pairs of seen users unless the corpus names its own. A user whose pairs cannot be divided, such as one with
    a single pair, only trains (seen) or only has support (unseen).

    Args:
        table: Validated pairs.
        group_by: What must stay on one side of a user. ``auto``: with ``row_split`` given, the first of dialogue,
            prompt, response and pair that it respects; else dialogue where given, prompt where most users have several,
            else response. ``response`` leaves out pairs whose two responses fall on different sides.
        unseen_users: Share of users held out.
        val_rows: Share of a seen user's training pairs held out for validation.
        test_rows: Share of a user's pairs held out for the test.
        seed: Another seed gives another draw.

    Returns:
        The checked assignment.

    Raises:
        ValueError: If ``row_split`` puts a group of ``group_by`` on two sides of a user, or is given for some pairs
            only.
    """
    for name, is_given in (("row_split", table.row_split >= 0), ("user_split", table.user_split >= 0)):
        if is_given.any() and not is_given.all():
            raise ValueError(f"expected {name} for all pairs or none, got it for {is_given.sum()} of {len(is_given)}")
    keys = content_keys(table)
    seeded = mix(keys.user, seed_key(seed))
    user_split = _user_split(table, seeded, unseen_users)
    stage = table.row_split.copy()
    crossing = 0
    if (stage >= 0).any():
        clash = _both_sides(table, stage, "pair") & (stage != TEST)
        stage[clash] = LEFT_OUT
        crossing = int(clash.sum())
        level = _respected_level(table, stage) if group_by == "auto" else group_by
    else:
        level = _natural_level(table) if group_by == "auto" else group_by
        stage[:] = TRAIN
        crossing += _carve(table, keys, seeded, stage, TEST, level, test_rows, np.ones(table.num_pairs, np.bool_))
    unseen = user_split[table.user] == UNSEEN
    stage[unseen & (stage == VAL)] = TRAIN
    if not (stage == VAL).any():
        crossing += _carve(table, keys, mix(seeded, seed_key(1)), stage, VAL, level, val_rows, ~unseen)
    has_train = np.zeros(table.num_users, dtype=np.bool_)
    has_train[table.user[stage == TRAIN]] = True
    user_split[(user_split == SEEN) & ~has_train] = LEFT_OUT
    stage[user_split[table.user] == LEFT_OUT] = LEFT_OUT
    check_leakage(table, stage, level)
    return Splits(user_split, stage, level, crossing, split_hash(keys, table.user, user_split, stage))


def check_leakage(table: PairTable, stage: IntArray, group_by: str) -> None:
    """Raise if a group, or the same two responses, are in two stages of one user.

    Raises:
        ValueError: Naming the first such pairs and how many there are.
    """
    for level in dict.fromkeys((group_by, "pair")):
        leak = _both_sides(table, stage, level)
        if not leak.any():
            continue
        rows = np.flatnonzero(leak)
        user = table.user[rows[0]]
        where = [f"{table.position(row)} ({ROW_SPLITS[stage[row]]})" for row in rows[table.user[rows] == user][:4]]
        raise ValueError(
            f"expected every {level} of a user on one side of the split, got {len(rows)} pairs of "
            f"{len(np.unique(table.user[rows]))} users on several, first of user {table.user_ids[user]!r}: "
            f"{', '.join(where)}; correct row_split, leave it unread (columns: {{row_split: null}}), or set "
            "data.group_by to auto"
        )


def split_hash(keys: Keys, user: IntArray, user_split: IntArray, stage: IntArray) -> str:
    """Sha256 of which pair of which user is where."""
    code = ((stage + 1) * 4 + user_split[user] + 1).astype(np.uint64)
    order = np.lexsort((code, keys.pair))
    return hashlib.sha256(np.stack([keys.pair[order], code[order]]).astype("<u8").tobytes()).hexdigest()


def nested_supports(
    rows: IntArray,
    user: IntArray,
    keys: KeyArray,
    num_shots: int | None,
    repeat: int = 0,
    seed: int = 0,
    dialogues: KeyArray | None = None,
) -> IntArray:
    """First ``num_shots`` pairs, or dialogues, of every user in a random order: fewer shots are a subset of more.

    Args:
        rows: ``(n,)`` pool of support pairs, as rows of the table.
        user: ``(n,)`` whose they are.
        keys: ``(n,)`` content hashes of the pairs.
        num_shots: How many; a user with fewer gives all; None = everybody gives all.
        repeat: Which order.
        seed: Another seed gives other orders.
        dialogues: ``(n,)`` see `dialogue_keys`: a shot is one of these with all its pairs; None = a pair.

    Returns:
        Rows of the table, sorted by user, then by order drawn.
    """
    drawn, *of_dialogues = (
        mix(mix(some, seed_key(seed)), seed_key(repeat)) for some in (keys, dialogues) if some is not None
    )
    order: IntArray = np.lexsort((drawn, *of_dialogues, user))
    if num_shots is not None:
        shot = np.arange(len(order))
        if dialogues is not None:
            ends = (np.diff(dialogues[order]) != 0) | (np.diff(user[order]) != 0)
            shot = np.concatenate([np.zeros(min(1, len(order)), dtype=np.int64), np.cumsum(ends)])
        first = np.unique(shot, return_index=True)[1]
        order = order[position_in_run(user[order][first])[shot] < num_shots]
    supports: IntArray = rows[order]
    return supports


def dialogue_keys(table: PairTable) -> KeyArray:
    """Hash of the user and the dialogue of every pair ``(N,)``, of the prompt where a pair has no dialogue.

    Raises:
        ValueError: If no pair has one.
    """
    if not (table.dialogue >= 0).any():
        raise ValueError("data.shot_unit: expected dialogues in the data, got none; name their column, or take pair")
    keys = content_keys(table)
    return mix(_unit_keys(table, keys, "dialogue"), keys.user[table.user])


def user_circle(keys: KeyArray, seed: int = 0) -> IntArray:
    """Put users on a circle in random order, ``(U,)``: the next one of each is its other user.

    Args:
        keys: ``(U,)`` content hashes of the users.
        seed: Another seed gives another circle.
    """
    return np.argsort(mix(keys, seed_key(seed)), kind="stable").astype(np.int64)


def shuffled_users(table: PairTable, splits: Splits, seed: int = 0) -> IntArray:
    """User labels permuted across the pairs of each (user split, stage): the control without any personal signal.

    Returns:
        ``(N,)`` row of ``user_ids``; every user keeps the number of pairs in every stage.
    """
    keys = content_keys(table).pair
    stratum = splits.stage * 4 + splits.user_split[table.user]
    source = np.lexsort((mix(keys, seed_key(seed)), stratum))
    target = np.lexsort((mix(keys, seed_key(seed + 1)), stratum))
    user: IntArray = table.user.copy()
    user[target] = table.user[source]
    return user


# ---------------------------------------------------------------------- who
def _user_split(table: PairTable, keys: KeyArray, fraction: float) -> IntArray:
    user_split = np.full(table.num_users, LEFT_OUT, dtype=np.int64)
    user_split[table.user] = table.user_split
    if (user_split == LEFT_OUT).any():
        num_unseen = min(round(fraction * table.num_users), table.num_users - 1)
        user_split[:] = SEEN
        user_split[np.argsort(keys, kind="stable")[:num_unseen]] = UNSEEN
    return user_split


# ---------------------------------------------------------------------- what
def _natural_level(table: PairTable) -> str:
    """What siblings share when the corpus gives no split."""
    if (table.dialogue >= 0).any():
        return "dialogue"
    num_pairs = np.bincount(table.user, minlength=table.num_users)
    distinct = np.unique(table.user * len(table.prompts) + table.prompt) // len(table.prompts)
    num_prompts = np.bincount(distinct, minlength=table.num_users)[num_pairs > 1]
    return "prompt" if len(num_prompts) and (num_prompts > 1).mean() > 0.5 else "response"


def _respected_level(table: PairTable, stage: IntArray) -> str:
    """The first level that the split of the corpus respects."""
    natural = _natural_level(table)
    levels = ["dialogue", "prompt", "response"]
    for level in levels[levels.index(natural) :]:
        if not _both_sides(table, stage, level).any():
            return level
    shared = "responses" if natural == "response" else f"{natural}s and responses"
    warnings.warn(
        f"row_split shares {shared} between train and test of a user: only whole pairs are kept apart"
        " (columns: {row_split: null} leaves it unread and draws a split without that)",
        stacklevel=3,
    )
    return "pair"


def _units(table: PairTable, level: str) -> tuple[IntArray, IntArray]:
    """(rows of the table, what must not straddle) of every unit; ``response`` has two per pair."""
    rows = np.arange(table.num_pairs)
    response = table.items[:, 1]
    chosen, rejected = response[table.chosen], response[table.rejected]
    if level == "response":
        return np.concatenate([rows, rows]), np.concatenate([chosen, rejected])
    if level == "dialogue":
        return rows, np.where(table.dialogue >= 0, table.dialogue, len(table.dialogues) + table.prompt)
    if level == "prompt":
        return rows, table.prompt
    return rows, table.comparison


def _both_sides(table: PairTable, stage: IntArray, level: str) -> BoolArray:
    """``(N,)`` True where a pair shares a unit with a pair of the same user in another stage."""
    rows, unit = _units(table, level)
    kept = stage[rows] != LEFT_OUT
    rows, unit = rows[kept], unit[kept]
    _, group = number_pairs(table.user[rows], unit)
    num_groups = int(group.max(initial=-1)) + 1
    low, high = np.full(num_groups, TEST), np.full(num_groups, TRAIN)
    np.minimum.at(low, group, stage[rows])
    np.maximum.at(high, group, stage[rows])
    straddles = np.zeros(table.num_pairs, dtype=np.bool_)
    straddles[rows[(low != high)[group]]] = True
    return straddles


def _carve(
    table: PairTable,
    keys: Keys,
    seeded: KeyArray,
    stage: IntArray,
    target: int,
    level: str,
    fraction: float,
    eligible: BoolArray,
) -> int:
    """Move about ``fraction`` of every user's eligible training pairs to stage ``target``, whole groups at a time.

    Changes ``stage`` in place and returns how many pairs had to be left out.
    """
    rows = np.flatnonzero(eligible & (stage == TRAIN))
    if not len(rows) or fraction == 0:
        return 0
    user = table.user[rows]
    if level == "response":
        group, group_keys = _components(table, keys, rows)
    else:
        _, unit = _units(table, level)
        first, group = number_pairs(user, unit[rows])
        group_keys = _unit_keys(table, keys, level)[rows][first]
    goal = (fraction * np.bincount(user, minlength=table.num_users)).astype(np.float64)
    share = np.full(len(goal), 0.5)
    if target == VAL:  # random rounding: a share of coarse groups is right on average over users, if not for each
        share = (seeded >> np.uint64(11)) / 2.0**53
    taken = _greedy(user, group, mix(group_keys, seeded[owner_of(user, group)]), goal, share)
    stage[rows[taken]] = target
    # every user needs a test; for validation, pairs are given up only where it would be nearly empty without
    if level != "response" or (target == VAL and taken.sum() > goal.sum() / 2):
        return 0
    return _cut(table, keys, seeded, stage, rows, group, taken, goal, target, fraction)


def _greedy(
    user: IntArray, group: IntArray, group_keys: KeyArray, goal: Float64Array, share: Float64Array
) -> BoolArray:
    """Take groups of each user in random order, as long as ``share`` of the next one still fits into ``goal``.

    Never all of a user's, and never much more than a third unless the goal asks for it.

    Args:
        user: ``(n,)`` user of each pair.
        group: ``(n,)`` group of each pair.
        group_keys: ``(G,)`` random order.
        goal: ``(U,)`` pairs wanted.
        share: ``(U,)`` 0.5 rounds to the nearest, uniform random numbers round randomly.

    Returns:
        ``(n,)`` True for the pairs taken.
    """
    size, owner = np.bincount(group), owner_of(user, group)
    total, count = np.bincount(user, minlength=len(goal)), np.zeros(len(goal))
    order = np.lexsort((group_keys, owner))
    turn = position_in_run(owner[order])
    by_turn = order[np.argsort(turn, kind="stable")]
    taken = np.zeros(len(size), dtype=np.bool_)
    for block in np.split(by_turn, np.cumsum(np.bincount(turn))[:-1]):  # one group of every user per turn
        users = owner[block]
        after = count[users] + size[block]
        fits = (count[users] + share[users] * size[block] <= goal[users]) & (after < total[users])
        fits &= (after <= np.maximum(goal, total / 3)[users]) | (size[block] == 1) | (share[users] == 0.5)
        taken[block[fits]] = True
        count[users[fits]] += size[block[fits]]
    return taken[group]


def _cut(
    table: PairTable,
    keys: Keys,
    seeded: KeyArray,
    stage: IntArray,
    rows: IntArray,
    group: IntArray,
    taken: BoolArray,
    goal: Float64Array,
    target: int,
    fraction: float,
) -> int:
    """Divide the responses of users whose pairs hang together too much to be taken whole; crossing pairs are lost."""
    user = table.user[rows]
    count = np.bincount(user[taken], minlength=len(goal))
    short = (count < goal / 2) & (goal >= 1)
    size, owner = np.bincount(group), owner_of(user, group)
    largest = np.lexsort((-size, owner))
    largest = largest[position_in_run(owner[largest]) == 0]
    cut = np.zeros(len(size), dtype=np.bool_)
    cut[largest[short[owner[largest]]]] = True
    inside = np.flatnonzero(cut[group] & ~taken)
    if not len(inside):
        return 0
    users = user[inside]
    sides = table.items[np.stack([table.chosen, table.rejected])[:, rows[inside]], 1]  # (2, n) responses
    first, node = number_pairs(np.concatenate([users, users]), sides.ravel())
    node_user = np.concatenate([users, users])[first]
    node_key = mix(keys.response[sides.ravel()[first]], seeded[node_user])
    order = np.lexsort((node_key, node_user))
    num_nodes = np.bincount(node_user, minlength=len(goal))
    # with a share p of the responses on one side, p^2 / (p^2 + (1 - p)^2) of the surviving pairs are there
    share = np.sqrt(fraction) / (np.sqrt(fraction) + np.sqrt(1 - fraction))
    limit = np.maximum(np.round(share * num_nodes), 2)
    held = np.zeros(len(node_user), dtype=np.bool_)
    held[order] = position_in_run(node_user[order]) < limit[node_user[order]]
    num_held = held[node].reshape(2, -1).sum(0)
    new = np.select([num_held == 2, num_held == 1], [target, LEFT_OUT], TRAIN)
    # undo where one of the two sides would stay empty
    gained = np.bincount(users[new == target], minlength=len(goal))
    kept = np.bincount(user, minlength=len(goal)) - count - np.bincount(users[new != TRAIN], minlength=len(goal))
    new[((gained == 0) | (kept <= 0))[users]] = TRAIN
    stage[rows[inside]] = new
    return int((new == LEFT_OUT).sum())


def _components(table: PairTable, keys: Keys, rows: IntArray) -> tuple[IntArray, KeyArray]:
    """Connected components of every user's responses: ``(n,)`` component of each pair and ``(G,)`` content hashes."""
    user = table.user[rows]
    sides = table.items[np.stack([table.chosen, table.rejected])[:, rows], 1]
    first, node = number_pairs(np.concatenate([user, user]), sides.ravel())
    left, right = node.reshape(2, -1)
    edges = coo_array((np.ones(len(left)), (left, right)), shape=(len(first), len(first)))
    group = connected_components(edges, directed=False)[1][left].astype(np.int64)
    smallest = np.full(int(group.max()) + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    for side in sides:
        np.minimum.at(smallest, group, keys.response[side])
    return group, smallest


def _unit_keys(table: PairTable, keys: Keys, level: str) -> KeyArray:
    """``(N,)`` content hash of the unit of every pair."""
    if level == "prompt":
        return keys.prompt[table.prompt]
    if level == "dialogue":
        dialogue = np.append(digest(table.dialogues), np.uint64(0))
        return np.where(table.dialogue >= 0, dialogue[table.dialogue], keys.prompt[table.prompt])
    item = mix(keys.prompt[table.items[:, 0]], keys.response[table.items[:, 1]])
    return item[table.chosen] ^ item[table.rejected]


def write_splits(path: str | Path, splits: Splits, user_ids: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """Write a split as JSON: the metadata, its hash, the users of each side, and where every pair of the table went.

    ``pairs`` has one letter per pair in the order of the source: r train or support, v validation, t test or query,
    ``-`` left out.
    """
    sides = (("seen", SEEN), ("unseen", UNSEEN), ("left_out", LEFT_OUT))
    text = {
        **metadata,
        "hash": splits.hash,
        "users": {
            name: [user_ids[row] for row in np.flatnonzero(splits.user_split == code).tolist()] for name, code in sides
        },
        "pairs": "".join("rvt-"[code] for code in splits.stage.tolist()),
    }
    write_text(path, json.dumps(text, ensure_ascii=False, indent=1))
