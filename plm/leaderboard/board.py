"""Run a leaderboard: which rows it has, their cells, and what comes out of them."""

from __future__ import annotations

import hashlib
import inspect
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from plm.arrays import Float64Array
from plm.atomic import only_writer, write_csv, write_json
from plm.atomic import replace as move
from plm.data import agreement, surface
from plm.data.datamodule import PreferenceDataModule
from plm.data.splits import Splits
from plm.evaluation import USER_COLUMNS, summarize, user_rows
from plm.leaderboard import baselines
from plm.leaderboard.cells import Cell, clean, run_cells
from plm.leaderboard.entries import Entry, candidates, read_entries, search
from plm.leaderboard.figures import all_figures
from plm.leaderboard.report import Leaderboard, write
from plm.leaderboard.results import BoardRow, Run, fill_row, other_user_row, read_run
from plm.recipe.runs import provenance

REFERENCE_ROW = "BradleyTerry"
"""The row all others are compared with: ridge-tuned, one reward for everybody."""

_REFERENCE_PATH = "plm.methods.bradley_terry.BradleyTerry"
_HEAD = "reference head"
_DESCRIPTIONS = {
    "majority": "how often an item won among training pairs of seen users",
    "length": "characters and words of the response, signs and scales learned",
    "surface": "ridge logistic probe on lengths, brackets, digits and the like, no words",
    "oracle": "the planted utilities themselves",
}
_ONE_STEP = ("--trainer.max_epochs", "1")


@dataclass(frozen=True)
class Plan:
    """What a leaderboard compares, how often, and where its results go."""

    entries: Sequence[Entry]
    """Methods to compare; the baselines are added."""
    shared: Sequence[str]
    """Options of ``plm fit`` that give every row the same data, backbone and trainer."""
    folder: Path
    """Where cells and results go."""
    command: str
    """The command line, as the results show it."""
    title: str
    """Empty = the source and the backbone."""
    seeds: int
    """Fits per method."""
    splits: int
    """Splits of the pairs, each with the fits of one seed; 1 = that of the recipe, with the fits of ``seeds``."""
    budget: int
    """Candidates per method."""
    jobs: int
    """Runs at a time."""
    left_out: Mapping[str, str]
    """Name -> why it is not compared."""

    def metadata(self) -> dict[str, object]:
        """Where the numbers come from."""
        return {
            "command": self.command,
            **provenance(),
            "python": sys.version.split()[0],
            "seeds": self.seeds if self.splits == 1 else self.splits,
            "splits": self.splits,
            "candidates per method": self.budget,
            "runs at a time": self.jobs,
        }


def run_board(plan: Plan, console: Console) -> tuple[Leaderboard, list[Path]]:
    """Run all rows that are not finished yet, and write the leaderboard.

    Args:
        plan: What to compare.
        console: Where progress is shown.

    Returns:
        The leaderboard and the files that were written.

    Raises:
        ValueError: If no row can be run, rows do not share features and split, or another process writes there.
    """
    entries, data = read_entries([*plan.entries, *_fitted_baselines(plan)])
    metadata, left_out = plan.metadata(), dict(plan.left_out)
    if data.reference_head is None:
        entries = [entry for entry in entries if entry.name != _HEAD]
        left_out[_HEAD] = f"{type(data.backbone).__name__} is no reward model, so it has none"
    splits = data.next_splits(plan.splits)
    textual = baselines.baselines(data)
    if "oracle" not in textual:
        left_out["oracle"] = f"{data.source.name} has no planted utilities"
    root = plan.folder / "cells"
    root.mkdir(parents=True, exist_ok=True)
    busy = f"another plm leaderboard is writing {plan.folder}; wait for it, or choose another --output"
    with only_writer(root / ".lock", busy):
        clean(root)
        on_progress = _Progress(console)
        _warn_of_grids(entries, plan.budget, console)
        if plan.budget > 1:
            entries = search(entries, plan.budget, root, plan.jobs, on_progress)

        def rows_of(entries: Sequence[Entry]) -> list[BoardRow]:
            """Run the cells of entries and read their rows."""
            cells = {entry.name: _cells(entry, plan, data.split_seed, splits, root) for entry in entries}
            run_cells([cell for e in entries if not e.error for cell in cells[e.name]], plan.jobs, on_progress)
            return [_row(entry, cells[entry.name]) for entry in entries]

        rows = rows_of(entries)
        personal = {row.name: row for row in rows if row.kind == "method" and row.is_personal}
        rows += rows_of([_shuffled(entry) for entry in entries if entry.name in personal])
        rows += map(other_user_row, personal.values())
        rows += [_baseline_row(name, textual[name], data, splits, root, plan.command) for name in textual]
        title = plan.title or f"{data.source.name}, {type(data.backbone).__name__}"
        board = Leaderboard(title, rows, REFERENCE_ROW, data.summary(), metadata, left_out)
        files = write(board, all_figures(board), plan.folder)
    return board, files


