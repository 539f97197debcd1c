"""Which of several models is better on the same judgements: paired differences over users, of files that anybody wrote.

Axes: F files, N judgements, U users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from plm.arrays import Float64Array, IntArray
from plm.audit.items import ItemScores
from plm.evaluation import (
    MIN_USERS,
    Section,
    TableRow,
    compare,
    difference,
    holm,
    interval,
    minimum_detectable_effect,
    p_value,
    points,
)
from plm.evaluation.comparison import MAX_RESAMPLED_USERS
from plm.messages import counted, listed, plain


def compare_items(files: Sequence[ItemScores]) -> dict[str, Any]:
    """Compare every file with every other, paired by item and clustered by user.

    Returns:
        ``num_items``, ``num_users``; ``files``: for each ``name``, ``accuracy`` (mean over users) with its ends
        ``accuracy_low`` and ``accuracy_high``, ``accuracy_micro`` (mean over items) and ``labelled_ties``;
        ``comparisons``: for each two ``first``, ``second``, ``difference`` (first minus second) with
        ``difference_low``, ``difference_high``, ``difference_mde``, ``p_value`` and ``p_holm``; ``method``: bootstrap
        or closed form. Ends and p-values are nan for fewer than `plm.evaluation.MIN_USERS` users.

    Raises:
        ValueError: If the files do not hold the same items of the same users.
    """
    for other in files[1:]:
        _check_same(files[0], other)
    users, owner = np.unique(files[0].users, return_inverse=True)
    place = {item: index for index, item in enumerate(files[0].items)}
    orders = [np.argsort([place[item] for item in file.items]) for file in files]
    accuracy = [user_means(file.correct[order], owner, len(users)) for file, order in zip(files, orders, strict=True)]
    micro = [float(file.correct.mean()) for file in files]
    return user_numbers([file.name for file in files], accuracy, micro, [file.num_ties for file in files], len(place))


def user_numbers(
    names: Sequence[str], accuracy: Sequence[Float64Array], micro: Sequence[float], ties: Sequence[int], num_items: int
) -> dict[str, Any]:
    """The numbers of `compare_items` from the accuracy of each model's users, ``(U,)`` in one order."""
    num_users = len(accuracy[0])
    zero = np.zeros(num_users)
    entries = []
    for name, values, share, num_ties in zip(names, accuracy, micro, ties, strict=True):
        mean = compare(values, zero)
        ends = {"accuracy": mean.difference, "accuracy_low": mean.low, "accuracy_high": mean.high}
        entries.append({"name": name, **ends, "accuracy_micro": share, "labelled_ties": num_ties})
    comparisons: list[dict[str, Any]] = []
    for first, second in combinations(range(len(names)), 2):
        test = compare(accuracy[first], accuracy[second])
        comparisons.append(
            {
                "first": names[first],
                "second": names[second],
                "difference": test.difference,
                "difference_low": test.low,
                "difference_high": test.high,
                "difference_mde": minimum_detectable_effect(accuracy[first] - accuracy[second]),
                "p_value": test.p_value,
            }
        )
    adjusted = holm(np.array([entry["p_value"] for entry in comparisons]))
    for entry, value in zip(comparisons, adjusted.tolist(), strict=True):
        entry["p_holm"] = value
    return {
        "num_items": num_items,
        "num_users": num_users,
        "method": "bootstrap" if num_users <= MAX_RESAMPLED_USERS else "closed form",
        "files": entries,
        "comparisons": comparisons,
    }


def user_means(values: Float64Array, owner: IntArray, num_users: int) -> Float64Array:
    """Mean of ``(N,)`` values by the user who owns each, ``(U,)``; nan for a user without any."""
    count = np.bincount(owner, minlength=num_users)
    total = np.bincount(owner, weights=values, minlength=num_users)
    means: Float64Array = np.divide(total, count, out=np.full(num_users, np.nan), where=count > 0)
    return means


def _check_same(first: ItemScores, second: ItemScores) -> None:
    """Raise if an item is in one file only or belongs to another user.

    Raises:
        ValueError: Naming the first such items.
    """
    places = [dict(zip(file.items, file.where, strict=True)) for file in (first, second)]
    lines = [
        f"only in {file.name}: {item!r} ({where})"
        for file, other in ((first, places[1]), (second, places[0]))
        for item, where in zip(file.items, file.where, strict=True)
        if item not in other
    ]
    if lines:
        start = (
            f"expected the same items in {first.name} and {second.name}, got {len(lines)} in one of them only; "
            "score both models on the same pairs, and count what a model cannot tell as a margin of 0:"
        )
        raise ValueError(listed(start, lines))
    users = dict(zip(second.items, second.users, strict=True))
    lines = [
        f"{item!r}: user {user!r} ({places[0][item]}), user {users[item]!r} ({places[1][item]})"
        for item, user in zip(first.items, first.users, strict=True)
        if users[item] != user
    ]
    if lines:
        start = f"expected the same user of every item in {first.name} and {second.name}, got {len(lines)} of others:"
        raise ValueError(listed(start, lines))


def sections(users: str, result: dict[str, Any]) -> list[Section]:
    """Both tables of a group of users: the models, then every two of them."""
    files = [
        TableRow([plain(entry["name"]), points(entry["accuracy"], "") + interval(entry, "accuracy"),
                  points(entry["accuracy_micro"], ""), str(entry["labelled_ties"])])
        for entry in result["files"]
    ]  # fmt: skip
    versus = [
        TableRow([plain(f"{entry['first']} − {entry['second']}"), difference(entry, "difference"),
                  p_value(entry["p_value"]), p_value(entry["p_holm"]),
                  "–" if math.isnan(entry["difference_mde"]) else points(entry["difference_mde"], "")])
        for entry in result["comparisons"]
    ]  # fmt: skip
    group, paired = ("users", "by item") if users == "all" else (f"{users} users", f"on {users} users")
    title = f"Accuracy of {result['num_users']:,} {group} on {result['num_items']:,} items, 95% intervals over users"
    if result.get("num_deleted"):
        title += f"; without {counted(result['num_deleted'], 'user')} deleted from a run"
    method = result["method"]
    if result["num_users"] < MIN_USERS:
        method = f"no intervals: they need {MIN_USERS} users"
    heads = ["difference", "points", "p", "p, Holm", "found four times in five from"]
    return [
        Section(title, ["model", "mean over users %", "mean over items %", "ties left out"], files),
        Section(f"Paired {paired}, clustered by user ({method})", heads, versus),
    ]
