"""``plm runs`` and ``dashboard``: what has been fitted, and how well it does."""

from __future__ import annotations

import json
from pathlib import Path

from plm.cli.options import OptionParser


def run(args: list[str]) -> None:
    """Print a table of the runs of a folder, the newest first, and what is missing in those that are damaged.

    Raises:
        ValueError: If there is no such folder.
    """
    parser = OptionParser(
        prog="plm runs",
        description="List the runs of a folder, the newest first: what was fitted to which data, accuracy on held-out\n"
        "users (else on seen ones), what it gains over the population's state, and what is missing in a run that was\n"
        "stopped or damaged. --output writes a page with a table that can be sorted and the figures of all\n"
        "runs (runs.html), the table as runs.csv and runs.tex (booktabs), and pictures that compare the runs of one\n"
        "split as PNG, PDF and SVG.",
    )
    parser.add_argument("folder", nargs="?", default="runs", help="folder of the runs (default: runs)")
    parser.add_shared("--output", metavar="DIR", help="folder for the page and its files")
    options = parser.parse(args)

    from rich.table import Table
    from rich.text import Text

    from plm.evaluation import print_parts
    from plm.leaderboard.runs import cells, write_runs
    from plm.recipe.runs import read_runs

    runs = read_runs(options.folder)
    if not runs:
        print(f"no run in {options.folder}")
        return
    heads = ("run", "date", "method", "data", "users", "accuracy %", "personal − global")
    table = Table(*heads, box=None)
    table.columns[0].overflow = "fold"
    for found in runs:
        shown = cells(found)
        shown["accuracy %"] = shown.get(f"{found.users} %", "–")
        table.add_row(*(Text(shown[head]) for head in heads))
    print_parts(table, *(f"{found.name}: {'; '.join(found.problems)}" for found in runs if found.problems))
    if options.output:
        files = write_runs(runs, Path(options.folder), Path(options.output))
        print(f"{', '.join(file.name for file in files)} in {options.output}")


def dashboard(args: list[str]) -> None:
    """Save the workspace, or print its definition.

    Raises:
        ValueError: If wandb-workspaces is not installed, or W&B cannot be reached.
    """
    parser = OptionParser(prog="plm dashboard", description="Make a saved workspace for a W&B project of plm runs.")
    parser.add_shared("--project", required=True, help="the project that the runs are in")
    parser.add_argument("--entity", help="user or team; default: that of the login")
    parser.add_argument("--name", default="plm", help="name of the workspace (default: plm)")
    parser.add_argument("--print", action="store_true", help="print the definition as JSON instead of saving it")
    options = parser.parse(args)

    from plm.leaderboard.dashboard import default_entity, definition, save, workspace

    entity = options.entity or ("entity" if options.print else default_entity())
    board = workspace(entity, options.project, options.name)
    if options.print:
        print(json.dumps(definition(board), indent=1, ensure_ascii=False))
    else:
        print(save(board))
