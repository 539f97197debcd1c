"""What somebody says of a model on the pairs: scores of single pairs, a reported accuracy, candidates to choose from.

Axes: N pairs, U users.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from plm.arrays import BoolArray, Float64Array
from plm.audit.comparison import user_means
from plm.audit.items import ItemScores
from plm.data.files import position, read_records, read_rows
from plm.data.keys import pair_names
from plm.data.schema import PairTable
from plm.data.values import parsed, to_bool, to_id, to_number
from plm.evaluation import compare, minimum_detectable_effect, points
from plm.messages import listed, missing_key

State = Literal["found", "clear", "unknown"]


class Fault(NamedTuple):
    """One way in which results go wrong, and whether it was found."""

    name: str
    state: State
    """unknown = it cannot be told from what was given."""
    text: str


@dataclass(frozen=True)
class ModelScores:
    """A model's correctness on the pairs it was to be scored on."""

    num_expected: int
    num_missing: int
    """Pairs without a score."""
    num_even: int
    """Pairs of which the model could not tell which response is better."""
    numbers: dict[str, float]
    """``accuracy`` over users with its ends, ``accuracy_micro``, and, for each control that the file has, ``personal
    minus`` the population or another user, and the permuted or reversed state less the population, with ends and
    ``_mde``."""
    accuracies: dict[str, float]
    """How an accuracy may be counted -> its value."""


_DIFFERENCES = {
    "personal_minus_global": ("margin", "population_margin"),
    "personal_minus_other": ("margin", "other_margin"),
    "shuffled_minus_global": ("shuffled_margin", "population_margin"),
    "flipped_minus_global": ("flipped_margin", "population_margin"),
}
"""Name of a difference -> columns of a per-item file."""
_HALF = "one half for what the model cannot tell"
_DROPPED = "without the pairs that it cannot tell"
_SCORED = "without the pairs that have no score"


def item_rows(table: PairTable) -> dict[str, int]:
    """Name of a pair -> its row; -1 = its files hold it, and the table leaves it out, such as a duplicate.

    The names are those of the column ``item`` of the files, or, where they have none, those that ``plm predict`` gives.

    Raises:
        ValueError: If the column holds a name twice or no name.
    """
    records = [read_records(Path(file)) for file in table.files]
    if not all("item" in one.names for one in records):
        return {name: row for row, name in enumerate(pair_names(table))}
    row_of = {tuple(where): row for row, where in enumerate(table.where.tolist())}
    if len(row_of) < len(table.where):
        raise ValueError(
            f"expected one pair a line where files have a column item, got {len(table.where)} pairs in {len(row_of)} "
            "lines: write a line for each pair of a list of ratings, or leave the column out"
        )
    rows: dict[str, int] = {}
    places: dict[str, str] = {}
    again = []
    for file, one in enumerate(records):
        for line, record in zip(one.lines, one.rows, strict=True):
            where = position(table.files[file], line)
            try:
                name = parsed("item", record.get("item"), to_id)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if name in rows:
                again.append(f"{name!r}: {places[name]} and {where}")
            places[name] = where
            rows[name] = row_of.get((file, line), -1)
    if again:
        start = f"expected every item once in {', '.join(table.files)}, got {len(again)} again:"
        raise ValueError(listed(start, again))
    return rows


