"""``plm data check`` and ``convert``: what is wrong with preference pairs, and files of them in our columns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from plm.cli.options import (
    ROWS,
    OptionParser,
    add_reading,
    check_config_or_pairs,
    integer,
    reading_of,
    split_overrides,
)
from plm.messages import counted, nearest

_HELP = """usage: plm data check|convert ...

check: report what is wrong with preference pairs, before anything is trained on them
convert: write a file of preferences in another layout as pairs

plm data check --help, plm data convert --help: the options of each

examples:
  plm data check --pairs pairs.parquet
  plm data convert export.csv --to pairs.parquet"""
_NUM_SHOWN = 3
"""Pairs that are shown before they are written."""
_WEIGHTS = ("num_bases", "num_prototypes")
"""Arguments of methods that say how many weights a user has."""


def run(args: list[str]) -> int:
    """Run one of the two actions, the first of the arguments; returns the exit status.

    Raises:
        ValueError: If a file cannot be read; malformed rows are named by their lines.
    """
    actions = {"check": _check, "convert": _convert}
    if args[:1] in ([], ["-h"], ["--help"]):
        print(_HELP)
        return 0
    if args[0] not in actions:
        near = nearest(args[0], actions)
        raise ValueError(f"plm data {args[0]}: no such action{near} (plm data check --help, plm data convert --help)")
    return actions[args[0]](args[1:])


def _check(args: list[str]) -> int:
    """Check the data of a recipe or of files."""
    parser = OptionParser(
        prog="plm data check",
        description="Report on preference pairs: users, ties, conflicting labels, what the test shares with training, "
        "and whether the format of a response gives its label away. Writes report.md, report.html and report.json, "
        "and malformed rows, at which a fit would stop, to skipped.ndjson; these give status 1. "
        "Files in other layouts: plm data convert --help. "
        "Options of a recipe may follow, as for plm fit: --data.source.init_args.NAME VALUE.",
    )
    parser.add_shared("--config", help="recipe whose data are checked")
    parser.add_shared("--pairs", help="instead of a recipe: files of preference pairs, JSONL(.gz), CSV or Parquet")
    add_reading(parser)
    parser.add_shared("--output", metavar="DIR", help="folder of the report; default: runs/data_check/<name>")
    parser.add_argument(
        "--num_weights", type=integer(1), metavar="K", help="weights per user; default: the recipe's num_bases"
    )
    parser.add_argument("--strict", action="store_true", help="exit with status 1 where there is a problem")
    check_args, overrides = split_overrides(args)
    options = parser.parse(check_args)
    check_config_or_pairs(parser, options, overrides)

    from rich.console import Console

    from plm.audit.check import check_pairs
    from plm.audit.report import show, write
    from plm.data.skipped import NAME, write_skipped
    from plm.data.sources import PairSource
    from plm.data.sources.pairs import PairFiles
    from plm.recipe.read import build_source, merged_recipe, split_options

    split: dict[str, Any] = {}
    source: PairSource
    num_weights = options.num_weights
    if options.pairs:
        source = PairFiles(options.pairs, **reading_of(options))
    else:
        recipe = merged_recipe(options.config, overrides)
        source, split = build_source(recipe), split_options(recipe)
        model = recipe.get("model")
        method_args = (model.get("init_args") or {}) if isinstance(model, dict) else {}
        num_weights = num_weights or next((method_args[name] for name in _WEIGHTS if name in method_args), None)
    stops = isinstance(source, PairFiles) and source.on_error == "stop"
    if isinstance(source, PairFiles):
        source.on_error = "skip"  # what a fit would stop at is a finding here
    table = source.load()
    report = check_pairs(
        table,
        source.name,
        num_weights=num_weights,
        checked_on=source.checked_on,
        stops=stops,
        **split,
    )
    console = Console()
    show(report, console)
    folder = Path(options.output or Path("runs", "data_check", re.sub(r"[^\w.-]+", "-", source.name)))
    paths = [*write(report, folder), *([folder / NAME] if write_skipped(table, folder / NAME) else [])]
    for path in paths:
        console.print(f"written to {path}", soft_wrap=True, highlight=False, markup=False)
    return int(bool(table.skipped and stops) or (options.strict and report.worst == "problem"))


def _convert(args: list[str]) -> int:
    """Write a file of preferences in any layout as pairs."""
    parser = OptionParser(
        prog="plm data convert",
        description="Write a file of preferences, whatever its layout, as Parquet with the columns user_id, prompt,\n"
        "chosen and rejected. The layout is guessed, unless --layout says it: the guess and three pairs are shown,\n"
        "and only then is the file written. Where several layouts fit, nothing is written, and the options that\n"
        "choose one are named. The layouts are in docs/data.md.",
    )
    parser.add_argument("file", metavar="FILE", help=ROWS + ", a JSON array, a saved dataset, hf://datasets/OWNER/NAME")
    parser.add_argument("--to", required=True, metavar="FILE", help="file to write, ending in .parquet")
    add_reading(parser)
    parser.add_shared("--on_error")
    options = parser.parse(args)

    from plm.data.conversion import check_output, first_records, write_pairs
    from plm.data.guesses import guess_layout
    from plm.data.schema import read_pairs
    from plm.data.skipped import unused, write_skipped
    from plm.data.sources.corpus import local_files
    from plm.data.values import short

    files = local_files(options.file)
    check_output(options.to, files)
    path = Path(files[0])
    records = first_records(path)
    guess = guess_layout(path, records, **reading_of(options))
    print("\n".join(guess.description(path, records.names)))
    table = read_pairs(files, **guess.options, on_error=options.on_error)
    num_malformed = table.dropped.get("malformed", 0)
    if num_malformed >= table.num_pairs:
        few = f"{counted(table.num_pairs, 'pair')} and {counted(num_malformed, 'malformed row')}"
        raise ValueError(f"{files[0]}: expected more pairs than malformed rows, got {few}; correct them")
    texts = table.texts()
    for row in range(min(_NUM_SHOWN, table.num_pairs)):
        chosen, rejected = texts[table.chosen[row]], texts[table.rejected[row]]
        print(f"{table.position(row)}: user {table.user_ids[table.user[row]]!r}{', a tie' if table.tie[row] else ''}")
        for name, text in (("prompt", chosen[0]), ("chosen", chosen[1]), ("rejected", rejected[1])):
            print(f"  {name:<9} {short(text)}")
    write_pairs(table, options.to, files)
    skipped = unused(Path(options.to).with_suffix(".skipped.ndjson"))
    if write_skipped(table, skipped):
        print(f"malformed rows are in {skipped}")
    print(f"{counted(table.num_pairs, 'pair')} of {counted(table.num_users, 'user')} written to {options.to}")
    return 0
