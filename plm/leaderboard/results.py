"""Results of runs gathered into rows: seeds are averaged per user first, then come intervals, tests and verdicts.

Axes: U users of one group, K shot counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from plm.arrays import Float64Array
from plm.evaluation import compare, holm, read_user_rows, summarize, verdict
from plm.metrics import UserTable

Kind = Literal["method", "control", "baseline"]
GROUPS = ("unseen", "seen")
"""Groups of users, in the order of the tables."""

_VALUES = ("num_pairs", "accuracy", "global_accuracy", "other_accuracy", "log_loss")


class Users(NamedTuple):
    """What a run got right for each user of a group."""

    ids: list[str]
    """U ids, sorted."""
    values: dict[str, Float64Array]
    """Column of ``per_user.csv`` -> ``(U,)``; nan = an empty cell."""
    ece: float
    """Calibration error over all pairs of the group."""


class Run(NamedTuple):
    """One finished run, read from its folder."""

    users: dict[str, Users]
    few_shot: dict[str, Any] | None
    facts: dict[str, Any]
    split_hash: str
    """The split that it was tested on."""


class SweepPoint(NamedTuple):
    """Where a row stands in a sweep over an argument of its method."""

    series: str
    """The row without the value."""
    argument: str
    value: float


@dataclass(frozen=True)
class BoardRow:
    """One row of a leaderboard."""

    name: str
    kind: Kind
    description: str
    """What it is, in a few words."""
    num_seeds: int = 0
    errors: dict[int, str] = field(default_factory=dict)
    """Seed -> why it failed."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments that the search picked."""
    num_candidates: int = 1
    point: SweepPoint | None = None
    command: str = ""
    """What runs the row alone."""
    users: dict[str, Users] = field(default_factory=dict)
    """Group -> users, averaged over seeds."""
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    """Group -> name -> number, with intervals; see `plm.evaluation.summarize`."""
    few_shot: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_personal(self) -> bool:
        """Whether users have a state of their scored."""
        return bool(self.facts.get("parameters_per_user"))


class Versus(NamedTuple):
    """A comparison of two rows on one group of users."""

    group: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float
    """Corrected over the comparisons of its family."""


def read_run(folder: Path) -> Run:
    """Read ``metrics.json``, ``per_user.csv`` and ``facts.json`` of a run."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    users = {}
    for group, rows in read_user_rows(folder / "per_user.csv").items():
        ece = metrics[group]["ece"]
        users[group] = Users(rows.ids, rows.values, math.nan if ece is None else ece)
    return Run(users, metrics.get("few_shot"), facts, metrics["split_hash"])


def average(runs: Sequence[Run]) -> Run:
    """Average over seeds or splits: users over the runs that judged them, the few-shot curve and the seconds.

    Raises:
        ValueError: If runs on one split judged different users.
    """
    groups = {}
    judged_by: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for group, users in run.users.items():
            if judged_by.setdefault((run.split_hash, group), users.ids) != users.ids:
                raise ValueError(f"expected the same {group} users for all seeds; the runs come from different splits")
    for group in dict.fromkeys(group for run in runs for group in run.users):
        judged = [run.users[group] for run in runs if group in run.users]
        ids = sorted({user_id for users in judged for user_id in users.ids})
        row_of = {user_id: row for row, user_id in enumerate(ids)}
        rows = [np.array([row_of[user_id] for user_id in users.ids], dtype=np.int64) for users in judged]
        times = sum(np.bincount(places, minlength=len(ids)) for places in rows)
        means = {}
        for name in _VALUES:
            sums = np.zeros(len(ids))
            for users, places in zip(judged, rows, strict=True):
                sums[places] += users.values[name]
            means[name] = sums / times
        groups[group] = Users(ids, means, float(np.mean([users.ece for users in judged])))
    curve = None
    if all(run.few_shot for run in runs):
        curves = [run.few_shot for run in runs if run.few_shot]
        curve = {**curves[0]}
        for name in ("accuracy", "accuracy_low", "accuracy_high"):
            curve[name] = np.mean(
                [[np.nan if v is None else v for v in each[name]] for each in curves], axis=0
            ).tolist()
    facts = {**runs[0].facts}
    for name in ("fit_seconds", "adapt_ms", "val_value"):
        found = [run.facts[name] for run in runs if run.facts.get(name) is not None]
        if found:
            facts[name] = float(np.mean(found))
    return Run(groups, curve, facts, runs[0].split_hash)


def numbers_of(users: Users) -> dict[str, float]:
    """Compute all numbers of a group with their intervals over users."""
    values = users.values
    one_bin = np.array([[1.0, users.ece, 0.0]])  # its gap is the calibration error
    table = UserTable(
        user_row=np.arange(len(users.ids)),
        num_pairs=values["num_pairs"],
        accuracy=values["accuracy"],
        log_loss=values["log_loss"],
        global_accuracy=values["global_accuracy"],
        global_log_loss=np.zeros(len(users.ids)),  # runs do not keep it per user
        other_accuracy=values["other_accuracy"],
        bradley_terry_accuracy=np.full(len(users.ids), np.nan),  # the leaderboard has it as a row
        bradley_terry_log_loss=np.full(len(users.ids), np.nan),
        majority_accuracy=np.full(len(users.ids), np.nan),  # a row, too
        personal_pairs=np.zeros(len(users.ids)),  # runs do not keep it per user
        flipped_pairs=0,
        reversed_pairs=0,
        ties=0,
        labelled_ties=0,
        bins=one_bin,
    )
    with np.errstate(invalid="ignore"):
        numbers = summarize(table)
    for name in ("ties", "labelled_ties", "global_log_loss", "users_served_population"):
        numbers.pop(name, None)
    return numbers


def fill_row(row: BoardRow, runs: Mapping[int, Run]) -> BoardRow:
    """Fill a row from its runs, seed -> run; without any it stays a row of errors."""
    if not runs:
        return row
    mean = average(list(runs.values()))
    numbers = {group: numbers_of(users) for group, users in mean.users.items()}
    for group, of_group in numbers.items():
        macro = [float(run.users[group].values["accuracy"].mean()) for run in runs.values() if group in run.users]
        of_group["accuracy_seed_sd"] = float(np.std(macro, ddof=1)) if len(macro) > 1 else math.nan
    filled = {"num_seeds": len(runs), "users": mean.users, "numbers": numbers, "few_shot": mean.few_shot}
    return BoardRow(**{**vars(row), **filled, "facts": mean.facts})


def other_user_row(row: BoardRow) -> BoardRow:
    """Make the control of a method's row in which every user has the state of another one."""
    users = {}
    for group, scored in row.users.items():
        nothing = np.full(len(scored.ids), np.nan)
        values = {**dict.fromkeys(_VALUES, nothing), "num_pairs": scored.values["num_pairs"]}
        users[group] = Users(scored.ids, {**values, "accuracy": scored.values["other_accuracy"]}, math.nan)
    return BoardRow(
        name=f"{row.name}, another user",
        kind="control",
        description=f"{row.name} with the state of a random other user",
        num_seeds=row.num_seeds,
        users=users,
        numbers={group: numbers_of(found) for group, found in users.items()},
        command=row.command,
    )


