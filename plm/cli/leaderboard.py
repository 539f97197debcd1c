"""``plm leaderboard``: every method and its baselines on the same features, with several seeds or splits."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from plm.cli.options import OptionParser, assignment, integer


def run(args: list[str]) -> None:
    """Run or complete a leaderboard, and print it.

    Raises:
        ValueError: If a recipe or group cannot be read, or the rows do not share features and split.
    """
    options = _options(args)

    from rich.console import Console

    from plm.evaluation import print_parts
    from plm.leaderboard.board import Plan, run_board
    from plm.leaderboard.entries import of_methods, of_recipes, shared_part, swept
    from plm.leaderboard.report import terminal
    from plm.leaderboard.wandb import publish
    from plm.recipe.defaults import find_config

    console = Console()
    overrides = [part for key, value in options.set for part in (f"--{key}", value)]
    left_out: dict[str, str] = {}
    if options.recipes:
        folder = Path(options.output or f"runs/leaderboard/{Path(options.recipes[0]).stem}")
        entries = of_recipes(options.recipes, overrides)
        shared = [*shared_part(options.recipes[0], folder / "shared"), *overrides]
    else:
        folder = Path(options.output or f"runs/leaderboard/{Path(options.data).stem}")
        named = {kind: getattr(options, kind) for kind in ("trainer", "data", "backbone")}
        files = [find_config(name if Path(name).suffix else f"conf/{kind}/{name}.yaml") for kind, name in named.items()]
        shared = [*(part for file in files for part in ("--config", str(file))), *overrides]
        entries, left_out = of_methods(options.methods, shared)
    if options.sweep:
        entries = swept(entries, *options.sweep)
    plan = Plan(
        entries,
        shared,
        folder,
        shlex.join(["plm", "leaderboard", *args]),
        title=f"{Path(options.data).stem}, {Path(options.backbone).stem}" if options.data else "",
        seeds=options.seeds,
        splits=options.splits,
        budget=options.budget,
        jobs=options.jobs,
        left_out=left_out,
    )
    board, files = run_board(plan, console)
    print_parts(*terminal(board), console=console)
    console.print(
        f"\n{', '.join(file.name for file in files)} in {folder}", highlight=False, soft_wrap=True, markup=False
    )
    if options.project:
        console.print(publish(board, files, folder, options.project), highlight=False, soft_wrap=True)


def _options(args: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = OptionParser(
        prog="plm leaderboard",
        description="Which method wins, and is personalisation real? Recipes, or installed methods on one data set,\n"
        "against ridge-tuned and per-user Bradley-Terry, majority, length and surface baselines, the head of\n"
        "a reward model and, on planted data, the truth; each personal method also with shuffled users and\n"
        "with another user's state. Finished runs are kept and not redone.",
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="recipes, all on the same data and backbone")
    parser.add_argument("--data", metavar="FILE", help="instead of recipes: a data config, or the name of one: polis")
    parser.add_argument("--backbone", metavar="FILE", default="minilm", help="default: %(default)s")
    parser.add_argument("--trainer", metavar="FILE", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        default=["all"],
        help="short names, class paths, or lore_paper, pal_paper, vpl_paper: settings of the papers, not searched; "
        "default: all installed ones that read features, and these",
    )
    parser.add_argument("--seeds", type=integer(1), help="fits per row; intervals are over users (default: 3)")
    parser.add_argument(
        "--splits",
        type=integer(1),
        default=1,
        metavar="N",
        help="instead of --seeds: N splits of the pairs, by data.split_seed and the seeds after it, with one fit of\n"
        "each row on each; a user counts once, by the mean over the splits that test the user",
    )
    parser.add_argument(
        "--budget",
        type=integer(1),
        default=1,
        help="candidates per method: the defaults and draws from its search_space, by validation pairs (default: 1)",
    )
    parser.add_argument(
        "--sweep",
        metavar="NAME=A,B,...",
        type=assignment("NAME=A,B,..."),
        help="an argument of the methods: a row for each of these numbers, and a picture over them, e.g.\n"
        "num_bases=1,2,4,8 for LoRe",
    )
    parser.add_argument(
        "--jobs", type=integer(1), default=1, help="runs at a time, each a process (default: 1, in this one)"
    )
    parser.add_shared("--output", metavar="DIR", help="default: runs/leaderboard/<data or first recipe>")
    parser.add_argument(
        "--set",
        nargs="+",
        metavar="KEY=VALUE",
        type=assignment("KEY=VALUE"),
        default=[],
        help="option of plm fit for every row, e.g. data.unseen_users=0.2",
    )
    parser.add_shared("--project", help="log to this project of Weights & Biases, with a report")
    options = parser.parse(args)
    if bool(options.recipes) == bool(options.data):
        parser.error("expected either recipes or --data FILE")
    if options.splits > 1 and (options.seeds is not None or options.budget > 1):
        parser.error("--splits N takes the place of --seeds and --budget: what one split chooses by, another one tests")
    options.seeds = 3 if options.seeds is None else options.seeds
    return options
