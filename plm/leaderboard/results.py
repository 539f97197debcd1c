"""Results of runs gathered into rows: seeds averaged per user first, then intervals, comparisons and verdicts.

Axes: U users of one group, K shot counts.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from plm.evaluation import compare, holm, summarize, verdict
from plm.metrics import FloatArray, UserTable

Kind = Literal["method", "control", "baseline"]
GROUPS = ("unseen", "seen")
"""Groups of users, in the order of the tables."""

_VALUES = ("num_pairs", "accuracy", "global_accuracy", "other_accuracy", "log_loss")


class Users(NamedTuple):
    """What one run got right for each user of a group."""

    ids: list[str]
    """U ids, sorted."""
    values: dict[str, FloatArray]
    """Column of ``per_user.csv`` -> ``(U,)``; nan = an empty cell."""
    ece: float
    """Calibration error over all pairs of the group."""


class Run(NamedTuple):
    """One finished run, as its folder tells."""

    users: dict[str, Users]
    few_shot: dict[str, Any] | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of a leaderboard."""

    name: str
    kind: Kind
    about: str
    """What it is, in a few words."""
    num_seeds: int = 0
    errors: dict[int, str] = field(default_factory=dict)
    """Seed -> why it failed."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments that the search picked."""
    num_candidates: int = 1
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
        """Whether users have a state of their own."""
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
    rows: dict[str, list[dict[str, str]]] = {}
    with (folder / "per_user.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["split"], []).append(row)
    users = {}
    for group, members in rows.items():
        members.sort(key=lambda row: row["user_id"])
        values = {name: np.array([float(row[name] or "nan") for row in members]) for name in _VALUES}
        ece = metrics[group]["ece"]
        users[group] = Users([row["user_id"] for row in members], values, math.nan if ece is None else ece)
    return Run(users, metrics.get("few_shot"), facts)


def average(runs: Sequence[Run]) -> Run:
    """Mean over seeds: of every user's values, of the curve, of seconds.

    Raises:
        ValueError: If the runs judged different users.
    """
    groups = {}
    for group, first in runs[0].users.items():
        if any(run.users[group].ids != first.ids for run in runs):
            raise ValueError(f"expected the same {group} users for all seeds; the runs come from different splits")
        values = {name: np.mean([run.users[group].values[name] for run in runs], axis=0) for name in _VALUES}
        groups[group] = Users(first.ids, values, float(np.mean([run.users[group].ece for run in runs])))
    curve = None
    if all(run.few_shot for run in runs):
        curves = [run.few_shot for run in runs if run.few_shot]
        curve = {**curves[0]}
        for name in ("accuracy", "accuracy_low", "accuracy_high"):
            curve[name] = np.mean([[np.nan if v is None else v for v in one[name]] for one in curves], axis=0).tolist()
    facts = {**runs[0].facts}
    for name in ("fit_seconds", "adapt_ms", "val_value"):
        found = [run.facts[name] for run in runs if run.facts.get(name) is not None]
        if found:
            facts[name] = float(np.mean(found))
    return Run(groups, curve, facts)


def numbers_of(users: Users, num_resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """All numbers of a group with intervals over users."""
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
        ties=0,
        labelled_ties=0,
        bins=one_bin,
    )
    with np.errstate(invalid="ignore"):
        numbers = summarize(table, num_resamples, seed)
    for name in ("ties", "labelled_ties", "global_log_loss"):
        numbers.pop(name, None)
    return numbers


def make_row(row: Row, runs: Mapping[int, Run]) -> Row:
    """Fill a row from its runs, seed -> run; without any it stays a row of errors."""
    if not runs:
        return row
    mean = average(list(runs.values()))
    numbers = {group: numbers_of(users) for group, users in mean.users.items()}
    for group, found in numbers.items():
        macro = [float(run.users[group].values["accuracy"].mean()) for run in runs.values()]
        found["accuracy_seed_sd"] = float(np.std(macro, ddof=1)) if len(macro) > 1 else math.nan
    filled = {"num_seeds": len(runs), "users": mean.users, "numbers": numbers, "few_shot": mean.few_shot}
    return Row(**{**vars(row), **filled, "facts": mean.facts})


def other_user_row(best: Row) -> Row:
    """The control of a method that scores every user with the state of another one."""
    users = {}
    for group, own in best.users.items():
        nothing = np.full(len(own.ids), np.nan)
        values = {**dict.fromkeys(_VALUES, nothing), "num_pairs": own.values["num_pairs"]}
        users[group] = Users(own.ids, {**values, "accuracy": own.values["other_accuracy"]}, math.nan)
    return Row(
        name=f"{best.name}, another user",
        kind="control",
        about=f"{best.name} with the state of a random other user",
        num_seeds=best.num_seeds,
        users=users,
        numbers={group: numbers_of(found) for group, found in users.items()},
        command=best.command,
    )


def verdicts(row: Row) -> list[str]:
    """One sentence per group of users about a personal method."""
    if row.kind != "method" or not row.is_personal:
        return []
    return [verdict(f"{row.name}, {group}", row.numbers[group]) for group in GROUPS if group in row.numbers]


def versus(rows: Sequence[Row], opponent: str) -> list[Versus]:
    """Methods and baselines against the opponent; p-values corrected over the methods of a group, baselines have none.

    Controls are left out: with shuffled users a user's pairs are not those the opponent was judged on.
    """
    found = []
    second = next((row for row in rows if row.name == opponent and row.users), None)
    for group in GROUPS if second else ():
        assert second is not None
        rivals = [row for row in rows if row is not second and row.kind != "control"]
        rivals = [row for row in rivals if group in row.users and group in second.users]
        tests = [_compare(row, second, group) for row in rivals]
        p_values = np.array(
            [test.p_value if row.kind == "method" else math.nan for row, test in zip(rivals, tests, strict=True)]
        )
        found += [test._replace(p_holm=p) for test, p in zip(tests, holm(p_values).tolist(), strict=True)]
    return found


def all_pairs(rows: Sequence[Row]) -> list[Versus]:
    """Every method against every other; p-values corrected over all pairs of a group."""
    found = []
    for group in GROUPS:
        rivals = [row for row in rows if row.kind == "method" and group in row.users]
        tests = [_compare(first, second, group) for first, second in combinations(rivals, 2)]
        adjusted = holm(np.array([test.p_value for test in tests]))
        found += [test._replace(p_holm=p) for test, p in zip(tests, adjusted.tolist(), strict=True)]
    return found


def _compare(first: Row, second: Row, group: str) -> Versus:
    """Paired difference in accuracy over the users both judged."""
    left, right = first.users[group], second.users[group]
    if left.ids != right.ids:
        raise ValueError(f"expected the same {group} users in {first.name} and {second.name}; their splits differ")
    test = compare(left.values["accuracy"], right.values["accuracy"])
    return Versus(group, first.name, second.name, *test[:4], math.nan)


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Methods, then controls, then baselines; best accuracy on unseen users first, failures last."""

    def place(row: Row) -> tuple[int, float]:
        group = next((row.numbers[name] for name in GROUPS if name in row.numbers), {})
        return ("method", "control", "baseline").index(row.kind), -group.get("accuracy", -1.0)

    return sorted(rows, key=place)
