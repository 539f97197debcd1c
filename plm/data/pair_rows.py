"""Rows of any layout as rows of pairs: judgements of several people in one row, and of K responses that are graded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from plm.data.cells import printed_list, value_at
from plm.data.conversations import threads, with_prompt
from plm.data.files import Records
from plm.data.layouts import Layout
from plm.data.values import EVERYONE, is_number, parsed, short, to_id, to_number, to_response
from plm.messages import setting

_SUBMITTED = "submitted"
"""State of a judgement that its author has finished."""
_NOT_SHARED = ("response", "rating", "rank", "turn", "timestamp", "message_id", "role")
"""What differs between ratings of one group; everything else tells groups apart."""


@dataclass
class PairRows:
    """Rows with two responses each, under our names."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """Line of every row."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """Lines that are no pairs, and why."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Why judgements were left out -> how many."""


def pair_rows(records: Records, layout: Layout) -> PairRows:
    """Rows of pairs.

    Args:
        records: Rows of a file.
        layout: What the columns that the file has are.
    """
    pairs = PairRows(problems=list(records.problems))
    cells: list[tuple[int, dict[str, Any]]] = []
    for line, row in zip(records.lines, records.rows, strict=True):
        try:
            cells.append((line, _cells(row, layout)))
        except ValueError as error:
            pairs.problems.append((line, str(error)))
    for line, row in _groups(cells, pairs) if layout.is_long else cells:
        try:
            for judgement in _judgements(row, pairs.dropped):
                for pair in _pairs_of(judgement, pairs.dropped):
                    replies = with_prompt(pair, "prompt" in row)
                    if replies is None:
                        pairs.dropped["other_turns"] += 1
                        continue
                    pairs.rows.append(replies)
                    pairs.lines.append(line)
        except ValueError as error:
            pairs.problems.append((line, str(error)))
    return pairs


