"""Which layout a file has, by the names of its columns and what some of its rows hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plm.data.cells import value_at
from plm.data.checker import report
from plm.data.files import Records, or_empty
from plm.data.layouts import LAYOUTS, Layout, layout_of
from plm.data.pair_rows import pair_rows
from plm.data.reading import found_columns
from plm.data.values import short, to_response
from plm.data.winners import label_of, sides_of, winner_columns

_USERS = (
    "user_id user userid annotator annotator_id worker worker_id rater rater_id judge labeler labeler_id labeller "
    "reviewer participant participant_id evaluator completed_by"
).split()
_PROMPTS = "prompt question instruction query input context history post request".split()
_SIDES = [
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("better", "worse"),
    ("better_response", "worse_response"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
    ("positive", "negative"),
]
"""What columns of two responses are called of which the first is the preferred one."""
_STEMS = "response answer completion output reply text option candidate model_response conversation assistant".split()
_ENDS = [("a", "b"), ("A", "B"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second")]
_TWO = [(f"{stem}{mark}{a}", f"{stem}{mark}{b}") for stem in _STEMS for mark in ("_", "", "-", " ") for a, b in _ENDS]
"""What columns of two responses are called that stand in any order."""
_SYNONYMS = {
    "user_id": _USERS,
    "prompt": _PROMPTS,
    "responses": "responses completions answers outputs candidates".split(),
    "ratings": "ratings scores".split(),
    "ranking": "ranking ranks rank".split(),
    "best_first": ["best_first", "ranked_responses"],
    "response": "response answer completion output reply".split(),
    "rating": "rating score stars grade".split(),
}
_GENERAL = ("pairs", "implicit_prompt", "two_responses", "ratings", "ranking", "best_first", "long_ratings")
"""Layouts whose columns may be called otherwise."""


@dataclass(frozen=True)
class Guess:
    """A layout that a file may have."""

    name: str
    columns: dict[str, str | None]
    """Our column name -> the file's, of all that are read."""
    winner: dict[str, Any] | None
    attributes: dict[str, float] | None
    problem: str | None = None
    """Why the columns cannot be read so."""
    malformed: list[str] = field(default_factory=list)
    """What is wrong with which of the rows that were looked at."""
    pairs: list[tuple[str, ...]] = field(default_factory=list)
    """What is read of the rows that were looked at."""

    @property
    def rank(self) -> int:
        """0 where every row is one of pairs, 1 where some are malformed, 2 where most are."""
        return 0 if not self.malformed else 1 if len(self.malformed) < len(self.pairs) else 2

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `plm.data.schema.read_pairs`; what the layout says itself is left out."""
        known = LAYOUTS[self.name]
        others = {name: column for name, column in self.columns.items() if known.columns.get(name) != column}
        options: dict[str, Any] = {"layout": self.name, "columns": others}
        if self.winner != known.winner:
            options["winner"] = self.winner
        if self.attributes != known.attributes:
            options["attributes"] = self.attributes
        return {name: value for name, value in options.items() if value}

    def description(self, path: Path, names: Iterable[str]) -> list[str]:
        """Lines that say which layout it is, where everything comes from, and which columns are not read."""
        lines = [f"{path} is read as {self.name}: {LAYOUTS[self.name].about}"]
        nothing = {"user_id": "no column: one population", "prompt": "no column: what both conversations share"}
        for name, place in self.columns.items():
            if place is not None or name in nothing:
                lines.append(f"  {name:<11} {nothing[name] if place is None else place}")
        if self.winner:
            labels = {side: self.winner[side] for side in ("left", "right", "tie") if side in self.winner}
            means = "; ".join(f"{side}: {label}" for side, label in labels.items())
            lines.append(f"  {'winner':<11} {self.winner['column']}" + (f" ({means})" if means else ""))
        for column, weight in (self.attributes or {}).items():
            lines.append(f"  {'rating':<11} {weight:g} x {column}")
        heads = {place.partition(".")[0] for place in self.places}
        unread = [name for name in names if name not in {*self.places, *heads}]
        if unread:
            lines.append(f"  {'not read':<11} {', '.join(unread)}")
        lines.append(f"in a recipe, data.source.init_args: {json.dumps(self.options)}")
        return [line if line.isprintable() else repr(line) for line in lines]

    @property
    def places(self) -> set[str]:
        """Columns of the file that are read."""
        places = [*self.columns.values(), *(self.attributes or ()), (self.winner or {}).get("column")]
        return {place for place in places if place is not None}


def guess_layout(
    path: Path,
    records: Records,
    layout: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    winner: Mapping[str, Any] | None = None,
    attributes: Mapping[str, float] | None = None,
) -> Guess:
    """Guess the layout of a file; what is said is not guessed.

    Layouts whose rows are all pairs go before those with malformed rows, and these before those of which most rows
    are malformed. Of what is left, layouts that leave unread what another reads are given up.

    Args:
        path: The file, for messages.
        records: Some of its rows.
        layout: Its name, where it is known, as the others.
        columns: Our column name -> the file's.
        winner: As of ``layout_of``.
        attributes: As of ``layout_of``.

    Returns:
        The guess; which of the rows are malformed, reading them says.

    Raises:
        ValueError: If the columns fit no layout, or several that read the rows differently; the message names the
            options. If no row can be parsed.
    """
    if records.problems and not records.rows:
        raise ValueError(_unparsed(path, records, " and no other"))
    if not records.rows:
        raise ValueError(f"expected preference pairs, got none in {or_empty(path)}")
    given = [name for name in LAYOUTS if layout in (None, name)]
    if not given:
        layout_of(layout)  # says which there are
    found = [guess for name in given for guess in _guesses(records, name, columns or {}, winner, attributes)]
    guesses = [_checked(path, records, guess) for guess in found]
    columns_fit = [guess for guess in guesses if guess.problem is None]
    fits = [guess for guess in columns_fit if guess.rank == min(one.rank for one in columns_fit)]
    best = [one for one in fits if not any(one.places < other.places for other in fits)]
    if not best:
        reasons = [f"  {guess.name}: {guess.problem or guess.malformed[0]}" for guess in guesses]
        reasons += [_unparsed(path, records, " besides")] if records.problems else []
        raise ValueError(
            "\n".join(
                [
                    f"{path}: expected one of the layouts of docs/data.md, got the columns {', '.join(records.names)}; "
                    "say what they are by --layout, --columns NAME=COLUMN and --winner column=COLUMN",
                    *reasons,
                ]
            )
        )
    others = [one for one in best[1:] if not one.pairs or one.pairs != best[0].pairs]
    if others:
        lines = [f"  {_as_options(guess)}" for guess in (best[0], *others)]
        raise ValueError("\n".join([f"{path}: can be read in {len(lines)} ways; choose one of them:", *lines]))
    return min(best, key=lambda guess: (len(guess.options), len(guess.options.get("columns", ()))))


def _unparsed(path: Path, records: Records, what: str) -> str:
    """Lines that could not be parsed."""
    return report([str(path)], [(0, line, problem) for line, problem in records.problems], what)


def _as_options(guess: Guess) -> str:
    """Options of the command line that choose a guess."""
    options = guess.options
    parts = [f"--layout {guess.name}"]
    if "columns" in options:
        parts.append("--columns " + " ".join(f"{name}={column or ''}" for name, column in options["columns"].items()))
    if "winner" in options:
        parts.append(f"--winner column={options['winner']['column']}")
    return " ".join(parts)


def _guesses(
    records: Records,
    name: str,
    said: Mapping[str, str | None],
    winner: Mapping[str, Any] | None,
    attributes: Mapping[str, float] | None,
) -> Iterator[Guess]:
    """Ways in which the columns of a file can be those of a layout."""
    known = LAYOUTS[name]
    weights = known.attributes if attributes is None else dict(attributes)
    if any(not _has(records, column) for column in weights or ()):
        return
    for columns in _columns(records, name, said):
        which = {**(known.winner or {}), **(winner or {})} or None
        if known.winner and not (winner and "column" in winner) and not _has(records, str(which and which["column"])):
            if name not in _GENERAL:
                continue
            unread = [column for column in records.names if column not in columns.values()]
            names = {key: column for key, column in columns.items() if column is not None}
            for column, labels in winner_columns(names, unread, records.rows):
                yield Guess(name, columns, _winner(column, labels, names), weights)
            continue
        yield Guess(name, columns, which, weights)


def _columns(records: Records, name: str, said: Mapping[str, str | None]) -> Iterator[dict[str, str | None]]:
    """Our column name -> the file's, in every way that fits a layout; nothing where one that it needs is missing."""
    known = LAYOUTS[name]
    columns: dict[str, str | None] = {}
    several: list[tuple[str, list[str]]] = []
    general = name in _GENERAL
    sides = _SIDES if name in ("pairs", "implicit_prompt") else _TWO if name == "two_responses" else []
    for ours, place in known.columns.items():
        if ours in said:
            columns[ours] = said[ours]
        elif place is not None and _has(records, place) and not (sides and ours in ("chosen", "rejected")):
            columns[ours] = place
        elif ours in ("chosen", "rejected") and sides:
            continue
        elif ours == "user_id" or (general and place is not None and ours in _SYNONYMS):
            like = [column for column in _SYNONYMS[ours] if _has(records, column)]
            columns[ours] = like[0] if like else None
            if len(like) > 1 and like[0] != ours:
                several.append((ours, like))
            if not like and ours != "user_id" and (ours, name) != ("prompt", "two_responses"):
                return
        elif place is None or ours == "status":
            columns[ours] = None
        else:
            return
    columns |= {ours: place for ours, place in said.items() if ours not in columns}
    fitting: list[tuple[str, str] | None] = [(a, b) for a, b in sides if _has(records, a) and _has(records, b)]
    for pair in fitting if sides and "chosen" not in columns else [None]:
        full = columns if pair is None else {**columns, "chosen": pair[0], "rejected": pair[1]}
        if not several:
            yield full
        for ours, like in several:
            yield from ({**full, ours: column} for column in like)


