"""Rows of files as rows of pairs: judgements of several people in one row, and of K responses that are rated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from plm.data.cells import printed_list, value_at
from plm.data.files import Records
from plm.data.values import is_number, short

_SUBMITTED = "submitted"
"""State of a judgement that its author has finished."""


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


def pair_rows(records: Records, names: Mapping[str, str]) -> PairRows:
    """Rows of pairs.

    Args:
        records: Rows of a file.
        names: Our column name -> the file's, for the columns that the file has; a path into a value is joined by dots.
    """
    pairs = PairRows(problems=list(records.problems))
    for line, row in zip(records.lines, records.rows, strict=True):
        cells = {name: value_at(row, column) for name, column in names.items()}
        try:
            for judgement in _judgements(cells, pairs.dropped):
                found = list(_pairs_of(judgement))
                pairs.rows += found
                pairs.lines += [line] * len(found)
        except ValueError as error:
            pairs.problems.append((line, str(error)))
    return pairs


def _judgements(row: dict[str, Any], dropped: Counter[str]) -> Iterator[dict[str, Any]]:
    """One row for each person whose judgement a row holds, where the winner is a list; else the row.

    Those without a winner, or with a status other than submitted, are left out and counted.
    """
    several = {name: _flat(row[name]) for name in ("user_id", "winner", "status") if name in row}
    listed = {name: values for name, values in several.items() if isinstance(values, list)}
    if "winner" not in listed:
        yield row
        return
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


def _pairs_of(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pair of a row, or all pairs of its ``responses`` by their ``ratings``.

    Of two responses the one with the higher rating is chosen; equal ratings are a tie. The pairs of a row share its
    weight, so that it counts once however many responses it has.

    Raises:
        ValueError: If responses and ratings do not go together.
    """
    responses, ratings = (printed_list(row.pop(name, None)) for name in ("responses", "ratings"))
    is_pair = row.get("chosen") is not None or row.get("rejected") is not None
    if ratings is None and (responses is None or is_pair):
        yield row
        return
    if is_pair:
        raise ValueError(
            "ratings: expected either responses with ratings, or chosen and rejected, got both; leave one unread, such "
            "as columns: {ratings: null}"
        )
    rated = list(zip(_checked_ratings(responses, ratings), responses, strict=True))
    weight, share = row.get("weight"), 2.0 / (len(rated) * (len(rated) - 1))
    weight = 1.0 if weight is None else weight
    for first, second in combinations(rated, 2):
        better, worse = (second, first) if second[0] > first[0] else (first, second)
        yield {
            **row,
            "chosen": better[1],
            "rejected": worse[1],
            "chosen_score": better[0],
            "rejected_score": worse[0],
            "tie": better[0] == worse[0],
            "weight": weight * share if is_number(weight) else weight,
        }


def _checked_ratings(responses: Any, ratings: Any) -> list[float]:
    """Ratings, one number for each of two or more responses that differ."""
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(f"responses: expected a list of at least two, got {short(responses)}")
    if not isinstance(ratings, list) or len(ratings) != len(responses):
        raise ValueError(f"ratings: expected a number for each of {len(responses)} responses, got {short(ratings)}")
    for rating in ratings:
        if not is_number(rating):
            raise ValueError(f"ratings: expected finite numbers, got {short(rating)}")
    repeated = [text for place, text in enumerate(responses) if text in responses[:place]]
    if repeated:
        raise ValueError(f"responses: expected each once, got {short(repeated[0])} again")
    return ratings
