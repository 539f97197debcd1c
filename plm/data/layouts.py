"""Layouts of preference data: what the columns of a file are, said once for the reader, the guess and the manual.

A layout names a file's columns by what they give. Two responses a row are ``chosen`` and ``rejected``, or whichever of
the two a column names (``winner``); K responses a row are ``responses`` with ``ratings`` or a ``ranking``, or
``best_first``; one response a row is a ``response`` with its ``rating`` or ``rank``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plm.data.columns import OPTIONAL, REQUIRED
from plm.data.winners import sides_of
from plm.messages import nearest, setting

LISTED = (("responses", "ratings"), ("responses", "ranking"), ("best_first",))
"""Columns of rows with K graded responses, in one of these ways."""
LONG = (("response", "rating"), ("response", "rank"))
"""Columns of rows with one graded response each."""
GRADED = tuple(dict.fromkeys(name for way in (*LISTED, *LONG) for name in way))
NAMED = ("status", "message_id", "parent_id", "role")
"""Columns that are read only where a layout names them."""


@dataclass(frozen=True)
class Layout:
    """What the columns of a file are."""

    columns: Mapping[str, str]
    """Our column name -> the file's, or a path into its values, joined by dots."""
    sides: Mapping[str, str] = field(default_factory=dict)
    """Label of the column ``winner`` -> left, right or tie."""
    attributes: Mapping[str, float] = field(default_factory=dict)
    """Columns whose weighted sum is the rating -> weight."""
    no_winner: bool = False
    """Whether the options say that no column names the winner."""

    @property
    def given(self) -> set[str]:
        """Our names of what the columns give; attributes are ratings."""
        return {*self.columns, *(("rating", "ratings") if self.attributes else ())}

    @property
    def is_long(self) -> bool:
        """Whether each row has one graded response."""
        return not {"chosen", "rejected"} <= self.given and not self.is_listed and self._has(LONG)

    @property
    def is_listed(self) -> bool:
        """Whether a row may have K graded responses."""
        return self._has(LISTED)

    def _has(self, ways: tuple[tuple[str, ...], ...]) -> bool:
        return any(self.given.issuperset(way) for way in ways)


@dataclass(frozen=True)
class KnownLayout:
    """A layout that data sets and tools have, by its options."""

    about: str
    columns: dict[str, str | None]
    winner: dict[str, Any] | None = None
    attributes: dict[str, float] | None = None


