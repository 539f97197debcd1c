"""Run a leaderboard: which rows it has, their cells, and what they say."""

from __future__ import annotations

import hashlib
import inspect
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from plm.atomic import replace as move
from plm.atomic import write_csv, write_json
from plm.data import surface
from plm.data.datamodule import PreferenceDataModule
from plm.evaluation import USER_COLUMNS, summarize, user_rows
from plm.leaderboard import baselines as opponents
from plm.leaderboard import entries as book
from plm.leaderboard.cells import Cell, clean, run_cells
from plm.leaderboard.entries import Entry
from plm.leaderboard.figures import all_figures
from plm.leaderboard.report import Leaderboard, write
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


def run_board(
    entries: Sequence[Entry],
    shared: Sequence[str],
    folder: Path,
    *,
    command: str,
    title: str | None,
    about: dict[str, object],
    seeds: int,
    budget: int,
    jobs: int,
    left_out: dict[str, str],
    console: Console,
) -> tuple[Leaderboard, list[Path]]:
    """Run all rows that are not finished yet, and write the leaderboard.

    Args:
        entries: Methods to compare; the baselines are added.
        shared: Options of ``plm fit`` that give every row the same data, backbone and trainer.
        folder: Where cells and results go.
        command: The command line, as it is told in the results.
        title: Of the leaderboard; None = the source and the backbone.
        about: Where the numbers come from.
        seeds: Fits per method.
        budget: Candidates per method.
        jobs: Runs at a time.
        left_out: Name -> why it is not compared; added to.
        console: Where progress is shown.

    Returns:
        The leaderboard and the files that were written.

    Raises:
        ValueError: If no row can be run, rows do not share features and split, or another process writes there.
    """
    field, data = book.read([*entries, *_opponents(entries, shared)])
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
        _warn_of_grids(field, budget, console)
        if budget > 1:
            field = book.search(field, budget, root, jobs, tell)
        cells = {entry.name: [entry.cell(root, seed) for seed in range(_seeds(entry, seeds))] for entry in field}
        run_cells([one for e in field if not e.error for one in cells[e.name]], jobs, tell)
        rows = [_row(entry, cells[entry.name]) for entry in field]
        personal = {row.name: row for row in rows if row.kind == "method" and row.is_personal}
        shuffled = [_shuffled(entry) for entry in field if entry.name in personal]
        cells = {entry.name: [entry.cell(root, seed) for seed in range(seeds)] for entry in shuffled}
        run_cells([one for again in cells.values() for one in again], jobs, tell)
        rows += [*(_row(entry, cells[entry.name]) for entry in shuffled), *map(other_user_row, personal.values())]
        rows += _baseline_rows(data, root, command)
        title = title or f"{data.source.name}, {type(data.backbone).__name__}"
        board = Leaderboard(title, rows, OPPONENT, data.summary(), about, left_out)
        files = write(board, all_figures(board), folder)
    return board, files


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
                move(part, folder)
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
            console.print(f"{entry.name} has {num} of {budget} candidates: its search_space is empty or small")


class _Progress:
    """Prints a line per finished run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.start = time.perf_counter()

    def __call__(self, one: Cell) -> None:
        seconds = time.perf_counter() - self.start
        end = "done" if one.is_done else f"failed: {one.error}"
        self.console.print(f"{seconds:6.0f} s  {one.row}, seed {one.seed}: {end}", highlight=False, soft_wrap=True)
