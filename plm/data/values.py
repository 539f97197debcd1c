"""Converters of single values of a pairs file; each raises a ValueError that says what was expected."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from typing import Any, NamedTuple, TypeVar

from plm.messages import to_text

_Value = TypeVar("_Value")

_MESSAGE = ("role", "content")
ROW_SPLITS = ("train", "val", "test")
USER_SPLITS = ("seen", "unseen")
MOST_SCORE = 1e38
EVERYONE = "everyone"
"""The user of pairs that tell no users apart."""


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
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"{type(value).__name__} too long to print"
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


_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that reverse the direction of what is printed after them."""


def to_id(value: Any) -> str:
    """Convert a user or dialogue id to text; a whole number has no decimals."""
    if isinstance(value, float) and value.is_integer():  # what becomes of integers beside a missing one
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("expected a string or an integer")
    text = to_text(value) if isinstance(value, str) else digits(value)
    if not text.strip():
        raise ValueError("expected an id")
    if not text.isprintable() and any(unicodedata.category(mark) == "Cc" or mark in _TURNING for mark in text):
        raise ValueError("expected an id without control characters")
    return text


def spelling(name: str) -> str:
    """What two spellings of one id share: ``7``, ``7.0`` and `` 7 `` are one.

    Example:
        >>> [spelling(name) for name in ("7", " 7.0", "007", "Anna ")]
        ['7', '7', '007', 'Anna']
    """
    bare = name.strip()
    whole, point, decimals = bare.partition(".")
    return whole if point and decimals and whole.isdecimal() and not decimals.strip("0") else bare


def spelt_alike(names: Sequence[str]) -> list[list[str]]:
    """Groups of ids that only decimals of zero or blanks at their ends keep apart, such as ``7`` and ``7.0``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(spelling(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def digits(value: int) -> str:
    """An integer as text.

    Raises:
        ValueError: If it has more digits than Python prints.
    """
    try:
        return str(value)
    except ValueError:
        raise ValueError(f"expected an integer of at most {sys.get_int_max_str_digits()} digits") from None


def _messages(value: Any) -> list[dict[str, str]] | None:
    """Chat messages of a list, or of a text that holds their JSON; None for any other text."""
    if isinstance(value, str):
        if not value.startswith("[{"):
            return None
        try:
            inside = json.loads(value)
        except (ValueError, RecursionError):
            if value.startswith(("[{'role':", "[{'content':", "[{'from':")):
                raise ValueError("expected chat messages as JSON, got the printed form of Python's") from None
            return None
        return _messages(inside) if any(isinstance(entry, dict) and "role" in entry for entry in inside) else None
    if not isinstance(value, list):
        raise ValueError("expected a text or chat messages")
    if value and all(isinstance(entry, str) for entry in value):
        raise ValueError(
            f"expected a text or chat messages, not a list of {len(value)} strings; write one row per response"
        )
    for entry in value:
        others = [key for key, part in entry.items() if part and key not in _MESSAGE] if isinstance(entry, dict) else []
        if others:
            raise ValueError(
                f"expected chat messages of role and content alone, got {', '.join(map(repr, others))} too, which "
                "would be lost; write what matters into the content and remove the rest"
            )
        if not (isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in _MESSAGE)):
            raise ValueError("expected chat messages {role: text, content: text}")
    if not value:
        raise ValueError("expected a text or chat messages, not an empty list")
    return value


def to_prompt(value: Any) -> str:
    """Convert a prompt to text, chat messages to canonical JSON."""
    messages = _messages(value)
    return to_text(value if messages is None else canonical_messages(messages))


def from_prompt(prompt: str) -> str | list[dict[str, str]]:
    """A prompt as files of JSON hold it: text, or the list of its chat messages, the inverse of `to_prompt`."""
    messages = _messages(prompt)
    return prompt if messages is None else messages


def to_response(value: Any) -> Response:
    """Convert a response to text, also where it comes as the last of its chat messages."""
    messages = _messages(value)
    text, history = to_text(value) if messages is None else "", None
    if messages is not None:
        if messages[-1]["role"] != "assistant":
            raise ValueError("expected chat messages that end with the assistant's reply")
        text = to_text(messages[-1]["content"])
        history = canonical_messages(messages[:-1]) if messages[1:] else ""
    if not text.strip():
        raise ValueError("empty text")
    return Response(text, history)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of JSON that a float can hold; true and false are none."""
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def to_number(value: Any) -> float:
    """Convert to a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("expected a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("expected a number") from None
    except OverflowError:
        raise ValueError("expected a number below 1e308") from None
    return number


def to_weight(value: Any) -> float:
    """Convert to a finite weight of at least 0."""
    number = to_number(value)
    if not 0 <= number <= 1e30:
        raise ValueError("expected a weight between 0 and 1e30")
    return number


def to_score(value: Any) -> float:
    """Convert to a reward that float32 holds; nan stands for none."""
    number = to_number(value)
    if abs(number) > MOST_SCORE:
        raise ValueError(f"expected a number between -{MOST_SCORE:g} and {MOST_SCORE:g}")
    return number


def to_integer(value: Any) -> int:
    """Convert to an integer."""
    number = to_number(value)
    if not number.is_integer():
        raise ValueError("expected an integer")
    if abs(number) >= 2.0**63:
        raise ValueError("expected an integer below 2 to the power of 63")
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
