"""Which cases of a test are run by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Parameters of a test, of which all but ``kept`` wait for ``-m slow``."""
    cases = list(values)
    assert kept and all(value in cases for value in kept), f"expected some of {cases}, got {kept}"
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in cases]
