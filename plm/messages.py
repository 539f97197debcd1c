"""Wording that more than one room needs: near names, plain texts, checks of arguments that are reported together."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

NUM_SHOWN = 20
_IN_COMMAND: ContextVar[bool] = ContextVar("in_command", default=False)


class WrongUsage(ValueError):
    """A command line or a recipe that cannot be understood; commands end with status 2, not 1."""


def debug() -> bool:
    """Whether ``PLM_DEBUG`` asks for tracebacks."""
    return os.environ.get("PLM_DEBUG", "0") not in ("", "0")


@contextmanager
def in_command() -> Iterator[None]:
    """Word options as commands and recipes take them while the block runs; elsewhere they are Python's."""
    token = _IN_COMMAND.set(True)
    try:
        yield
    finally:
        _IN_COMMAND.reset(token)


def setting(name: str, value: str | Mapping[str, str | None]) -> str:
    """How an option of reading files is given: to a function, or in a recipe and, in brackets, to a command.

    Example:
        >>> setting("on_error", "skip")
        "on_error='skip'"
        >>> with in_command():
        ...     setting("columns", {"user_id": "by"})
        'columns: {user_id: by} (--columns "user_id=by")'
    """
    if not _IN_COMMAND.get():
        return f"{name}={value!r}"
    if isinstance(value, str):
        return f"{name}: {value} (--{name} {value})"
    parts = {key: "null" if part is None else part for key, part in value.items()}
    typed = " ".join(f'"{key}={part or ""}"' for key, part in value.items())
    return f"{name}: {{{', '.join(f'{key}: {part}' for key, part in parts.items())}}} (--{name} {typed})"


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name most like ``name``, if one is like it."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)), None)


def nearest(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the valid name most like ``name``, or an empty string."""
    close = closest(name, valid)
    return f"; did you mean {close!r}?" if close else ""


def missing_key(name: str, record: Iterable[str]) -> str:
    """What to say of a row without a key that it must have: the keys it has, and which of them may be meant."""
    close = closest(name, record)
    advice = f"; rename {close!r}?" if close else ""
    return f"missing {name!r}, got the keys {sorted(record)}{advice}"


def no_writer(name: str) -> str:
    """What to say of a method that scores texts and writes none."""
    return f"{name} has no policy that writes: give --policy MODEL --best_of N, and the texts are chosen by its reward"


def counted(number: float, noun: str) -> str:
    """A number with a noun: ``1 user``, ``1,200 users``."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def listed(head: str, lines: Sequence[str], indent: str = "  ") -> str:
    """A head with the first 20 lines of a report below it, and one that says how many more there are."""
    more = [f"... and {len(lines) - NUM_SHOWN} more"] if len(lines) > NUM_SHOWN else []
    return "\n".join([head, *(f"{indent}{line}" for line in [*lines[:NUM_SHOWN], *more])])


def plain(text: str) -> str:
    r"""Text in which what steers a terminal or hides itself is spelled out: ``\x1b`` for an escape."""
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)


def to_text(value: object) -> str:
    """Convert to a text that can be stored and sent.

    Raises:
        ValueError: For half of a surrogate pair, which has no UTF-8.
    """
    text = str(value)
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"expected text, got half of a character ({half}) at position {error.start}") from None
    return text


class Problems:
    """Collects what is wrong with the arguments of one object, so that all of it is raised in one message.

    Every check takes arguments by name; a value of None is an option that was left out, and fine.

    Example:
        >>> problems = Problems("model.")
        >>> problems.integers(1, num_bases=0, num_steps=5)
        >>> problems.numbers(lr=-1.0, ridge=None)
        >>> problems.found
        ['model.num_bases: expected an integer >= 1, got 0', 'model.lr: expected a finite number >= 0, got -1.0']

    Args:
        prefix: What stands before the name of an argument, such as ``model.``.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.found: list[str] = []

    def integers(self, least: int, /, **values: object) -> None:
        """Each must be an integer of at least ``least``."""
        self._each(
            values,
            f"an integer >= {least}",
            lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
        )

    def numbers(self, least: float = 0, /, **values: float | None) -> None:
        """Each must be a finite number of at least ``least``."""
        self._each(values, f"a finite number >= {least:g}", lambda value: least <= value < math.inf)

    def positive(self, **values: float | None) -> None:
        """Each must be a finite number above zero."""
        self._each(values, "a finite number > 0", lambda value: 0 < value < math.inf)

    def shares(self, **values: float | None) -> None:
        """Each must be a share from 0 up to, but not including, 1."""
        self._each(values, "a share in [0, 1)", lambda value: 0 <= value < 1)

    def inner_shares(self, **values: float | None) -> None:
        """Each must be a share above 0 and below 1."""
        self._each(values, "a share between 0 and 1", lambda value: 0 < value < 1)

    def at_least(self, least: float, /, **values: float | None) -> None:
        """Each must be ``least`` or more."""
        self._each(values, f"at least {least:g}", lambda value: bool(value >= least))

    def within(self, least: int, most: int, /, **values: int | None) -> None:
        """Each must be between ``least`` and ``most``, or one of the two."""
        self._each(values, f"{least} to {most}", lambda value: least <= value <= most)

    def _each(self, values: Mapping[str, object], expected: str, holds: Callable[[Any], bool]) -> None:
        """Note those of some arguments that are given and do not hold."""
        for name, value in values.items():
            if value is not None and not holds(value):
                self.add(name, expected, value)

    def choices(self, **values: tuple[object, Collection[str]]) -> None:
        """Each is a value and the names it must be among."""
        for name, (value, valid) in values.items():
            if value is not None and value not in valid:
                self.add(name, f"one of {', '.join(valid)}", value, nearest(str(value), valid))

    def add(self, name: str, expected: str, value: object, advice: str = "") -> None:
        """Note that the argument ``name`` is not what it should be."""
        self.found.append(f"{self.prefix}{name}: expected {expected}, got {value!r}{advice}")

    def say(self, text: str, *, when: bool = True) -> None:
        """Note a sentence of its own, where the condition holds."""
        if when:
            self.found.append(text)

    def check(self) -> None:
        """Raise what was found.

        Raises:
            ValueError: With one line for each problem.
        """
        if self.found:
            raise ValueError("\n".join(self.found))