def score_model(table: PairTable, expected: BoolArray, scores: ItemScores) -> ModelScores:
    """Lay the scores of a model beside the pairs.

    Args:
        table: The pairs.
        expected: ``(N,)`` the pairs that were to be scored; those that users called ties are left out.
        scores: What the model got right; scores of other pairs of the table are left out.

    Raises:
        ValueError: If an item is none of the table's or belongs to another user, or none of ``expected`` was scored.
    """
    place = item_rows(table)
    lines = [f"{item!r} ({where})" for item, where in zip(scores.items, scores.where, strict=True) if item not in place]
    if lines:
        start = (
            f"expected items of the pairs in {scores.name}, got {len(lines)} others; the pairs name theirs in a column "
            "item, or by their content, as plm predict does:"
        )
        raise ValueError(listed(start, lines))
    all_rows = np.array([place[item] for item in scores.items])
    known = all_rows >= 0
    rows = all_rows[known]
    lines = [
        f"{item!r}: user {user!r} ({where}), user {table.user_ids[table.user[row]]!r} ({table.position(row)})"
        for item, user, where, row in zip(scores.items, scores.users, scores.where, all_rows.tolist(), strict=True)
        if row >= 0 and table.user_ids[table.user[row]] != user
    ]
    if lines:
        start = f"expected the same user of every item in {scores.name} and the pairs, got {len(lines)} of others:"
        raise ValueError(listed(start, lines))
    wanted = expected & ~table.tie
    columns = {"margin": scores.correct, **scores.controls}
    correct = {name: np.full(table.num_pairs, np.nan) for name in columns}
    for name, values in columns.items():
        correct[name][rows] = values[known]
        correct[name] = correct[name][wanted]
    own, owner = correct["margin"], table.user[wanted]
    if np.isnan(own).all():
        raise ValueError(f"expected scores of test pairs in {scores.name}, got {len(rows)} of other pairs only")

    def by_user(values: Float64Array) -> Float64Array:
        """Means of the users who have any."""
        known = ~np.isnan(values)
        means = user_means(values[known], owner[known], table.num_users)
        return means[~np.isnan(means)]

    def with_ends(name: str, values: Float64Array) -> dict[str, float]:
        test = compare(values, np.zeros_like(values))
        mde = minimum_detectable_effect(values)
        return {name: test.difference, f"{name}_low": test.low, f"{name}_high": test.high, f"{name}_mde": mde}

    numbers = with_ends("accuracy", by_user(own)) | {"accuracy_micro": float(np.nanmean(own))}
    numbers["num_users"] = len(by_user(own))
    groups = np.full(table.num_pairs, "", dtype=object)
    groups[rows] = np.array(scores.groups, dtype=object)[known]
    for name, (first, second) in _DIFFERENCES.items():
        if first in correct and second in correct:
            numbers |= with_ends(name, by_user(correct[first] - correct[second]))
    whole, told = np.nan_to_num(own, nan=0.5), np.where(own == 0.5, np.nan, own)
    partial = {_SCORED: own, _DROPPED: told} if np.isnan(own).any() else {_DROPPED: told}
    complete = {_HALF: whole, "wrong where it cannot tell": np.where(whole == 0.5, 0.0, whole)}
    counted = {**complete, **partial}
    alone = partial if np.isnan(own).any() else counted
    for group in sorted(set(groups[wanted]) - {""}):
        mine = groups[wanted] == group
        more = {f"{how}, {group} users": np.where(mine, one, np.nan) for how, one in alone.items()}
        counted = {**counted, **more} if not mine.all() else counted
    return ModelScores(
        int(wanted.sum()),
        int(np.isnan(own).sum()),
        int((own == 0.5).sum()),
        numbers,
        {
            f"mean over {unit}, {how}": float(mean)
            for how, values in counted.items()
            if not np.isnan(values).all()
            for unit, mean in (("users", by_user(values).mean()), ("pairs", np.nanmean(values)))
        },
    )


def tie_fault(model: ModelScores | None, reported: str | None, *, is_split: bool) -> Fault:
    """Whether what the model cannot tell was dropped from the denominator.

    Args:
        model: Its scores; None = none were given.
        reported: The accuracy that is claimed, as it is printed: ``0.742``, ``74.2`` or ``74.2%``.
        is_split: Whether the pairs say which of them are the test's.

    Raises:
        ValueError: If ``reported`` is no accuracy.
    """
    name = "ties dropped from the denominator"
    if model is None:
        return Fault(name, "unknown", "no scores of single pairs were given (--results)")
    share = model.num_missing / model.num_expected
    if share > 0.5 and not is_split:
        text = f"{share:.0%} of the pairs have no score, and nothing says which are the test's"
        return Fault(name, "unknown", f"{text} (--test_pairs, row_split, or the folder of a run that was fit on them)")
    half = 100 * next(value for how, value in model.accuracies.items() if _HALF in how)
    matching = [] if reported is None else _matching(model, reported)
    if any(_DROPPED not in how and _SCORED not in how for how in matching):
        return Fault(name, "clear", f"the reported {reported} is the {matching[0]}")
    if model.num_missing:
        text = (
            f"{model.num_missing} of {model.num_expected} test pairs have no score; the accuracy over users is "
            f"{points(model.numbers['accuracy'], '')} % of those scored and {half:.1f} % with one half for the others"
        )
        return Fault(name, "found", text)
    if reported is None or not model.num_even:
        text = f"each of {model.num_expected} test pairs has a score, {model.num_even} of them even"
        return Fault(name, "clear", text)
    if matching:
        text = (
            f"the reported {reported} is the {matching[0]}; with one half for {model.num_even} even pairs the mean over"
        )
        return Fault(name, "found", f"{text} users is {half:.1f} %")
    return Fault(name, "unknown", f"the reported {reported} is none of what the scores give")


