"""Per-item files: what a model got right, one judgement of one user a row, whoever wrote the file.

Axes: N judgements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plm.arrays import Float64Array
from plm.data.files import position, read_records
from plm.data.values import parsed, short, to_bool, to_id, to_number
from plm.messages import counted, listed, nearest

CONTROLS = ("population_margin", "other_margin", "shuffled_margin", "flipped_margin")
"""Optional columns: margins of the same rows by the population's state, by another user's, and by states learned from
pairs of permuted users and from the user's own pairs with reversed labels."""
_COLUMNS = ("item", "user", "correct", "margin", "tie", "users", *CONTROLS)
_OURS = {"user": "user_id"}
"""Our name of a column -> what it is called in pairs files and ``predictions.csv``."""


@dataclass(frozen=True)
class ItemScores:
    """Judgements of one file, in its order; those that are labelled ties are left out."""

    name: str
    """The path as it was given."""
    items: list[str]
    """N distinct names of judgements."""
    users: list[str]
    """N ids: who judged."""
    correct: Float64Array
    """``(N,)`` 1 = right, 0 = wrong, one half where the model could not tell."""
    controls: dict[str, Float64Array]
    """Column of `CONTROLS` that the file has -> ``(N,)`` correctness by it, nan where the file has no margin."""
    num_ties: int
    """Rows left out, as their user called them a tie."""
    where: list[str]
    """N places, as ``file:line``."""
    groups: list[str]
    """N times seen or unseen, what the user is; empty where no column ``users`` says so."""


class _Row(NamedTuple):
    item: str
    user: str
    correct: float
    controls: dict[str, float]
    tie: bool
    group: str


def read_items(place: str | Path, columns: Mapping[str, str] | None = None) -> ItemScores:
    """Read what a model got right.

    Args:
        place: JSONL(.gz), CSV, JSON or Parquet with the columns ``item``, ``user`` (or ``user_id``) and ``correct``
            (0 to 1) or ``margin`` (above zero = right, zero = one half); or the folder of a run, which stands for its
            ``predictions*.csv``, there or in the folder of ``plm predict`` beside it. Optional: ``tie`` (true = the
            user has no preference: left out), ``users`` (what the user is: seen or unseen) and `CONTROLS`.
        columns: Our column name -> the file's.

    Raises:
        ValueError: With every malformed row as ``file:line``, if a column is missing, or an item occurs twice.
    """
    unknown = [name for name in columns or {} if name not in _COLUMNS]
    if unknown:
        near = nearest(unknown[0], _COLUMNS)
        raise ValueError(f"columns: expected keys among {', '.join(_COLUMNS)}, got {unknown[0]!r}{near}")
    rows: list[_Row] = []
    where: list[str] = []
    problems: list[str] = []
    for path in item_files(Path(place)):
        records = read_records(path)
        names = _names(path, records.names, columns or {})
        problems += [f"{position(path, line)}: {text}" for line, text in records.problems]
        for line, record in zip(records.lines, records.rows, strict=True):
            try:
                rows.append(_row({name: record.get(column) for name, column in names.items()}))
                where.append(position(path, line))
            except ValueError as error:
                problems.append(f"{position(path, line)}: {error}")
    if problems:
        start = f"{counted(len(problems), 'malformed row')} to correct or remove:"
        raise ValueError(listed(start, problems, indent=""))
    _check_items(str(place), rows, where)
    kept = [index for index, row in enumerate(rows) if not row.tie]
    if not kept:
        raise ValueError(f"expected rows with an item, a user and what was right in {place}, got none")
    controls = {name for index in kept for name in rows[index].controls}
    return ItemScores(
        str(place),
        [rows[index].item for index in kept],
        [rows[index].user for index in kept],
        np.array([rows[index].correct for index in kept]),
        {
            name: np.array([rows[index].controls.get(name, math.nan) for index in kept])
            for name in CONTROLS
            if name in controls
        },
        len(rows) - len(kept),
        [where[index] for index in kept],
        [rows[index].group for index in kept],
    )


