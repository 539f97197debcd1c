"""Converters of single values of a pairs file; each raises a ValueError that says what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from typing import Any, NamedTuple, TypeVar

_Value = TypeVar("_Value")

ROW_SPLITS = ("train", "val", "test")
USER_SPLITS = ("seen", "unseen")


def canonical_messages(messages: Sequence[dict[str, str]]) -> str:
    """Chat messages as one JSON text with role first: equal conversations give equal texts.

    Example:
        >>> canonical_messages([{"content": "Hi", "role": "user"}])
        '[{"role":"user","content":"Hi"}]'
    """
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def plain_prompt(prompt: str) -> str:
    """A prompt as plain text: the contents of its chat messages, one below the other."""
    messages = _messages(prompt)
    return prompt if messages is None else "\n".join(message["content"] for message in messages)


def short(value: Any) -> str:
    """The repr of a value, cut to 80 characters, for messages."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def parsed(name: str, value: Any, parse: Callable[[Any], _Value]) -> _Value:
    """Parse one field of a row.

    Raises:
        ValueError: With the field's name and value, if ``parse`` does.
    """
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}, got {short(value)}") from error


class Response(NamedTuple):
    """A response and the messages before it."""

    text: str
    history: str | None  # messages before the reply as canonical JSON, "" = none; None = the file gave plain text


def to_id(value: Any) -> str:
    """Convert a user or dialogue id to text."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("expected a string or an integer")
    if isinstance(value, str) and not value.strip():
        raise ValueError("expected an id")
    return str(value)


def _messages(value: Any) -> list[dict[str, str]] | None:
    """Chat messages of a list, or of a text that holds their JSON; None for any other text."""
    if isinstance(value, str):
        if not value.startswith("[{"):
            return None
        try:
            return _messages(json.loads(value))
        except ValueError:
            return None
    if not isinstance(value, list):
        raise ValueError("expected a text or chat messages")
    if value and all(isinstance(entry, str) for entry in value):
        raise ValueError(
            f"expected a text or chat messages, not a list of {len(value)} strings; write one row per response"
        )
    for entry in value:
        if not (isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("role", "content"))):
            raise ValueError("expected chat messages {role: text, content: text}")
    if not value:
        raise ValueError("expected a text or chat messages, not an empty list")
    return value


def to_prompt(value: Any) -> str:
    """Convert a prompt to text, chat messages to canonical JSON."""
    messages = _messages(value)
    return str(value) if messages is None else canonical_messages(messages)


def from_prompt(prompt: str) -> str | list[dict[str, str]]:
    """A prompt as files of JSON hold it: text, or the list of its chat messages, the inverse of `to_prompt`."""
    messages = _messages(prompt)
    return prompt if messages is None else messages


def to_response(value: Any) -> Response:
    """Convert a response to text, also where it comes as the last of its chat messages."""
    messages = _messages(value)
    text, history = str(value), None
    if messages is not None:
        if messages[-1]["role"] != "assistant":
            raise ValueError("expected chat messages that end with the assistant's reply")
        text, history = messages[-1]["content"], canonical_messages(messages[:-1]) if messages[1:] else ""
    if not text.strip():
        raise ValueError("empty text")
    return Response(text, history)


def is_number(value: Any) -> bool:
    """Whether a value is a number of JSON; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_number(value: Any) -> float:
    """Convert to a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("expected a number")
    try:
        return float(value)
    except ValueError:
        raise ValueError("expected a number") from None


def to_weight(value: Any) -> float:
    """Convert to a finite weight of at least 0."""
    number = to_number(value)
    if not 0 <= number <= 1e30:
        raise ValueError("expected a weight between 0 and 1e30")
    return number


def to_integer(value: Any) -> int:
    """Convert to an integer."""
    number = to_number(value)
    if not number.is_integer():
        raise ValueError("expected an integer")
    return int(number)


def to_bool(value: Any) -> bool:
    """Convert true or false, also as 1, 0 or text."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if str(value).lower() not in known:
        raise ValueError("expected true or false")
    return known[str(value).lower()]


def to_timestamp(value: Any) -> float:
    """Convert to seconds since 1970; a date without a zone is in UTC."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            raise ValueError("expected seconds or an ISO date") from None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return to_number(value)


def to_row_split(value: Any) -> int:
    """Convert to a row of ``ROW_SPLITS``."""
    if value not in ROW_SPLITS:
        raise ValueError("expected train, val or test")
    return ROW_SPLITS.index(value)
