"""The pair record: a columnar table of validated preference pairs, and its reader.

Axes: N pairs, I distinct (prompt, response) items.

Every column is factorised first and validated on its distinct values, so no Python runs per row of a Parquet file.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from plm.arrays import BoolArray, Float32Array, Float64Array, IntArray
from plm.data.checker import Checker, report
from plm.data.columns import OPTIONAL, REQUIRED, Column, factorise, joined, merged, stack
from plm.data.files import or_empty, position
from plm.data.layouts import layout_of
from plm.data.reading import read_columns
from plm.data.values import (
    USER_SPLITS,
    Response,
    canonical_messages,
    short,
    spelt_alike,
    to_bool,
    to_id,
    to_integer,
    to_prompt,
    to_response,
    to_row_split,
    to_score,
    to_timestamp,
    to_weight,
)
from plm.data.winners import sorted_by_winner, unknown_labels


@dataclass(frozen=True, repr=False)
class PairTable:
    """Validated pairs, column by column; texts are stored once and referred to by row."""

    user_ids: list[str]
    """Distinct users, sorted."""
    prompts: list[str]
    """Distinct prompts; chat messages as canonical JSON ``[{"role":...,"content":...},...]``."""
    responses: list[str]
    """Distinct response texts."""
    items: IntArray
    """``(I, 2)`` distinct (row of ``prompts``, row of ``responses``): what a feature is made of."""
    user: IntArray
    """``(N,)`` row of ``user_ids``."""
    prompt: IntArray
    """``(N,)`` row of ``prompts``."""
    chosen: IntArray
    """``(N,)`` row of ``items``."""
    rejected: IntArray
    """``(N,)`` row of ``items``."""
    weight: Float32Array
    """``(N,)`` non-negative, 1 where the corpus gives none."""
    chosen_score: Float32Array
    """``(N,)`` graded score, nan where the corpus gives none."""
    rejected_score: Float32Array
    """``(N,)`` the same for the other response."""
    tie: BoolArray
    """``(N,)`` True = the user found both equally good."""
    dialogues: list[str]
    """Distinct dialogue ids."""
    dialogue: IntArray
    """``(N,)`` row of ``dialogues``, -1 where the corpus gives none."""
    turn: IntArray
    """``(N,)`` turn in the dialogue, -1 where the corpus gives none."""
    timestamp: Float64Array
    """``(N,)`` seconds, nan where the corpus gives none."""
    row_split: IntArray
    """``(N,)`` row of ``ROW_SPLITS`` as the corpus says, -1 where it says nothing."""
    user_split: IntArray
    """``(N,)`` row of ``USER_SPLITS`` as the corpus says, -1 where it says nothing."""
    files: list[str]
    """Files the pairs came from."""
    where: IntArray
    """``(N, 2)`` (row of ``files``, line or row number), for error messages."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Why rows of the files are not here -> how many."""
    skipped: list[tuple[int, int, str]] = field(default_factory=list)
    """(row of ``files``, line or row number, what is wrong) of the malformed rows that were left out."""

    def __repr__(self) -> str:
        """How much there is of everything."""
        parts = f"{self.num_pairs:,} pairs of {self.num_users:,} users, {len(self.items):,} distinct texts"
        left_out = [f"{count:,} {why}" for why, count in self.dropped.items()]
        return f"PairTable({parts}{'; left out: ' + ', '.join(left_out) if left_out else ''})"

    @property
    def num_pairs(self) -> int:
        """Number of pairs, N."""
        return len(self.user)

    @property
    def num_users(self) -> int:
        """Number of distinct users."""
        return len(self.user_ids)

    @property
    def comparison(self) -> IntArray:
        """``(N,)`` number of the two items of a pair, whichever of them was chosen."""
        return np.minimum(self.chosen, self.rejected) * len(self.items) + np.maximum(self.chosen, self.rejected)

    def texts(self) -> list[tuple[str, str]]:
        """(prompt, response) of every item, in the order of ``items``."""
        return [(self.prompts[prompt], self.responses[response]) for prompt, response in self.items.tolist()]

    def position(self, row: int) -> str:
        """Where a pair was read, as ``file:line``."""
        file, line = self.where[row]
        return position(self.files[file], int(line)) if self.files else f"pair {row}"

    def take(self, index: npt.NDArray[Any]) -> PairTable:
        """Keep the pairs at ``index`` (or under a bool mask), in that order; users and texts keep their rows."""
        keeps_all = index.dtype == np.bool_ and len(index) == self.num_pairs and index.all()  # no copy of gigabytes
        return self if keeps_all else replace(self, **{name: getattr(self, name)[index] for name in _ROW_FIELDS})


