"""``plm methods``: the installed methods, read without importing any."""

from __future__ import annotations

from plm.cli.options import OptionParser


def run(args: list[str]) -> None:
    """Print every registered method."""
    OptionParser(prog="plm methods", description="List the installed methods.").parse(args)

    from plm.recipe.plugins import describe_methods

    print(describe_methods())
