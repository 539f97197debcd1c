"""``plm fit|validate|test|predict``: run a recipe."""

from __future__ import annotations

from plm.recipe.fit import run_recipe


def run(args: list[str]) -> None:
    """Run a recipe.

    Args:
        args: The verb first.

    Raises:
        ValueError: For whatever the user can mend, in one message.
    """
    run_recipe(args)