_ROW_FIELDS = frozenset(
    "user prompt chosen rejected weight chosen_score rejected_score tie "
    "dialogue turn timestamp row_split user_split where".split()
)


def pair_table(
    user_ids: Sequence[str],
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    user: IntArray,
    prompt: IntArray,
    chosen: IntArray,
    rejected: IntArray,
    dropped: Mapping[str, int] | None = None,
    **optional: Any,
) -> PairTable:
    """Build a table from codes: sort the users, number the items, fill in what is not given.

    Args:
        user_ids: Distinct users, any order; those without a pair are left out.
        prompts: Distinct prompts.
        responses: Distinct responses.
        user: ``(N,)`` row of ``user_ids``.
        prompt: ``(N,)`` row of ``prompts``.
        chosen: ``(N,)`` row of ``responses``.
        rejected: ``(N,)`` row of ``responses``.
        dropped: Why rows of the corpus are not here -> how many; a reason without any is left out.
        **optional: Other fields of ``PairTable``.

    Returns:
        The table; rows keep their order.
    """
    num_pairs = len(user)
    used = np.flatnonzero(np.bincount(user, minlength=len(user_ids)))
    order = np.array(sorted(used.tolist(), key=lambda row: user_ids[row]), dtype=np.int64)
    rank = np.full(len(user_ids), -1, dtype=np.int64)
    rank[order] = np.arange(len(order))
    stride = max(len(responses), 1)
    sides = [np.unique(prompt * stride + side, return_inverse=True) for side in (chosen, rejected)]
    either = np.sort(np.concatenate([sides[0][0], sides[1][0]]))
    keys = either[np.diff(either, prepend=-1) > 0]  # numpy's union would hash them, which takes far longer
    items: list[IntArray] = [np.searchsorted(keys, np.asarray(distinct))[codes] for distinct, codes in sides]
    none = np.full(num_pairs, -1, dtype=np.int64)
    nan = np.full(num_pairs, np.nan, dtype=np.float32)
    defaults: dict[str, Any] = {
        "weight": np.ones(num_pairs, dtype=np.float32),
        "chosen_score": nan,
        "rejected_score": nan,
        "tie": np.zeros(num_pairs, dtype=np.bool_),
        "dialogues": [],
        "dialogue": none,
        "turn": none,
        "timestamp": nan.astype(np.float64),
        "row_split": none,
        "user_split": none,
        "files": [],
        "where": np.zeros((num_pairs, 2), dtype=np.int64),
    }
    return PairTable(
        user_ids=[user_ids[row] for row in order.tolist()],
        prompts=list(prompts),
        responses=list(responses),
        items=np.stack([keys // stride, keys % stride], axis=1),
        user=rank[user],
        prompt=prompt,
        chosen=items[0],
        rejected=items[1],
        dropped={why: count for why, count in (dropped or {}).items() if count},
        **{**defaults, **optional},
    )


def read_pairs(
    paths: str | Path | Sequence[str | Path],
    columns: Mapping[str, str | None] | None = None,
    winner: Mapping[str, Any] | None = None,
    attributes: Mapping[str, float] | None = None,
    layout: str | None = None,
    on_error: Literal["stop", "skip"] = "stop",
) -> PairTable:
    """Read and validate pairs from JSONL, JSON, CSV (all also .gz) and Parquet files.

    Args:
        paths: A file, or several, whose rows are concatenated.
        columns: As of ``plm.data.layouts.layout_of``, and so the others.
        winner: Which column names the preferred response, and by which labels.
        attributes: Columns whose weighted sum is the rating.
        layout: Name of a layout of ``plm.data.layouts.LAYOUTS``.
        on_error: What a malformed row does: ``stop``, or ``skip``, which leaves it out with all pairs of its line,
            counts it in ``dropped`` and keeps it in ``skipped``, see `plm.data.skipped.write_skipped`.

    Returns:
        The pairs without duplicates and without rows whose ``user_split`` is neither seen nor unseen; both are counted
        in ``dropped`` and warned about, as are judgements that are no pairs.

    Raises:
        ValueError: With every malformed row (the first 20 and the count), each as ``file:line: what is wrong``, where
            one stops or no other is left; if a file cannot be read to its end; or if a column seems to name the
            preferred response and is not read.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error: expected stop or skip, got {on_error!r}")
    paths = [paths] if isinstance(paths, str | Path) else paths
    described = layout_of(layout, columns, winner, attributes)
    raws = [read_columns(Path(path), described) for path in paths]
    problems = [(index, line, text) for index, raw in enumerate(raws) for line, text in raw.problems]
    files = [str(path) for path in paths]
    lines = [np.stack([np.full(len(raw.lines), i), raw.lines], axis=1) for i, raw in enumerate(raws)]
    where = np.concatenate([np.zeros((0, 2), dtype=np.int64), *lines]).astype(np.int64, copy=False)
    stacked = {name: stack(name, raws) for name in (*REQUIRED, *OPTIONAL, "winner")}
    dropped: Counter[str] = sum((Counter(raw.dropped) for raw in raws), Counter())
    for why, count in dropped.items():
        warnings.warn(f"{count} judgements left out: {why.replace('_', ' ')}", stacklevel=2)
    checker = Checker(where, problems)
    table = _validate(stacked, described.sides, checker, files, dropped)
    labels = unknown_labels(stacked["winner"], described.columns.get("winner", ""), described.sides)
    if problems and on_error == "stop":
        raise ValueError(
            report(files, sorted(set(problems)), labels or checker.advice)
        )  # pairs of a line may share one
    if problems:
        table = _without_malformed(stacked, described.sides, checker, files, dropped, labels)
    assert table is not None
    if table.num_pairs == 0:
        raise ValueError(f"expected preference pairs, got none in {', '.join(map(or_empty, files)) or 'no file'}")
    for ids in (table.user_ids, table.dialogues):
        alike = spelt_alike(ids)
        if alike:
            first, second = alike[0][:2]
            warnings.warn(
                f"ids {first!r} and {second!r} are two, as are {len(alike) - 1} more that look alike; if they are one, "
                "write them the same way",
                stacklevel=2,
            )
    return table


def _without_malformed(
    columns: Mapping[str, Column | None],
    sides: Mapping[str, str],
    checker: Checker,
    files: list[str],
    dropped: Mapping[str, int],
    advice: str,
) -> PairTable:
    """Validated table of the lines with which the checker found no problem.

    Raises:
        ValueError: With the problems, if no line is left.
    """
    problems, kept = sorted(set(checker.problems)), checker.clean
    lines = {(file, line) for file, line, _ in problems}
    if not kept.any():
        raise ValueError(report(files, problems, f", and no other is left{advice}"))
    warnings.warn(report(files, problems, f" left out{advice}"), stacklevel=3)
    clean = {name: column and Column(column.codes[kept], column.values) for name, column in columns.items()}
    table = _validate(clean, sides, Checker(checker.where[kept], []), files, {**dropped, "malformed": len(lines)})
    assert table is not None
    return replace(table, skipped=problems)


def make_pairs(rows: Sequence[dict[str, Any]], origin: str, dropped: dict[str, int] | None = None) -> PairTable:
    """Validate pairs that a source has put together, as strictly as those of a file.

    Args:
        rows: One dict per pair with our column names.
        origin: Where they come from, for error messages.
        dropped: Why rows of the corpus became no pair -> how many.

    Raises:
        ValueError: With every malformed row as ``origin:number: what is wrong``, or if there is none.
    """
    if not rows:
        left_out = f" (left out: {dropped})" if dropped else ""
        raise ValueError(f"expected preference pairs, got none in {origin}{left_out}")
    where = np.stack([np.zeros(len(rows), dtype=np.int64), np.arange(len(rows))], axis=1)
    problems: list[tuple[int, int, str]] = []
    columns = {name: factorise(row.get(name) for row in rows) for name in (*REQUIRED, *OPTIONAL)}
    table = _validate(columns, {}, Checker(where, problems), [origin], dropped or {})
    if problems:
        raise ValueError(report([origin], sorted(problems), " to correct or remove"))
    assert table is not None
    return table


def _validate(
    columns: Mapping[str, Column | None],
    labels: Mapping[str, str],
    checker: Checker,
    files: list[str],
    dropped: Mapping[str, int],
) -> PairTable | None:
    """Validated table, where ``labels`` says which side a winner's label is; None when the checker found problems."""
    columns = sorted_by_winner(dict(columns), labels, checker)
    num_pairs = len(checker.where)
    if not num_pairs or any(columns[name] is None for name in REQUIRED):
        nothing: dict[str, Any] = dict.fromkeys(_CODES, np.zeros(0, np.int64))
        return None if checker.problems else pair_table([], [], [], **nothing)
    text_of = {"user_id": to_id, "prompt": to_prompt, "chosen": to_response, "rejected": to_response}
    required = {name: column for name in REQUIRED if (column := columns[name]) is not None}
    distinct = {name: checker.convert(name, column, text_of[name], nullable=False) for name, column in required.items()}
    users, user = merged(required["user_id"].codes, distinct["user_id"])
    prompts, prompt = merged(required["prompt"].codes, distinct["prompt"])
    rows = {side: merged(required[side].codes, distinct[side]) for side in ("chosen", "rejected")}
    responses: dict[str, int] = {}
    sides = {side: _number(values, codes, responses) for side, (values, codes) in rows.items()}
    chat = {side: _take([r.history is not None for r in values], codes) for side, (values, codes) in rows.items()}
    ok = (sides["chosen"] >= 0) & (sides["rejected"] >= 0)
    texts = list(responses)
    checker.add(
        np.flatnonzero(ok & (sides["chosen"] == sides["rejected"])),
        lambda row: f"chosen equals rejected: {short(texts[sides['chosen'][row]])}",
    )
    checker.add(
        np.flatnonzero(ok & (chat["chosen"] != chat["rejected"])),
        lambda row: (
            "chosen and rejected must both be texts or both chat messages, got "
            + ("messages and a text" if chat["chosen"][row] else "a text and messages")
        ),
    )
    for side, (values, codes) in rows.items():
        history = _take([bool(r.history) for r in values], codes) & (prompt >= 0)
        for row in np.flatnonzero(history):
            before, expected = values[codes[row]].history, prompts[prompt[row]]
            if before not in (expected, canonical_messages([{"role": "user", "content": expected}])):
                differs = (
                    f"{side}: the messages before the reply differ from the prompt; drop them, got {short(before)}"
                )
                checker.add(np.array([row]), lambda _, text=differs: text)  # type: ignore[misc]
    optional = _optional_columns(columns, checker)
    if "user_split" in optional:
        both = np.zeros((len(users), 2), dtype=np.bool_)
        known = (user >= 0) & np.isin(optional["user_split"], (0, 1)) & checker.clean
        both[user[known], optional["user_split"][known]] = True
        contradictory = np.flatnonzero(both.all(axis=1))
        torn = np.flatnonzero(known & np.isin(user, contradictory))
        checker.add(torn, lambda row: f"user_split: user {users[user[row]]!r} is both seen and unseen")
    if checker.problems:
        return None
    codes_of = {"user": user, "prompt": prompt, **sides}
    kept, left_out = _filter(list(codes_of.values()), optional)
    keep = slice(None) if len(kept) == num_pairs else kept  # no copies of large files that are clean
    row_optional = {k: v if k == "dialogues" else v[keep] for k, v in optional.items()}
    return pair_table(
        users,
        prompts,
        texts,
        **{name: value[keep] for name, value in codes_of.items()},
        **row_optional,
        files=files,
        where=checker.where[keep],
        dropped={**dropped, **left_out},
    )


_CODES = ("user", "prompt", "chosen", "rejected")


def _optional_columns(columns: dict[str, Column | None], checker: Checker) -> dict[str, Any]:
    """Optional columns that the files have, as arrays with our null values."""
    specs: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
        "weight": (to_weight, 1.0, np.float32),
        "chosen_score": (to_score, math.nan, np.float32),
        "rejected_score": (to_score, math.nan, np.float32),
        "tie": (to_bool, False, np.bool_),
        "turn": (to_integer, -1, np.int64),
        "timestamp": (to_timestamp, math.nan, np.float64),
        "row_split": (to_row_split, -1, np.int64),
        "user_split": (
            lambda value: USER_SPLITS.index(value) if value in USER_SPLITS else len(USER_SPLITS),
            -1,
            np.int64,
        ),
    }
    out: dict[str, Any] = {}
    for name, (convert, null, dtype) in specs.items():
        column = columns[name]
        if column is not None and (column.codes >= 0).any():
            values = checker.convert(name, column, convert, nullable=not name.endswith("_split"))
            array = np.array([null if value is None else value for value in values] + [null], dtype=dtype)
            out[name] = array[column.codes]
    dialogue = columns["dialogue_id"]
    if dialogue is not None:
        values = checker.convert("dialogue_id", dialogue, to_id, nullable=True)
        out["dialogues"], out["dialogue"] = merged(dialogue.codes, values)
    return out


def _filter(codes: list[IntArray], optional: dict[str, Any]) -> tuple[IntArray, dict[str, int]]:
    """Rows to keep: first of its duplicates, and of a user who is seen or unseen."""
    dropped: dict[str, int] = {}
    num_pairs = len(codes[0])
    rows = np.arange(num_pairs)
    if "user_split" in optional:
        rows = rows[optional["user_split"] < len(USER_SPLITS)]
        if len(rows) < num_pairs:
            dropped["other_user_split"] = num_pairs - len(rows)
            warnings.warn(
                f"{num_pairs - len(rows)} pairs left out: their user_split is neither seen nor unseen", stacklevel=4
            )
    if "tie" in optional:
        codes = [*codes, optional["tie"].astype(np.int64)]
    kept = np.sort(rows[np.unique(joined(codes)[rows], return_index=True)[1]])  # the first of equals
    if len(kept) < len(rows):
        dropped["duplicates"] = len(rows) - len(kept)
        warnings.warn(
            f"{len(rows) - len(kept)} duplicate pairs left out: same user, prompt, chosen and rejected", stacklevel=4
        )
    return kept, dropped


def _number(values: list[Response], codes: IntArray, numbers: dict[str, int]) -> IntArray:
    lookup = [numbers.setdefault(value.text, len(numbers)) for value in values]
    return np.array([*lookup, -1], dtype=np.int64)[codes]


def _take(values: list[bool], codes: IntArray) -> BoolArray:
    return np.array([*values, False], dtype=np.bool_)[codes]
