"""Passes over all pairs of a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeVar

from plm.types import PreferenceBatch

Passes = Callable[[], Iterable[PreferenceBatch]]
"""Every pair of this process once, at each call."""
Read = TypeVar("Read")
"""What is read of a batch."""


def kept(passes: Callable[[], Iterable[Read]]) -> Callable[[], Iterable[Read]]:
    """The same passes; where one batch holds all pairs, it is read once and kept."""
    first = list(islice(passes(), 2))
    return passes if len(first) > 1 else lambda: first
