"""``plm data check``, ``audit`` and ``compare``: what pairs and results can be trusted for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from plm.cli.options import READING, ROWS, OptionParser, add_reading, integer, reading_of, split_overrides
from plm.messages import nearest

_SPLIT = {"group_by": "group_by", "unseen_users": "unseen_users", "val_rows": "val_rows", "test_rows": "test_rows"}
_SPLIT |= {"split_seed": "seed"}
"""Argument of the datamodule -> argument of the check."""
_WEIGHTS = ("num_bases", "num_prototypes")
"""Arguments of methods that say how many weights a user has."""


def run(args: list[str]) -> int:
    """Run one of the verbs, the first of the arguments; returns the exit status.

    Raises:
        ValueError: If a file cannot be read; malformed rows are named by their lines.
    """
    return {"data": _data, "audit": _audit, "compare": _compare}[args[0]](args[1:])


def _data(args: list[str]) -> int:
    """Check the data of a recipe or of files."""
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
    add_reading(parser)
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
    named = [name for name in READING if getattr(options, name.removeprefix("--"))]
    if named and not options.pairs:
        parser.error(f"{named[0]} goes with --pairs")

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
        source = PairFiles(options.pairs, **reading_of(options))
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


def _audit(args: list[str]) -> int:
    """Write a verdict on pairs and on what somebody says of a model on them."""
    parser = OptionParser(
        prog="plm audit",
        description="Can results on these pairs be trusted? One page of verdict on files of pairs with user ids and,\n"
        "where given, on what somebody says of a model on them: labels in the format, dialogues on both sides of the\n"
        "split, a shuffled user column, ties dropped from the denominator, model selection on the test; with\n"
        "controls, noise ceiling, minimum detectable effects and hashes of all files. Writes audit.html and\n"
        "audit.json. The split is the column row_split (train, val, test), or --test_pairs.",
    )
    parser.add_argument("pairs", nargs="+", metavar="PAIRS", help=f"preference pairs: {ROWS}")
    add_reading(parser)
    parser.add_argument("--test_pairs", nargs="+", default=[], metavar="FILE", help="pairs of the test, PAIRS train")
    parser.add_argument(
        "--results",
        metavar="FILE",
        help="per-item file of a model, as of plm compare; items are the column item of PAIRS, or plm predict's",
    )
    parser.add_argument("--reported", metavar="X", help="accuracy that is claimed of it, as printed: 0.742 or 74.2%%")
    parser.add_argument(
        "--candidates",
        metavar="FILE",
        help="the epochs or settings it was chosen from, a row each: candidate, validation, test (higher is better),\n"
        "selected (true for one)",
    )
    parser.add_shared("--output", metavar="DIR", required=True, help="folder of the report")
    options = parser.parse(args)
    if options.reported and not options.results:
        parser.error("--reported goes with --results")

    from plm.audit.report import control_tables, fault_table, noise_lines, write_audit
    from plm.audit.verdict import audit_files
    from plm.evaluation import print_parts, section_table

    audit = audit_files(
        options.pairs,
        reading=reading_of(options),
        test_pairs=options.test_pairs,
        scores=options.results,
        reported=options.reported,
        candidates=options.candidates,
    )
    tables = [section_table(section) for section in (fault_table(audit), *control_tables(audit))]
    print_parts(*tables, *noise_lines(audit), audit.verdict)
    for path in write_audit(audit, Path(options.output)):
        print(f"written to {path}")
    return 0


def _compare(args: list[str]) -> int:
    """Compare what several models got right."""
    parser = OptionParser(
        prog="plm compare",
        description="Which model is better on the same judgements? Two or more per-item files, or folders of runs\n"
        "with the predictions.csv of plm predict. Columns: item, user (or user_id), and correct (0 to 1) or margin\n"
        "(above 0 = right, 0 = one half); rows whose column tie is true are left out. Every two are paired by item;\n"
        "the difference of each user counts once, intervals and p-values are over users, those of several files\n"
        "corrected by Holm. The last column is the smallest difference that would be found four times in five.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help=f"{ROWS}, or the folder of a run; two or more")
    parser.add_shared("--columns", help="column of the files that holds NAME, e.g. user=annotator")
    parser.add_shared("--output", help="also write the numbers as JSON")
    options = parser.parse(args)
    if len(options.files) < 2:
        parser.error("expected two files or more, got one")
    if len(set(options.files)) < len(options.files):
        parser.error("expected every file once")

    from plm.atomic import write_json
    from plm.audit.comparison import compare_items, sections
    from plm.audit.items import read_items
    from plm.evaluation import print_parts, section_table

    result = compare_items([read_items(file, dict(options.columns)) for file in options.files])
    print_parts(*map(section_table, sections(result)))
    if options.output:
        write_json(options.output, result)
        print(f"written to {options.output}")
    return 0