def _fitted_baselines(plan: Plan) -> list[Entry]:
    """The fitted rows that are always there."""
    entries = [
        Entry(
            "per-user BradleyTerry",
            "baseline",
            "every user alone, from their own pairs",
            (*plan.shared, *_ONE_STEP, "--model", "plm.leaderboard.per_user.PerUserBradleyTerry"),
        ),
        Entry(
            _HEAD,
            "baseline",
            "the reward model's own head",
            (*plan.shared, *_ONE_STEP, "--model", "plm.methods.lore.LoRe", "--model.num_bases", "0"),
        ),
    ]
    if all(entry.name != REFERENCE_ROW for entry in plan.entries):
        entries.insert(0, Entry(REFERENCE_ROW, "method", _REFERENCE_PATH, (*plan.shared, "--model", _REFERENCE_PATH)))
    return entries


def _cells(entry: Entry, plan: Plan, first_seed: int, splits: Sequence[Splits], root: Path) -> list[Cell]:
    """The fits of an entry: one on each of several splits, or some on one; baselines are solved, so once is enough."""
    if len(splits) == 1:
        return [entry.cell(root, seed) for seed in range(1 if entry.kind == "baseline" else plan.seeds)]
    return [
        replace(entry, split_hash=split.hash).cell(root, step, ["--data.split_seed", str(first_seed + step)])
        for step, split in enumerate(splits)
    ]


def _row(entry: Entry, cells: Sequence[Cell]) -> BoardRow:
    """Read the row of an entry from its cells."""
    row = BoardRow(
        entry.name,
        entry.kind,
        entry.description,
        errors={0: entry.error} if entry.error else {cell.seed: cell.error for cell in cells if cell.error},
        arguments=entry.arguments,
        num_candidates=entry.num_candidates,
        point=entry.point,
        command=shlex.join(["plm", "fit", *entry.args, "--seed_everything", "0"]),
    )
    if entry.error:
        return row
    runs = {}
    for cell in cells:
        try:
            if cell.is_done:
                runs[cell.seed] = read_run(cell.folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            cause = f"{type(error).__name__}: {error}"
            row.errors[cell.seed] = f"its result cannot be read ({cause}); remove {cell.folder.name} to run it again"
    return fill_row(row, runs)


def _shuffled(entry: Entry) -> Entry:
    """The same method on data whose users are permuted over the pairs of each part of the split."""
    description = f"{entry.name} after user ids were permuted: nothing personal is left"
    args = (*entry.args, "--data.shuffle_users", "true")
    name = f"{entry.name}, shuffled users"
    return replace(entry, name=name, kind="control", description=description, args=args, point=None)


def _baseline_row(
    name: str,
    margins: Callable[[Splits], Float64Array],
    data: PreferenceDataModule,
    splits: Sequence[Splits],
    root: Path,
    command: str,
) -> BoardRow:
    """Measure a row that needs no features, once on every split, like every other cell."""
    code = [inspect.getsource(module) for module in (baselines, agreement, surface)]
    runs: dict[int, Run] = {}
    errors: dict[int, str] = {}
    for step, split in enumerate(splits):
        text = "\n".join([split.hash, *code])
        folder = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        part = folder.with_name(f"{folder.name}.part")
        try:
            if not folder.is_dir():
                start = time.perf_counter()
                groups = baselines.evaluate_margins(margins(split), data.table, split)
                write_json(part / "facts.json", {"fit_seconds": time.perf_counter() - start})
                numbers = {group: summarize(table) for group, table in groups.items()}
                write_json(part / "metrics.json", {"split_hash": split.hash, **numbers})
                write_csv(part / "per_user.csv", USER_COLUMNS, user_rows(groups, data.all_user_ids))
                move(part, folder)
            runs[step] = read_run(folder)
        except Exception as error:
            shutil.rmtree(part, ignore_errors=True)
            errors[step] = f"{type(error).__name__}: {error}"
    return fill_row(BoardRow(name, "baseline", _DESCRIPTIONS[name], errors=errors, command=command), runs)


def _warn_of_grids(entries: Sequence[Entry], budget: int, console: Console) -> None:
    """Name the methods whose search is shorter than that of the others."""
    for entry in entries:
        num = len(candidates(entry, budget))
        if entry.kind == "method" and not entry.error and num < budget:
            why = "its settings are those of a paper" if entry.is_fixed else "its search_space is empty or small"
            console.print(f"{entry.name} has {num} of {budget} candidates: {why}", markup=False)


class _Progress:
    """Prints a line per finished run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.start = time.perf_counter()

    def __call__(self, cell: Cell) -> None:
        seconds = time.perf_counter() - self.start
        end = "done" if cell.is_done else f"failed: {cell.error}"
        self.console.print(
            f"{seconds:6.0f} s  {cell.row}, seed {cell.seed}: {end}", highlight=False, soft_wrap=True, markup=False
        )
