"""Score rows of responses: the reward of each for its user, and how often it would win against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plm.backbones import TooLong
from plm.data.files import read_rows
from plm.data.values import parsed, short, to_id, to_prompt, to_response
from plm.functional import win_probability
from plm.messages import missing_key
from plm.method import PersonalizationMethod
from plm.types import UserState

ROWS_AT_ONCE = 2**14
"""Rows whose texts and users are in memory at once while they are scored."""


class ResponseRow(NamedTuple):
    """A response to score."""

    prompt: str
    text: str
    user_id: str | None
    record: dict[str, Any]
    """The row as it was read."""


class Scores(NamedTuple):
    """What a method says of B responses."""

    rewards: Tensor
    """``(B,)``, comparable within one user only."""
    is_known: Tensor
    """``(B,)`` bool: whether the user of the row is known; else the reward is the population's."""
    win_probability: Tensor | None
    """``(B,)`` over the reference responses, comparable between users; None without a reference."""


def read_responses(path: str, user_id: str | None = None, share: tuple[int, int] = (1, 1)) -> list[ResponseRow]:
    """Read rows with a ``response`` and, optionally, a ``prompt`` and a ``user_id``.

    Args:
        path: JSONL, CSV or Parquet.
        user_id: User of the rows that name none.
        share: ``(i, n)``, only the i-th of n equal parts of the rows.

    Raises:
        ValueError: If the file cannot be read or rows are malformed; these are named by their lines.
    """
    return read_rows(Path(path), lambda record: response_row(record, user_id), '{"response": ...}', share)


def response_row(record: dict[str, Any], default_user: str | None = None) -> ResponseRow:
    """Check a row with a ``response`` and, optionally, a ``prompt`` and a ``user_id``.

    An empty prompt or user, as CSV has them, counts as missing.

    Raises:
        ValueError: If something is malformed.
    """
    if "response" not in record:
        raise ValueError(missing_key("response", record))
    response = parsed("response", record["response"], to_response)
    prompt, user = (None if record.get(name) == "" else record.get(name) for name in ("prompt", "user_id"))
    user_id = default_user if user is None else parsed("user_id", user, to_id)
    text = (response.history or "") if prompt is None else parsed("prompt", prompt, to_prompt)
    return ResponseRow(text, response.text, user_id, record)


def score_responses(
    method: PersonalizationMethod, rows: list[ResponseRow], reference: list[ResponseRow] | None = None
) -> Scores:
    """Score every response for the user of its row.

    Args:
        method: A method that was loaded with its language model and users, as `plm.load_method` does.
        rows: The B responses.
        reference: Responses that each of them is compared with, by the rewards of its own user.

    Raises:
        ValueError: If a reward is not finite.
    """
    rewards, is_known = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
    for part in _parts(rows):
        some = [rows[row] for row in part.tolist()]
        users, user_rows, known = _users(method, some)
        texts, prompts = [row.text for row in some], [row.prompt for row in some]
        try:
            rewards[part] = method.score(texts, users, rows=user_rows, prompts=prompts).float().cpu()
        except ValueError as error:
            if not isinstance(error.__cause__, TooLong):
                raise
            number = next(number for number, row in enumerate(rows, 1) if row.prompt == error.__cause__.prompt)
            raise ValueError(f"row {number} of {len(rows)}: {error.__cause__}") from error
        is_known[part] = known
    refuse_nan(rewards, rows, type(method).__name__)
    wins = None if reference is None else _win_probabilities(method, rows, rewards, reference)
    return Scores(rewards, is_known, wins)


def _parts(rows: Sequence[ResponseRow]) -> tuple[Tensor, ...]:
    """The rows in bounded parts; where there are several, rows of one text are together, as it is read once in each."""
    order = torch.arange(len(rows))
    if len(rows) > ROWS_AT_ONCE:
        numbers: dict[tuple[str, str], int] = {}
        order = torch.tensor([numbers.setdefault((row.prompt, row.text), len(numbers)) for row in rows])
        order = torch.argsort(order, stable=True)
    return torch.split(order, ROWS_AT_ONCE) if len(rows) else ()


def _users(method: PersonalizationMethod, rows: Sequence[ResponseRow]) -> tuple[UserState, Tensor, Tensor]:
    """States of the users of rows, ``(B,)`` the row of each one's user among them, and ``(B,)`` whether it is known."""
    row_of = {user_id: number for number, user_id in enumerate(dict.fromkeys(row.user_id for row in rows))}
    users, is_known = method.known_users.lookup(list(row_of))
    user_rows = torch.tensor([row_of[row.user_id] for row in rows], dtype=torch.long)
    return users, user_rows, is_known.cpu()[user_rows]


def refuse_nan(rewards: Tensor, rows: list[ResponseRow], method_name: str) -> None:
    """Raise where rewards are not finite: they say nothing, and JSON has no word for them."""
    bad = (~rewards.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        row = rows[bad[0]]
        raise ValueError(
            f"expected finite rewards from {method_name}, got {float(rewards[bad[0]])} for {len(bad)} of {len(rows)} "
            f"rows, the first {short(row.text)} for user {row.user_id!r}; its training diverged (fit again with a "
            "lower model.lr), or the state of that user is damaged (plm adapt learns it anew)"
        )


def _win_probabilities(
    method: PersonalizationMethod, rows: list[ResponseRow], rewards: Tensor, reference: list[ResponseRow]
) -> Tensor:
    """`win_probability` of every reward ``(B,)`` against the reference responses, by the rewards of its own user."""
    prompts = [row.prompt for row in reference]
    features = method.text_encoder(prompts, [row.text for row in reference])
    prompt_features = method.text_encoder.prompts(prompts)
    wins = torch.zeros_like(rewards)
    for part in torch.split(torch.tensor(_by_user(rows)), ROWS_AT_ONCE):
        users, user_rows, _ = _users(method, [rows[row] for row in part.tolist()])
        for user in range(users.num_users):
            others = method.score(
                features, users, rows=torch.full((len(reference),), user), prompt_features=prompt_features
            )
            own = part[user_rows == user]
            wins[own] = win_probability(rewards[own], others.float().cpu())
    return wins


def _by_user(rows: Sequence[ResponseRow]) -> list[int]:
    """Numbers of the rows, those of one user together."""
    numbers = {user_id: number for number, user_id in enumerate(dict.fromkeys(row.user_id for row in rows))}
    return sorted(range(len(rows)), key=lambda row: numbers[rows[row].user_id])
