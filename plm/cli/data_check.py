"""``plm data check``: a report on preference pairs before anything is trained on them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from plm.cli.options import OptionParser, integer, split_overrides
from plm.messages import nearest

_SPLIT = {"group_by": "group_by", "unseen_users": "unseen_users", "val_rows": "val_rows", "test_rows": "test_rows"}
_SPLIT |= {"split_seed": "seed"}
"""Argument of the datamodule -> argument of the check."""
_WEIGHTS = ("num_bases", "num_prototypes")
"""Arguments of methods that say how many weights a user has."""


def run(args: list[str]) -> int:
    """Check the data of a recipe or of files; returns the exit status.

    Raises:
        ValueError: If the data cannot be read; malformed rows are named by their lines.
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
    parser.add_shared("--pairs", help="instead of a recipe: files of preference pairs, JSONL(.gz), CSV or Parquet")
    parser.add_shared("--columns")
    parser.add_shared("--output", metavar="DIR", help="folder of the report; default: runs/data_check/<name>")
    parser.add_argument(
        "--num_weights", type=integer(1), metavar="K", help="weights per user; default: the recipe's num_bases"
    )
    parser.add_argument("--strict", action="store_true", help="exit with status 1 where there is a problem")
    check_args, overrides = split_overrides(args[1:])
    options = parser.parse(check_args)
    if (options.config is None) == (options.pairs is None):
        parser.error("give either --config or --pairs")
    if options.pairs and overrides:
        parser.error(f"{overrides[0].partition('=')[0]!r} overrides a recipe; it needs --config")
    if options.columns and not options.pairs:
        parser.error("--columns goes with --pairs")

    from rich.console import Console

    from plm.audit.check import check_pairs
    from plm.audit.report import show, write
    from plm.data.sources import PairSource
    from plm.data.sources.pairs import PairFiles
    from plm.recipe.read import build_source, merged_recipe

    split: dict[str, Any] = {}
    source: PairSource
    num_weights = options.num_weights
    if options.pairs:
        source = PairFiles(options.pairs, dict(options.columns))
    else:
        recipe = merged_recipe(options.config, overrides)
        source, split = build_source(recipe), recipe.get("data") or {}
        method_args = (recipe.get("model") or {}).get("init_args") or {}
        num_weights = num_weights or next((method_args[name] for name in _WEIGHTS if name in method_args), None)
    report = check_pairs(
        source.load(),
        source.name,
        num_weights=num_weights,
        checked_on=source.checked_on,
        **{argument: split[name] for name, argument in _SPLIT.items() if name in split},
    )
    console = Console()
    show(report, console)
    folder = Path(options.output or Path("runs", "data_check", re.sub(r"[^\w.-]+", "-", source.name)))
    for path in write(report, folder):
        console.print(f"written to {path}", soft_wrap=True, highlight=False, markup=False)
    return int(options.strict and report.worst == "problem")