def claim_fault(model: ModelScores | None, reported: str) -> Fault:
    """Whether the scores give the accuracy that is claimed, however it may have been counted.

    Args:
        model: Its scores; None = none were given.
        reported: The claim, as `tie_fault` takes it; it may be off by half a unit of its last digit.

    Raises:
        ValueError: If ``reported`` is no accuracy.
    """
    name = "a reported accuracy that the scores do not give"
    value, _ = _reported(reported)
    if model is None:
        return Fault(name, "unknown", "no scores of single pairs were given (--results)")
    matching = _matching(model, reported)
    if matching:
        how = min(matching, key=lambda way: abs(value - 100 * model.accuracies[way]))
        return Fault(name, "clear", f"the reported {reported} is {100 * model.accuracies[how]:.2f} %, the {how}")
    ways: dict[str, str] = {}
    for how, other in model.accuracies.items():
        ways.setdefault(f"{100 * other:.2f} %", how)
    counted = "; ".join(f"{percent} {how}" for percent, how in ways.items())
    return Fault(name, "found", f"the reported {reported} is none of what the scores give: {counted}")


def _matching(model: ModelScores, reported: str) -> list[str]:
    """The ways to count that give the reported accuracy, as far as its digits say."""
    value, tolerance = _reported(reported)
    return [how for how, other in model.accuracies.items() if abs(value - 100 * other) <= tolerance]


def _reported(text: str) -> tuple[float, float]:
    """Per cent that a reported accuracy stands for, and what rounding may have changed."""
    found = re.fullmatch(r"(\d+)(?:\.(\d+))?\s*(%?)", text.strip())
    number = float(found[0].rstrip("% ")) if found else -1.0
    if found is None or number > 100:
        raise ValueError(f"--reported: expected an accuracy such as 0.742 or 74.2%, got {text!r}")
    factor = 1.0 if found[3] or number > 1 else 100.0
    return factor * number, factor * (0.5 * 10.0 ** -len(found[2] or "") + 1e-9)


class Candidate(NamedTuple):
    """One of the models that a reported one was chosen from, such as an epoch or a setting."""

    name: str
    validation: float | None
    test: float
    is_selected: bool


def read_candidates(path: str) -> list[Candidate]:
    """Read candidates: rows of ``candidate``, ``validation``, ``test`` (higher is better) and ``selected``.

    Raises:
        ValueError: If a row is malformed, there are fewer than two, or not just one is selected.
    """
    example = '{"candidate": "epoch 3", "validation": 0.71, "test": 0.69, "selected": true}'
    found = read_rows(Path(path), _candidate, example)
    num_selected = sum(one.is_selected for one in found)
    if len(found) < 2 or num_selected != 1:
        raise ValueError(
            f"expected two candidates or more of which one is selected in {path}, got {len(found)} and {num_selected} "
            "selected; give every epoch or setting that was tested"
        )
    if len({one.validation is None for one in found}) > 1:
        raise ValueError(f"expected a validation value of every candidate in {path} or of none; complete the column")
    return found


def _candidate(row: dict[str, Any]) -> Candidate:
    for name in ("candidate", "test", "selected"):
        if name not in row:
            raise ValueError(missing_key(name, row))
    value = row.get("validation")
    validation = None if value in (None, "") else parsed("validation", value, to_number)
    name = parsed("candidate", row["candidate"], to_id)
    return Candidate(
        name, validation, parsed("test", row["test"], to_number), parsed("selected", row["selected"], to_bool)
    )


def selection_fault(candidates: Sequence[Candidate]) -> Fault:
    """Whether the reported model is the best on the test rather than on validation pairs."""
    name = "model selection on test"
    if not candidates:
        return Fault(name, "unknown", "no candidates were given (--candidates): which models were tested is not known")
    selected = next(one for one in candidates if one.is_selected)
    is_test_best = selected.test >= max(one.test for one in candidates)
    facts = f"{selected.name!r} was selected of {len(candidates)} candidates"
    validations = [one.validation for one in candidates if one.validation is not None]
    if selected.validation is None or not validations:
        if is_test_best:
            return Fault(name, "found", f"{facts}; it is the best on the test, and there is no validation value")
        return Fault(name, "unknown", f"{facts}; it is not the best on the test, and there is no validation value")
    if selected.validation >= max(validations):
        return Fault(name, "clear", f"{facts}; it is the best on validation pairs")
    best = max((one for one in candidates if one.validation is not None), key=lambda one: one.validation or 0.0)
    versus = f"validation pairs prefer {best.name!r}, whose test value is {best.test:g} instead of {selected.test:g}"
    if is_test_best:
        return Fault(name, "found", f"{facts}; it is the best on the test, but {versus}")
    return Fault(name, "unknown", f"{facts} by something else: {versus}")