LAYOUTS = {
    "pairs": KnownLayout(
        "a prompt and two responses, the preferred one first if no column says: texts, replies or whole conversations",
        {"user_id": "user_id", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    ),
    "implicit_prompt": KnownLayout(
        "two whole conversations, chat messages or transcripts (TRL, HH): what they share is the prompt",
        {"user_id": None, "prompt": None, "chosen": "chosen", "rejected": "rejected"},
    ),
    "two_responses": KnownLayout(
        "two responses and a column that names the preferred one",
        {"user_id": "user_id", "prompt": "prompt", "chosen": "response_a", "rejected": "response_b"},
        {"column": "winner"},
    ),
    "ratings": KnownLayout(
        "lists of responses and of their ratings, higher is better",
        {"user_id": "user_id", "prompt": "prompt", "responses": "responses", "ratings": "ratings"},
    ),
    "ranking": KnownLayout(
        "lists of responses and of their ranks, 1 is the best",
        {"user_id": "user_id", "prompt": "prompt", "responses": "responses", "ranking": "ranking"},
    ),
    "best_first": KnownLayout(
        "a list of responses, the best one first",
        {"user_id": "user_id", "prompt": "prompt", "best_first": "best_first"},
    ),
    "long_ratings": KnownLayout(
        "one response a row with the rating that a user gave it",
        {"user_id": "user_id", "prompt": "prompt", "response": "response", "rating": "rating"},
    ),
    "label_studio": KnownLayout(
        "CSV or JSON-MIN export of Label Studio's pairwise template",
        {"user_id": "annotator", "prompt": "prompt", "chosen": "answer1", "rejected": "answer2"},
        {"column": "comparison"},
    ),
    "label_studio_tasks": KnownLayout(
        "JSON export of Label Studio's pairwise template",
        {
            "user_id": "annotations.completed_by",
            "prompt": "data.prompt",
            "chosen": "data.answer1",
            "rejected": "data.answer2",
        },
        {"column": "annotations.result.value.selected"},
    ),
    "argilla": KnownLayout(
        "records of Argilla with the question `preference`",
        {
            "user_id": "preference.responses.users",
            "prompt": "prompt",
            "chosen": "response-0",
            "rejected": "response-1",
            "status": "preference.responses.status",
        },
        {"column": "preference.responses"},
    ),
    "arena": KnownLayout(
        "comparisons of Chatbot Arena: two conversations and the winner",
        {"user_id": "judge", "prompt": None, "chosen": "conversation_a", "rejected": "conversation_b", "turn": None},
        {"column": "winner"},
    ),
    "sharegpt": KnownLayout(
        "turns with `from` and `value`, and two replies to them",
        {"user_id": None, "prompt": "conversations", "chosen": "chosen", "rejected": "rejected"},
    ),
    "shp": KnownLayout(
        "Stanford Human Preferences: two comments on a post, labels 1 = the first",
        {"user_id": None, "prompt": "history", "chosen": "human_ref_A", "rejected": "human_ref_B"},
        {"column": "labels", "left": 1, "right": 0},
    ),
    "multipref": KnownLayout(
        "MultiPref: several people judge two completions",
        {
            "user_id": "normal_worker_annotations.evaluator",
            "prompt": "text",
            "chosen": "completion_a",
            "rejected": "completion_b",
        },
        {
            "column": "normal_worker_annotations.overall_pref",
            "left": ["A-is-clearly-better", "A-is-slightly-better"],
            "right": ["B-is-clearly-better", "B-is-slightly-better"],
        },
    ),
    "helpsteer2": KnownLayout(
        "HelpSteer2: one response a row with ratings of several attributes",
        {"user_id": None, "prompt": "prompt", "response": "response"},
        attributes={"helpfulness": 1.0},
    ),
    "helpsteer3": KnownLayout(
        "HelpSteer3: two responses and how far the second is better, -3 to 3",
        {"user_id": None, "prompt": "context", "chosen": "response1", "rejected": "response2"},
        {"column": "overall_preference", "left": [-3, -2, -1], "right": [1, 2, 3], "tie": 0},
    ),
    "ultrafeedback": KnownLayout(
        "UltraFeedback: completions of an instruction, each with its scores",
        {"user_id": None, "prompt": "instruction", "responses": "completions.response"},
        attributes={"completions.fine-grained_score": 1.0},
    ),
    "nectar": KnownLayout(
        "Nectar: a transcript, and answers with their ranks",
        {"user_id": None, "prompt": "prompt", "responses": "answers.answer", "ranking": "answers.rank"},
    ),
    "oasst": KnownLayout(
        "OpenAssistant: messages of trees, replies with their ranks",
        {
            "user_id": None,
            "response": "text",
            "rank": "rank",
            "message_id": "message_id",
            "parent_id": "parent_id",
            "role": "role",
        },
    ),
}


def layout_of(
    name: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    winner: Mapping[str, Any] | None = None,
    attributes: Mapping[str, float] | None = None,
) -> Layout:
    """The layout that options describe.

    Args:
        name: One of ``LAYOUTS``, whose options hold where the others say nothing; None = columns have our names.
        columns: Our column name -> the file's; None leaves a column unread, as which ``user_id`` means that no users
            are told apart, and ``prompt`` that the prompt is what both conversations share.
        winner: ``column``: the one that names the preferred response, None = no column does. ``left``, ``right`` and
            ``tie``: what it says, a label or a list of them, where the response read as chosen was preferred, where the
            one read as rejected was, and where neither; beside the names of the two columns and ``winners.WORDS``.
        attributes: Columns whose weighted sum is the rating -> weight.

    Raises:
        ValueError: If an option is not among those that are known, or contradicts another.
    """
    if name is not None and name not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {name!r}{nearest(name, LAYOUTS)}")
    known = (*REQUIRED, *OPTIONAL, *GRADED, *NAMED)
    columns = columns or {}
    unknown = [column for column in columns if column not in known]
    if "winner" in unknown:
        raise ValueError(
            f"columns: the winner has options of its own; set {setting('winner', {'column': columns['winner']})}"
        )
    if unknown:
        raise ValueError(
            f"columns: expected keys among {', '.join(known)}, got {unknown!r}{nearest(unknown[0], known)}"
        )
    unread = [column for column in ("chosen", "rejected") if columns.get(column, column) is None]
    if unread:
        raise ValueError(f"columns: {unread!r} are required and cannot be null")
    base = LAYOUTS[name] if name else KnownLayout("", {column: column for column in (*REQUIRED, *GRADED)})
    chosen = {**{column: column for column in OPTIONAL}, **base.columns, **columns}
    named = {column: place for column, place in chosen.items() if place is not None}
    winner = {**(base.winner or {}), **(winner or {})}
    if winner:
        sides = sides_of(winner, named)
        named |= {"winner": winner["column"]} if winner["column"] is not None else {}
    weights = dict(base.attributes or {}) if attributes is None else dict(attributes)
    if attributes is None and not {"rating", "ratings", "rank", "ranking"}.isdisjoint(columns):
        weights = {}  # graded by what the columns say
    for column, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"attributes: expected a number as the weight of {column}, got {weight!r}")
    no_winner = bool(winner) and winner["column"] is None
    return Layout(named, sides if winner else {}, weights, no_winner)
