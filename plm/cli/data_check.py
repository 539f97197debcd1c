"""``plm data check``: a report on preference pairs before anything is trained on them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console

from plm.audit.check import check_pairs
from plm.audit.report import show, write
from plm.cli.options import OptionParser
from plm.data.sources import PairSource
from plm.data.sources.pairs import PairFiles
from plm.messages import nearest
from plm.recipe.read import build_source, merged_recipe

_SPLIT = {"group_by": "group_by", "unseen_users": "unseen_users", "val_rows": "val_rows", "test_rows": "test_rows"}
_SPLIT |= {"split_seed": "seed"}
_WEIGHTS = ("num_bases", "num_prototypes")
"""Arguments of methods that say how many weights a user has."""


def run(args: list[str]) -> int:
    """Check the data of a recipe or of files; returns the exit status.

    Raises:
        ValueError: For whatever the user can mend, malformed rows with their lines among it.
    """
    if args[:1] in ([], ["-h"], ["--help"]):
        args = ["check", "--help"]
    if args[0] != "check":
        raise ValueError(f"plm data {args[0]}: no such action{nearest(args[0], ['check'])} (plm data check --help)")
    parser = OptionParser(
        prog="plm data check",
        description="Report on preference pairs: users, ties, conflicting labels, what the test shares with training, "
        "and whether the format of a response gives its label away. Writes report.md, report.html and report.json. "
        "Options of a recipe may follow, as for plm fit: --data.source.init_args.NAME VALUE.",
    )
    parser.add_argument("--config", metavar="FILE", help="recipe whose data are checked")
    parser.add_argument("--pairs", nargs="+", metavar="FILE", help="pairs to check instead: JSONL(.gz), CSV or Parquet")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="column that holds NAME")
    parser.add_argument("--output", metavar="DIR", help="folder of the report; default: runs/data_check/<name>")
    parser.add_argument(
        "--num_weights", type=int, metavar="K", help="weights per user; default: the recipe's num_bases"
    )
    parser.add_argument("--strict", action="store_true", help="exit with status 1 where there is a problem")
    own, overrides = _divide(args[1:])
    options = parser.parse(own)
    if (options.config is None) == (options.pairs is None):
        parser.error("give either --config or --pairs")
    if options.pairs and overrides:
        parser.error(f"{overrides[0].partition('=')[0]!r} overrides a recipe; it needs --config")
    if any("=" not in item for item in options.columns):
        parser.error(f"--columns: expected NAME=COLUMN, got {options.columns!r}")
    if options.columns and not options.pairs:
        parser.error("--columns goes with --pairs")
    split: dict[str, Any] = {}
    source: PairSource
    num_weights = options.num_weights
    if options.pairs:
        source = PairFiles(options.pairs, dict(item.split("=", 1) for item in options.columns))
    else:
        recipe = merged_recipe(options.config, overrides)
        source, split = build_source(recipe), recipe.get("data") or {}
        given = (recipe.get("model") or {}).get("init_args") or {}
        num_weights = num_weights or next((given[name] for name in _WEIGHTS if name in given), None)
    report = check_pairs(
        source.load(),
        source.name,
        num_weights=num_weights,
        checked_on=source.checked_on,
        **{ours: split[name] for name, ours in _SPLIT.items() if name in split},
    )
    console = Console()
    show(report, console)
    folder = Path(options.output or Path("runs", "data_check", re.sub(r"[^\w.-]+", "-", source.name)))
    for path in write(report, folder):
        console.print(f"written to {path}", soft_wrap=True, highlight=False)
    return int(options.strict and report.worst == "problem")


def _divide(args: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, and those of a recipe as ``key=value``."""
    own: list[str] = []
    overrides: list[str] = []
    rest = iter(args)
    for arg in rest:
        if not re.match(r"--(data|model|trainer)\.", arg):
            own.append(arg)
            continue
        key, equals, value = arg.removeprefix("--").partition("=")
        overrides.append(f"{key}={value if equals else next(rest, '')}")
    return own, overrides