def item_files(place: Path) -> list[Path]:
    """The file, or the files of predictions in the folder of a run or in that of ``plm predict`` beside it."""
    if not place.is_dir():
        return [place]
    beside = place.absolute().with_name(f"{place.absolute().name}-predict")
    for folder in (place, beside):
        if files := sorted(folder.glob("predictions*.csv")):
            return files
    raise ValueError(
        f"expected predictions.csv in {place} or in {beside.name} beside it, got none; plm predict --ckpt_path "
        f"{place}/checkpoints/best.ckpt writes it"
    )


def _names(path: Path, present: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Our name -> the file's, for the columns that the file has.

    Raises:
        ValueError: If one is missing.
    """
    names = {name: columns.get(name, name) for name in _COLUMNS}
    for name, ours in _OURS.items():
        if name not in columns and names[name] not in present:
            names[name] = ours
    missing = [name for name in ("item", "user", *columns) if names[name] not in present]
    if missing:
        hint = nearest(names[missing[0]], present) or "."
        raise ValueError(
            f"{path}: expected the columns item, user and correct or margin, got {', '.join(present) or 'no column'}: "
            f"{names[missing[0]]!r} is missing{hint} Set --columns {missing[0]}=COLUMN"
        )
    found = {name: column for name, column in names.items() if column in present}
    if not {"correct", "margin"} & found.keys():
        raise ValueError(
            f"{path}: expected a column correct (0 to 1) or margin (above zero = right), got {', '.join(present)}; set "
            "--columns margin=COLUMN"
        )
    return found


def _row(cells: Mapping[str, Any]) -> _Row:
    """One judgement of a row's cells under our names."""
    item, user = (parsed(name, cells[name], to_id) for name in ("item", "user"))
    tie = cells.get("tie") not in (None, "") and parsed("tie", cells["tie"], to_bool)
    told = {name: cells[name] for name in ("correct", "margin") if cells.get(name) not in (None, "")}
    group = next((name for name in ("seen", "unseen") if cells.get("users") == name), "")
    if tie:
        return _Row(item, user, 0.5, {}, True, group)
    if not told:
        raise ValueError("expected correct or margin, got neither; a model that cannot tell has a margin of 0")
    values = {name: parsed(name, value, _share if name == "correct" else _correctness) for name, value in told.items()}
    if len(set(values.values())) > 1:
        raise ValueError(f"correct and margin contradict each other, got {short(told)}; leave out one of them")
    given = {name: cells[name] for name in CONTROLS if cells.get(name) not in (None, "")}
    controls = {name: parsed(name, value, _correctness) for name, value in given.items()}
    return _Row(item, user, next(iter(values.values())), controls, False, group)


def _share(value: Any) -> float:
    """How right a judgement is, from 0 to 1; true and false are 1 and 0."""
    number = float(value) if isinstance(value, bool) else None
    if isinstance(value, str) and value.lower() in ("true", "false"):
        number = float(value.lower() == "true")
    number = to_number(value) if number is None else number
    if not 0 <= number <= 1:
        raise ValueError("expected true, false or a number from 0 to 1")
    return number


def _correctness(value: Any) -> float:
    """1 for a margin above zero, one half for zero, 0 below."""
    margin = to_number(value)
    if not math.isfinite(margin):
        raise ValueError("expected a finite number")
    return 0.5 if margin == 0 else float(margin > 0)


def _check_items(name: str, rows: Sequence[_Row], where: Sequence[str]) -> None:
    """Raise if an item occurs twice."""
    first: dict[str, int] = {}
    again = [(first[row.item], index) for index, row in enumerate(rows) if first.setdefault(row.item, index) != index]
    if again:
        lines = [f"item {rows[later].item!r}: {where[earlier]} and {where[later]}" for earlier, later in again]
        start = f"expected every item once in {name}, got {len(again)} again; name each judgement differently:"
        raise ValueError(listed(start, lines))
