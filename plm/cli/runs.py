"""``plm runs``: what has been fitted, and how well it does."""

from __future__ import annotations

from plm.cli.options import OptionParser


def run(args: list[str]) -> None:
    """Print a table of the finished runs of a folder, the newest first.

    Raises:
        ValueError: If there is no such folder.
    """
    parser = OptionParser(
        prog="plm runs",
        description="List the finished runs of a folder, the newest first: what was fitted to which data, accuracy on "
        "users that were held out (else on seen ones), and what it gains over the population's state.",
    )
    parser.add_argument("folder", nargs="?", default="runs", help="folder of the runs (default: runs)")
    options = parser.parse(args)

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from plm.recipe.runs import read_runs

    runs = read_runs(options.folder)
    if not runs:
        print(f"no finished run in {options.folder}")
        return
    table = Table("run", "method", "data", "users", "accuracy %", "personal - global", box=None)
    table.columns[0].overflow = "fold"
    for found in runs:
        gain = f"{100 * found.gain:+.1f} [{100 * found.gain_low:.1f}, {100 * found.gain_high:.1f}]"
        names = (str(found.folder.relative_to(options.folder)), found.method, found.data, found.users)
        table.add_row(*map(Text, names), f"{100 * found.accuracy:.1f}", gain)
    Console().print(table)
