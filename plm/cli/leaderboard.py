"""``plm leaderboard``: every method and its opponents on the same features and split, with several seeds."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import inspect
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

import plm
from plm.cli import entries as book
from plm.cli import wandb_report
from plm.cli.cells import Cell, clean, run_cells
from plm.cli.entries import Entry
from plm.cli.options import OptionParser
from plm.data import surface
from plm.data.datamodule import PreferenceDataModule
from plm.evaluation import USER_COLUMNS, print_parts, summarize, user_rows, write_csv, write_json
from plm.leaderboard import baselines as opponents
from plm.leaderboard.figures import all_figures
from plm.leaderboard.report import Leaderboard, terminal, write
from plm.leaderboard.results import Row, make_row, other_user_row, read_run

OPPONENT = "BradleyTerry"
"""The row all others are compared with: ridge-tuned, one reward for everybody."""

_HEAD = "reference head"

_ABOUT = {
    "majority": "how often an item won among training pairs of seen users",
    "length": "characters and words of the response, signs and scales learned",
    "surface": "ridge logistic probe on lengths, brackets, digits and the like, no words",
    "oracle": "the planted utilities themselves",
}
_ONE_STEP = ("--trainer.max_epochs", "1")


def run(args: list[str]) -> None:
    """Run the command.

    Raises:
        ValueError: For whatever the user can mend.
    """
    options = _options(args)
    console = Console()
    more = [part for item in options.set for part in (f"--{item.partition('=')[0]}", item.partition("=")[2])]
    left_out: dict[str, str] = {}
    if options.recipes:
        folder = Path(options.output or f"runs/leaderboard/{Path(options.recipes[0]).stem}")
        given = book.of_recipes(options.recipes, more)
        shared = [*book.shared_part(options.recipes[0], folder / "shared"), *more]
    else:
        folder = Path(options.output or f"runs/leaderboard/{Path(options.data).stem}")
        files = [book.find_group(path) for path in (options.trainer, options.data, options.backbone)]
        shared = [*(part for file in files for part in ("--config", str(file))), *more]
        given, left_out = book.of_methods(options.methods, shared)
    field, data = book.read([*given, *_opponents(given, shared)])
    if data.reference_head is None:
        field = [entry for entry in field if entry.name != _HEAD]
        left_out[_HEAD] = f"{type(data.backbone).__name__} is no reward model, so it has none"
    if "oracle" not in opponents.baselines(data):
        left_out["oracle"] = f"{data.source.name} has no planted utilities"
    root = folder / "cells"
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root, folder):
        clean(root)
        tell = _Progress(console)
        _warn_of_grids(field, options.budget, console)
        if options.budget > 1:
            field = book.search(field, options.budget, root, options.jobs, tell)
        cells = {
            entry.name: [entry.cell(root, seed) for seed in range(_seeds(entry, options.seeds))] for entry in field
        }
        run_cells([one for e in field if not e.error for one in cells[e.name]], options.jobs, tell)
        rows = [_row(entry, cells[entry.name]) for entry in field]
        personal = {row.name: row for row in rows if row.kind == "method" and row.is_personal}
        shuffled = [_shuffled(entry) for entry in field if entry.name in personal]
        cells = {entry.name: [entry.cell(root, seed) for seed in range(options.seeds)] for entry in shuffled}
        run_cells([one for again in cells.values() for one in again], options.jobs, tell)
        rows += [*(_row(entry, cells[entry.name]) for entry in shuffled), *map(other_user_row, personal.values())]
        command = shlex.join(["plm", "leaderboard", *args])
        rows += _baseline_rows(data, root, command)
        board = Leaderboard(_title(options, data), rows, OPPONENT, data.summary(), _about(options, command), left_out)
        figures = all_figures(board)
        files = write(board, figures, folder)
        print_parts(*terminal(board), console=console)
        console.print(f"\n{', '.join(file.name for file in files)} in {folder}", highlight=False, soft_wrap=True)
    if options.wandb:
        console.print(wandb_report.publish(board, files, folder, options.wandb), highlight=False, soft_wrap=True)


@contextmanager
def _alone(root: Path, folder: Path) -> Iterator[None]:
    """Hold the folder of cells, so that no second leaderboard writes there; given back however this one ends."""
    lock = FileLock(root / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another plm leaderboard is writing {folder}; wait for it, or choose another --output"
        ) from None
    try:
        yield
    finally:
        lock.release()


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
    parser.add_argument("--data", metavar="FILE", help="instead of recipes: a data config, conf/data/polis.yaml")
    parser.add_argument("--backbone", metavar="FILE", default="conf/backbone/minilm.yaml", help="default: %(default)s")
    parser.add_argument("--trainer", metavar="FILE", default="conf/trainer/cpu.yaml", help="default: %(default)s")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        default=["all"],
        help="short names or class paths; default: all installed ones that read features",
    )
    parser.add_argument("--seeds", type=int, default=3, help="fits per row; intervals are over users (default: 3)")
    parser.add_argument(
        "--budget",
        type=int,
        default=1,
        help="candidates per method: its defaults and draws from conf/search, chosen on validation pairs (default: 1)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each a process (default: 1, in this one)")
    parser.add_argument("--output", metavar="DIR", help="default: runs/leaderboard/<data or first recipe>")
    parser.add_argument("--set", nargs="+", metavar="KEY=VALUE", default=[], help="option of plm fit for every row")
    parser.add_argument("--wandb", metavar="PROJECT", help="log to this project of Weights & Biases, with a report")
    options = parser.parse(args)
    if bool(options.recipes) == bool(options.data):
        parser.error("expected either recipes or --data FILE")
    for name in ("seeds", "budget", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    malformed = [item for item in options.set if "=" not in item]
    if malformed:
        parser.error(f"--set: expected KEY=VALUE, got {malformed[0]!r}")
    return options


# ---------------------------------------------------------------------- rows
def _opponents(given: Sequence[Entry], shared: Sequence[str]) -> list[Entry]:
    """The fitted rows that are always there."""
    made = [
        Entry(
            "per-user BradleyTerry",
            "baseline",
            "every user alone, from their own pairs",
            (*shared, *_ONE_STEP, "--model", "plm.leaderboard.per_user.PerUserBradleyTerry"),
        ),
        Entry(
            _HEAD,
            "baseline",
            "the reward model's own head",
            (*shared, *_ONE_STEP, "--model", "plm.methods.lore.LoRe", "--model.num_bases", "0"),
        ),
    ]
    if all(entry.name != OPPONENT for entry in given):
        path = "plm.methods.bradley_terry.BradleyTerry"
        made.insert(0, Entry(OPPONENT, "method", path, (*shared, "--model", path)))
    return made


def _seeds(entry: Entry, seeds: int) -> int:
    """Baselines are solved, not trained: one seed says it all."""
    return 1 if entry.kind == "baseline" else seeds


def _row(entry: Entry, cells: Sequence[Cell]) -> Row:
    """The row of an entry from its cells."""
    row = Row(
        entry.name,
        entry.kind,
        entry.about,
        errors=dict.fromkeys([0], entry.error) if entry.error else {one.seed: one.error for one in cells if one.error},
        arguments=entry.arguments,
        num_candidates=entry.num_candidates,
        command=shlex.join(["plm", "fit", *entry.args, "--seed_everything", "0"]),
    )
    if entry.error:
        return row
    runs = {}
    for one in cells:
        try:
            if one.is_done:
                runs[one.seed] = read_run(one.folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            row.errors[one.seed] = (
                f"its result cannot be read ({type(error).__name__}: {error}); remove {one.folder.name} to run it again"
            )
    return make_row(row, runs)


def _shuffled(entry: Entry) -> Entry:
    """The same method on data whose users are permuted over the pairs of each part of the split."""
    about = f"{entry.name} after user ids were permuted: nothing personal is left"
    args = (*entry.args, "--data.shuffle_users", "true")
    return replace(entry, name=f"{entry.name}, shuffled users", kind="control", about=about, args=args)


def _baseline_rows(data: PreferenceDataModule, root: Path, command: str) -> list[Row]:
    """Rows that need no features; done once, like every other cell."""
    rows = []
    for name, margins in opponents.baselines(data).items():
        row = Row(name, "baseline", _ABOUT[name], command=command)
        text = "\n".join([data.split_hash, *(inspect.getsource(module) for module in (opponents, surface))])
        folder = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        try:
            if not folder.is_dir():
                part = folder.with_name(f"{folder.name}.part")
                start = time.perf_counter()
                groups = opponents.judge(margins(), data.table, data.splits)
                write_json(part / "facts.json", {"fit_seconds": time.perf_counter() - start})
                numbers = {group: summarize(table) for group, table in groups.items()}
                write_json(part / "metrics.json", {"split_hash": data.split_hash, **numbers})
                write_csv(part / "per_user.csv", USER_COLUMNS, user_rows(groups, data.all_user_ids))
                os.replace(part, folder)
            rows.append(make_row(row, {0: read_run(folder)}))
        except Exception as error:
            shutil.rmtree(folder.with_name(f"{folder.name}.part"), ignore_errors=True)
            rows.append(replace(row, errors={0: f"{type(error).__name__}: {error}"}))
    return rows


def _warn_of_grids(field: Sequence[Entry], budget: int, console: Console) -> None:
    """Say whose search is shorter than the others'."""
    for entry in field:
        num = len(book.candidates(entry, budget))
        if entry.kind == "method" and not entry.error and num < budget:
            console.print(f"{entry.name} has {num} of {budget} candidates: its grid conf/search is missing or small")


# ---------------------------------------------------------------------- words
class _Progress:
    """Prints a line per finished run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.start = time.perf_counter()

    def __call__(self, one: Cell) -> None:
        seconds = time.perf_counter() - self.start
        end = "done" if one.is_done else f"failed: {one.error}"
        self.console.print(f"{seconds:6.0f} s  {one.row}, seed {one.seed}: {end}", highlight=False, soft_wrap=True)


def _title(options: argparse.Namespace, data: PreferenceDataModule) -> str:
    if options.data:
        return f"{Path(options.data).stem}, {Path(options.backbone).stem}"
    return f"{data.source.name}, {type(data.backbone).__name__}"


def _about(options: argparse.Namespace, command: str) -> dict[str, object]:
    """Where the numbers come from."""
    asked = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip() or "unknown",
        "plm": plm.__version__,
        "python": sys.version.split()[0],
        "seeds": options.seeds,
        "candidates per method": options.budget,
        "runs at a time": options.jobs,
    }
