"""The key ``paper`` of a recipe: which numbers of which paper the recipe is to reach.

Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plm.messages import nearest
from plm.recipe.defaults import read_config, shipped

USERS = ("seen", "unseen")
SHARES = ("accuracy", "global_accuracy")
DIFFERENCES = ("personal_minus_global", "personal_minus_other", "personal_minus_bradley_terry")
"""Numbers of a test that are paired differences, in points."""
_TEXTS = ("source", "table", "differs", "artefact")


@dataclass(frozen=True)
class Paper:
    """What a paper says."""

    source: str
    """The paper, or who has measured its method."""
    table: str
    """Table or figure, and row."""
    numbers: Mapping[str, Mapping[str, float]]
    """``seen`` and ``unseen``, where known -> number of `plm.evaluation.summarize` -> its value, a share of 1."""
    differs: str = ""
    """What the paper does otherwise."""
    artefact: str = ""
    """Why the paper's numbers are too high, where that is known."""


def check_paper(spec: Any) -> Paper:
    """Read the key: ``source`` and ``table``, and where there are any ``numbers``, in per cent.

    Args:
        spec: Its value.

    Raises:
        ValueError: Naming the key that is missing, unknown or wrong.

    Example:
        >>> check_paper({"source": "a paper", "table": "Table 3", "numbers": {"seen": {"accuracy": 71.0}}}).numbers
        {'seen': {'accuracy': 0.71}}
    """
    keys = (*_TEXTS, "numbers")
    if not isinstance(spec, Mapping):
        raise ValueError(f"paper: expected a mapping of {', '.join(keys)}, got {spec!r}")
    for key, value in spec.items():
        if key not in keys:
            raise ValueError(f"paper: no key {key!r}{nearest(str(key), keys)} (keys: {', '.join(keys)})")
        if key != "numbers" and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"paper.{key}: expected a text, got {value!r}")
    for key in ("source", "table"):
        if key not in spec:
            example = {"source": "arXiv 2504.14439", "table": "Table 3, LoRe"}[key]
            raise ValueError(f"paper: missing {key!r}, such as {example!r}")
    texts = {key: spec[key].strip() for key in _TEXTS if key in spec}
    return Paper(**texts, numbers=_numbers(spec.get("numbers", {})))


def _numbers(spec: Any) -> dict[str, dict[str, float]]:
    """The numbers as shares of 1."""
    found: dict[str, dict[str, float]] = {}
    for users, named in _pairs(spec, "numbers", USERS):
        found[users] = {}
        for name, value in _pairs(named, f"numbers.{users}", (*SHARES, *DIFFERENCES)):
            low, high = (1, 100) if name in SHARES else (-100, 100)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or not low <= value <= high:
                expected = "per cent, such as 71.0" if name in SHARES else "points, such as 2.2"
                raise ValueError(f"paper.numbers.{users}.{name}: expected {expected}, got {value!r}")
            found[users][name] = value / 100
    return found


def _pairs(spec: Any, key: str, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Items of a mapping whose keys are among some names."""
    if not isinstance(spec, Mapping):
        raise ValueError(f"paper.{key}: expected a mapping of {', '.join(names)}, got {spec!r}")
    for name in spec:
        if name not in names:
            raise ValueError(f"paper.{key}: no {name!r}{nearest(str(name), names)} (there are {', '.join(names)})")
    return list(spec.items())


def read_paper(recipe: Path) -> Paper:
    """Read the key of a recipe.

    Raises:
        ValueError: With the recipe, if it has none, or as `check_paper`.
    """
    spec = read_config(recipe).get("paper")
    if spec is None:
        known = ", ".join(
            f"recipes/papers/{file.name}" for file in sorted((shipped("recipes") / "papers").glob("*.yaml"))
        )
        raise ValueError(
            f"{recipe}: expected a key paper, which names a table and its numbers, got none; these have: {known}"
        )
    try:
        return check_paper(spec)
    except ValueError as error:
        raise ValueError(f"{recipe}: {error}") from error
