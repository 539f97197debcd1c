"""What is known of a recipe's options without its classes: arguments filled from the data, and a sound ``select:``.

Nothing here imports torch, so that a wrong command line is answered at once.
"""

from __future__ import annotations

from typing import Any

LINKS = {
    "num_users": "data.num_users",
    "feature_dim": "data.feature_dim",
    "backbone": "data.backbone_spec",
    "prompt_dim": "data.prompt_dim",
}
"""Argument of the method -> attribute of the data it is filled from, where the method has it."""


def check_grid(grid: dict[str, list[Any]]) -> None:
    """Check what can be checked before anything is loaded.

    Raises:
        ValueError: If a key is no argument of the method, is filled from the data, or has no values.
    """
    for key, values in grid.items():
        name = key.removeprefix("model.").removeprefix("init_args.")
        if not key.startswith("model.") or "." in name:
            raise ValueError(
                f"select: expected keys like model.init_args.NAME, got {key!r}; data are shared by candidates"
            )
        if name in LINKS:
            raise ValueError(f"select: {key} is filled from {LINKS[name]}, so it cannot be selected")
        if not values:
            raise ValueError(f"select: expected a list of values for {key}, got {values!r}")
