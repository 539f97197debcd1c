"""Words of errors that more than one room needs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


def debug() -> bool:
    """Whether ``PLM_DEBUG`` asks for tracebacks."""
    return os.environ.get("PLM_DEBUG", "0") not in ("", "0")


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
