"""Columns that name the preferred of two responses: what their cells say, and how such a column is told from others.

Axes: N rows of a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plm.data.cells import printed_list
from plm.data.checker import Checker
from plm.data.columns import REQUIRED, Column
from plm.data.values import short, spelling
from plm.messages import setting

SIDES = ("left", "right", "tie")
WORDS = {
    **dict.fromkeys(("left", "a", "model_a", "response_a"), "left"),
    **dict.fromkeys(("right", "b", "model_b", "response_b"), "right"),
    **dict.fromkeys(("tie", "tie_(bothbad)"), "tie"),
}
"""What a cell says by itself, beside the names of the two columns: label -> side."""
_NAMES = re.compile(r"winner|comparison|prefer|better|best|chosen_(side|by)")
"""What columns are called that name a winner; few labels, whatever they are, make that sure."""
_VAGUE_NAMES = re.compile(r"won|choice|choose|label|verdict|vote|pick|select|judg")
"""What columns are called that may name a winner; letters and numbers as labels make that sure."""
_MOST_LABELS, _LONGEST_LABEL = 6, 24
_LABEL = re.compile(
    r"(model|response|answer|completion|conversation|option|output|candidate|assistant|text|reply)_?([ab0-9]|left|right)"
    r"|left|right|tie.*|both_(bad|good)|neither"
)
"""Labels that make it sure under any name."""
_SHORT_LABEL = re.compile(r"[ab]|-?[0-3]|true|false|first|second|same|equal|both|none")


def label_of(value: Any) -> str:
    """What a cell says, however it is spelt.

    Example:
        >>> [label_of(value) for value in ("Model A", "response-0", 1.0, "1.0", True)]
        ['model_a', 'response_0', '1', '1', 'true']
    """
    text = spelling(str(value)).lower()
    return text[:1] + re.sub(r"[\s_-]+", "_", text[1:])


def sides_of(winner: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """What the labels of a column mean: label -> left, right or tie.

    Args:
        winner: The option: ``column``, and a label or a list of them under ``left``, ``right`` and ``tie``.
        names: Our column name -> the file's.

    Raises:
        ValueError: For another key, none ``column``, or a label with two meanings.
    """
    unknown = [key for key in winner if key not in ("column", *SIDES)]
    if unknown or "column" not in winner:
        raise ValueError(f"winner: expected keys column, left, right, tie, got {list(winner)!r}")
    sides: dict[str, str] = {}
    for side in SIDES:
        labels = winner.get(side)
        for label in labels if isinstance(labels, list | tuple) else [] if labels is None else [labels]:
            if sides.setdefault(label_of(label), side) != side:
                raise ValueError(f"winner: the label {label!r} means both {sides[label_of(label)]} and {side}")
    own = {label_of(names[name]): side for name, side in (("chosen", "left"), ("rejected", "right")) if name in names}
    return {**WORDS, **own, **sides}


def sorted_by_winner(
    columns: dict[str, Column | None], sides: Mapping[str, str], checker: Checker
) -> dict[str, Column | None]:
    """Columns whose chosen response is the one that the column ``winner`` names; as they are where there is none.

    Args:
        columns: Raw columns, of which ``winner`` tells the side.
        sides: Label -> left, right or tie.
        checker: Takes rows with any other label.
    """
    winner = columns.pop("winner", None)
    if winner is None or not all(columns[name] for name in REQUIRED):
        return columns
    blank = [code for code, value in enumerate(winner.values) if _is_blank(value)]
    winner = Column(np.where(np.isin(winner.codes, blank), -1, winner.codes), winner.values)
    words = checker.convert("winner", winner, lambda value: _side_of(value, sides), nullable=False)
    side = np.array([*("left" if word is None else word for word in words), "left"])[winner.codes]
    for left, right in (("chosen", "rejected"), ("chosen_score", "rejected_score")):
        first, second = columns[left], columns[right]
        if first is None and second is None:
            continue
        unknown = Column(np.full(len(side), -1, dtype=np.int64), [])
        first, second = first or unknown, second or unknown
        second_codes = np.where(second.codes >= 0, second.codes + len(first.values), -1)
        values = [*first.values, *second.values]
        columns[left] = Column(np.where(side == "right", second_codes, first.codes), values)
        columns[right] = Column(np.where(side == "right", first.codes, second_codes), values)
    tie = columns["tie"] or Column(np.full(len(side), -1, dtype=np.int64), [])
    columns["tie"] = Column(np.where(side == "tie", len(tie.values), tie.codes), [*tie.values, True])
    return columns


def _side_of(value: Any, sides: Mapping[str, str]) -> str:
    """The side that a cell of the column ``winner`` names."""
    side = sides.get(label_of(value))
    if side is None:
        raise ValueError(f"expected one of {', '.join(dict.fromkeys([*SIDES, *sides]))}")
    return side


def _is_blank(value: Any) -> bool:
    """Whether a cell is a text without a mark."""
    return isinstance(value, str) and not value.strip()


def unknown_labels(winner: Column | None, column: str, sides: Mapping[str, str]) -> str:
    """What to do about labels without a meaning, whose rows are fine, for the first line of a report; or nothing.

    Args:
        winner: The raw column ``winner``.
        column: What the file calls it.
        sides: Label -> left, right or tie.
    """
    labels = [] if winner is None else [value for value in winner.values if not _is_blank(value)]
    unknown = [short(value) for value in labels if label_of(value) not in sides]
    if not unknown:
        return ""
    more = ", ..." if len(unknown) > 4 else ""
    said = setting("winner", {"column": column, "left": "...", "right": "...", "tie": "..."})
    return f"; correct them, or say what the labels {', '.join(unknown[:4])}{more} mean by {said}"


def winner_columns(
    names: Mapping[str, str], unread: Iterable[str], rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, list[Any]]]:
    """Columns that evidently name the preferred response, and what they say.

    Args:
        names: Our column name -> the file's.
        unread: Columns that nothing reads.
        rows: Some rows of the file.
    """
    renamed = names["chosen"] != "chosen" or names["rejected"] != "rejected"
    sides = {label_of(names[name]) for name in ("chosen", "rejected")}
    for column in unread:
        labels = {label_of(value): value for row in rows for value in _cells(row.get(column))}
        vague = renamed and _VAGUE_NAMES.search(column.lower()) is not None
        sure = renamed and _NAMES.search(column.lower()) is not None and len(labels) <= _MOST_LABELS
        if labels and all(
            (sure and len(label) <= _LONGEST_LABEL)
            or label in sides
            or _LABEL.fullmatch(label)
            or (vague and _SHORT_LABEL.fullmatch(label))
            for label in labels
        ):
            yield column, sorted(labels.values(), key=str)


def refuse_unread_winner(
    path: Path, names: Mapping[str, str], unread: Iterable[str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a file with a column that evidently names the preferred response and that nothing reads.

    Read without it, every pair would say that the first response was preferred.

    Args:
        path: The file, for the message.
        names: Our column name -> the file's.
        unread: Columns that nothing reads.
        rows: Some rows of the file.

    Raises:
        ValueError: With the options that read the column, or say that it means something else.
    """
    for column, labels in winner_columns(names, unread, rows):
        got = ", ".join(map(short, labels[:4]))
        sides = {"left": f"<label of {names['chosen']}>", "right": f"<label of {names['rejected']}>"}
        raise ValueError(
            f"{path}: the column {column!r} ({got}) seems to say which response was preferred, and nothing reads "
            f"it; set {setting('winner', {'column': column, **sides})}, or {setting('winner', {'column': None})} if it "
            "says something else"
        )


def _cells(value: Any) -> list[Any]:
    """What a cell holds: one value, or those of a list."""
    value = printed_list(value)
    return [cell for cell in (value if isinstance(value, list) else [value]) if cell not in (None, "", [], {})]