def _cells(row: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The cells of a row under our names; a weighted sum of attributes is the rating, or one for each response."""
    cells = {name: row[column] if column in row else value_at(row, column) for name, column in layout.columns.items()}
    if "user_id" not in cells:
        cells["user_id"] = EVERYONE
    for name in ("rating", "rank"):
        if cells.get(name) not in (None, ""):  # of long rows
            cells[name] = _number(name, cells[name])
    if layout.attributes:
        values = {column: value_at(row, column) for column in layout.attributes}
        if any(isinstance(value, list) for value in values.values()):
            lists = [value if isinstance(value, list) else [value] for value in values.values()]
            if len({len(value) for value in lists}) > 1:
                raise ValueError(f"attributes: expected lists of one length, got {short(values)}")
            cells["ratings"] = [_weighted(layout, one) for one in zip(*lists, strict=True)]
        else:
            cells["rating"] = _weighted(layout, list(values.values()))
    return cells


def _weighted(layout: Layout, values: Sequence[Any]) -> float:
    """The weighted sum of one value of each attribute."""
    return sum(
        weight * _number(column, value)
        for (column, weight), value in zip(layout.attributes.items(), values, strict=True)
    )


def _number(name: str, value: Any) -> float:
    """A finite number, also as text."""
    number = parsed(name, value, to_number)
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {short(value)}")
    return number


def _groups(cells: Sequence[tuple[int, dict[str, Any]]], pairs: PairRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with one response each as rows with all that a user rated of a prompt, at the line of the first.

    Responses without a rating or rank, those of a user in a tree of messages, and lonely ones are left out and counted.
    A response or a user that is none is a problem of its own line, not of the group.
    """
    dropped = pairs.dropped
    if cells and "parent_id" in cells[0][1]:
        before = threads([row for _, row in cells])
        dropped["no_thread"] += before.count(None)
        rows = zip(cells, before, strict=True)
        cells = [(line, {**row, "prompt": thread}) for (line, row), thread in rows if thread is not None]
    groups: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for line, row in cells:
        grade = row.get("rank") if "rank" in row else row.get("rating")
        if grade in (None, "") or row.get("role", "assistant") != "assistant":
            dropped["unrated"] += 1
            continue
        try:
            to_id(row.get("user_id", EVERYONE)), to_response(row["response"])
        except ValueError as error:
            pairs.problems.append((line, f"{error}, got {short([row.get('user_id'), row['response']])}"))
            continue
        key = repr({name: value for name, value in row.items() if name not in _NOT_SHARED})
        groups.setdefault(key, []).append((line, row))
    for group in groups.values():
        line, first = group[0]
        if len(group) == 1:
            dropped["one_response"] += 1
            continue
        shared = {name: value for name, value in first.items() if name not in (*_NOT_SHARED[:3], "parent_id")}
        name, values = ("ranking", "rank") if "rank" in first else ("ratings", "rating")
        yield (
            line,
            {**shared, "responses": [row["response"] for _, row in group], name: [row[values] for _, row in group]},
        )


def _judgements(row: dict[str, Any], dropped: Counter[str]) -> Iterator[dict[str, Any]]:
    """One row for each person whose judgement a row holds, where the winner is a list; else the row.

    Those without a winner, or with a status other than submitted, are left out and counted.
    """
    if "winner" not in row:
        yield row
        return
    several = {name: _flat(row[name]) for name in ("user_id", "winner", "status") if name in row}
    listed = {name: values for name, values in several.items() if isinstance(values, list)}
    if "winner" not in listed:
        yield row
        return
    torn = [name for name, value in several.items() if isinstance(value, str) and value.startswith("[")]
    if torn:
        raise ValueError(f"{torn[0]}: expected a list as JSON, got {short(several[torn[0]])}")
    lengths = {name: len(values) for name, values in listed.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"expected lists of one length, got {' and '.join(f'{n} {name}' for name, n in lengths.items())}"
        )
    for values in zip(*listed.values(), strict=True):
        judgement = {**row, **dict(zip(listed, values, strict=True))}
        if judgement.get("status", _SUBMITTED) != _SUBMITTED:
            dropped["not_submitted"] += 1
        elif judgement["winner"] in (None, ""):
            dropped["unanswered"] += 1
        else:
            yield judgement


def _flat(value: Any) -> Any:
    """A list, also where a text prints it, without the lists of one or none inside it; any other value as it is."""
    value = printed_list(value)
    if not isinstance(value, list):
        return value
    lists = [entry if isinstance(entry, list) else [entry] for entry in value]
    return [entry[0] if len(entry) == 1 else entry or None for entry in lists]


def _pairs_of(row: dict[str, Any], dropped: Counter[str]) -> Iterator[dict[str, Any]]:
    """The pair of a row, or all pairs of its responses by their grades.

    Of two responses the one with the higher grade is chosen; equal grades are a tie. The pairs of a row share its
    weight, so that it counts once however many responses it has. Pairs with an empty response, or twice the same
    one, are left out and counted.

    Raises:
        ValueError: If responses and grades do not go together.
    """
    names = ("responses", "ratings", "ranking", "best_first")
    if not any(name in row for name in names):
        yield row
        return
    given = {name: printed_list(row.pop(name, None)) for name in names}
    is_pair = row.get("chosen") is not None or row.get("rejected") is not None
    graded = [name for name in names[1:] if given[name] is not None]
    if not graded and (given["responses"] is None or is_pair):
        yield row
        return
    if is_pair or len(graded) > 1:
        both = "chosen and rejected" if is_pair else graded[1]
        raise ValueError(
            f"{graded[0]}: expected either responses with {graded[0]}, or {both}, got both; leave one unread, such as "
            f"{setting('columns', {graded[0]: None})}"
        )
    how = graded[0] if graded else "ratings"
    responses = given["best_first"] if how == "best_first" else given["responses"]
    grades = _checked_grades(how, responses, None if how == "best_first" else given[how])
    if how != "ratings":  # 1 is the best
        grades = [-grade for grade in grades]
    graded_responses = list(zip(grades, responses, strict=True))
    weight, share = row.get("weight"), 2.0 / (len(grades) * (len(grades) - 1))
    weight = 1.0 if weight is None else weight
    for first, second in combinations(graded_responses, 2):
        texts = (first[1], second[1])
        if texts[0] == texts[1] or any(isinstance(text, str) and not text.strip() for text in texts):
            dropped["same_text" if texts[0] == texts[1] else "empty"] += 1
            continue
        better, worse = (second, first) if second[0] > first[0] else (first, second)
        scores = {"chosen_score": better[0], "rejected_score": worse[0]} if how == "ratings" else {}
        yield {
            **row,
            **scores,
            "chosen": better[1],
            "rejected": worse[1],
            "tie": better[0] == worse[0],
            "weight": weight * share if is_number(weight) else weight,
        }


def _checked_grades(name: str, responses: Any, grades: Any) -> list[float]:
    """Grades, one number for each of two or more responses."""
    if not isinstance(responses, list) or len(responses) < 2:
        where = "best_first" if name == "best_first" else "responses"
        raise ValueError(f"{where}: expected a list of at least two, got {short(responses)}")
    grades = list(range(len(responses))) if name == "best_first" else grades
    if not isinstance(grades, list) or len(grades) != len(responses):
        raise ValueError(f"{name}: expected a number for each of {len(responses)} responses, got {short(grades)}")
    for grade in grades:
        if not is_number(grade):
            raise ValueError(f"{name}: expected finite numbers, got {short(grade)}")
    return grades