def verdicts(row: BoardRow) -> list[str]:
    """One sentence per group of users about a personal method."""
    if row.kind != "method" or not row.is_personal:
        return []
    return [verdict(f"{row.name}, {group}", row.numbers[group]) for group in GROUPS if group in row.numbers]


def versus(rows: Sequence[BoardRow], reference: str) -> list[Versus]:
    """Compare methods and baselines with the reference row; p-values are corrected over the methods of a group.

    Baselines have no p-value. Controls are left out: with shuffled users a user's pairs are not those of the reference.
    """
    second = next((row for row in rows if row.name == reference and row.users), None)
    if second is None:
        return []
    found = []
    for group in GROUPS:
        rivals = [row for row in rows if row is not second and row.kind != "control"]
        rivals = [row for row in rivals if group in row.users and group in second.users]
        tests = [_compare(row, second, group) for row in rivals]
        p_values = np.array(
            [test.p_value if row.kind == "method" else math.nan for row, test in zip(rivals, tests, strict=True)]
        )
        found += [test._replace(p_holm=p) for test, p in zip(tests, holm(p_values).tolist(), strict=True)]
    return found


def all_pairs(rows: Sequence[BoardRow]) -> list[Versus]:
    """Compare every method with every other; p-values are corrected over all pairs of a group."""
    found = []
    for group in GROUPS:
        rivals = [row for row in rows if row.kind == "method" and group in row.users]
        tests = [_compare(first, second, group) for first, second in combinations(rivals, 2)]
        adjusted = holm(np.array([test.p_value for test in tests]))
        found += [test._replace(p_holm=p) for test, p in zip(tests, adjusted.tolist(), strict=True)]
    return found


def _compare(first: BoardRow, second: BoardRow, group: str) -> Versus:
    """Paired difference in accuracy over the users that both rows have."""
    left, right = first.users[group], second.users[group]
    both = sorted({*left.ids} & {*right.ids})
    has_failed = bool(first.errors or second.errors)  # such as on one of several splits
    if not both or (left.ids != right.ids and not has_failed):
        raise ValueError(f"expected the same {group} users in {first.name} and {second.name}; their splits differ")
    accuracies = (dict(zip(users.ids, users.values["accuracy"].tolist(), strict=True)) for users in (left, right))
    test = compare(*(np.array([accuracy[user_id] for user_id in both]) for accuracy in accuracies))
    return Versus(group, first.name, second.name, *test[:4], math.nan)


def ranked(rows: Sequence[BoardRow]) -> list[BoardRow]:
    """Methods, then controls, then baselines; best accuracy on unseen users first, failures last."""

    def place(row: BoardRow) -> tuple[int, float]:
        group = next((row.numbers[name] for name in GROUPS if name in row.numbers), {})
        return ("method", "control", "baseline").index(row.kind), -group.get("accuracy", -1.0)

    return sorted(rows, key=place)