def _winner(column: str, labels: Sequence[Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The option for a column of which some labels end as the names of the two columns do."""
    winner: dict[str, Any] = {"column": column}
    known = sides_of(winner, names)
    ends = {"left": label_of(names["chosen"])[-1], "right": label_of(names["rejected"])[-1]}
    for label in labels:
        spelt = label_of(label)
        side = next((side for side, end in ends.items() if spelt.endswith(end) and ends["left"] != ends["right"]), None)
        if spelt not in known and side is not None:
            winner.setdefault(side, []).append(label)
    return winner


def _has(records: Records, column: str) -> bool:
    """Whether rows have a value in a column, or at the end of a path."""
    head = column.partition(".")[0]
    if column not in records.names and head not in records.names:
        return False
    return column in records.names or any(_any(value_at(row, column)) for row in records.rows)


def _any(value: Any) -> bool:
    """Whether a value, or one of a list, is given."""
    return any(map(_any, value)) if isinstance(value, list) else value is not None


def _checked(path: Path, records: Records, guess: Guess) -> Guess:
    """A guess with the pairs that it reads, or with what is wrong with it."""
    try:
        layout = layout_of(guess.name, guess.columns, guess.winner, guess.attributes)
        layout = found_columns(path, layout, records.names)
        pairs, malformed = _read(records, layout)
        return replace(guess, pairs=pairs, malformed=malformed)
    except ValueError as error:
        return replace(guess, problem=str(error).removeprefix(f"{path}: "))


def _read(records: Records, layout: Layout) -> tuple[list[tuple[str, ...]], list[str]]:
    """Pairs as (user, prompt, better, worse or tie), and what is wrong with malformed rows.

    Raises:
        ValueError: If a column that names the winner is not read, or the rows hold nothing of the layout.
    """
    if "chosen" in layout.columns and not layout.no_winner:
        places = {*layout.columns.values(), *(place.partition(".")[0] for place in layout.columns.values())}
        unread = [column for column in records.names if column not in places]
        for column, labels in winner_columns(layout.columns, unread, records.rows):
            raise ValueError(
                f"nothing reads the column {column!r} ({', '.join(map(short, labels[:3]))}) that names a winner"
            )
    rows = pair_rows(records, layout)
    unparsed = set(records.problems)
    malformed = [problem for line, problem in rows.problems if (line, problem) not in unparsed]
    pairs = []
    for row in rows.rows:
        try:
            pairs.append(_pair(row, layout))
        except ValueError as error:
            malformed.append(str(error))
    if not pairs and not malformed:
        raise ValueError("no row holds a pair")
    return pairs, malformed


def _pair(row: dict[str, Any], layout: Layout) -> tuple[str, ...]:
    """One of them."""
    sides = [to_response(row.get("chosen")).text, to_response(row.get("rejected")).text]
    side = layout.sides.get(label_of(row["winner"])) if "winner" in row else "left"
    if side is None:
        raise ValueError(f"nothing says what the label {row['winner']!r} means")
    sides = sides[::-1] if side == "right" else sides
    return (str(row["user_id"]), str(row.get("prompt")), *sides, "tie" if side == "tie" or row.get("tie") else "")
