"""A command that workers of Ray carry out, a share each."""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from plm.cli.options import share_name

_OF_RAY = ("--engine", "--workers")


def run_by_ray(verb: str, args: list[str], options: argparse.Namespace) -> int:
    """Have workers run a command with the same options, print what they print, and join the files that they write.

    Returns:
        The greatest exit status of a share; if it is not 0, files of shares stay as they are.
    """
    from plm.atomic import whole_file
    from plm.data.ray_workers import run_shares

    status = count = 0
    for count, ended in enumerate(run_shares([verb, *_without_ray(args)], options.workers), start=1):  # noqa: B007
        print(ended.output, end="")
        print(ended.errors, end="", file=sys.stderr)
        status = max(status, abs(ended.status))  # that of a killed one is negative
    output: str | None = getattr(options, "output", None)
    if output is None or status:
        return status
    parts = [share_name(output, (index, count)) for index in range(1, count + 1)]
    if count > 1:
        with whole_file(output) as whole:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, whole)
        for part in parts:
            os.unlink(part)
        print(f"these are joined in {output}", file=sys.stderr)
    return status


def _without_ray(args: list[str]) -> list[str]:
    """A command line without the options that say who does the work."""
    kept, rest = [], iter(args)
    for arg in rest:
        name, equals, _ = arg.partition("=")
        if name not in _OF_RAY:
            kept.append(arg)
        elif not equals:
            next(rest)
    return kept
