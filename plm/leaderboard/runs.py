"""``plm runs --output``: a page over all runs of a folder, its table as CSV and LaTeX, pictures that compare them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from plm.evaluation import (
    Link,
    Section,
    TableRow,
    difference,
    interval,
    points,
    write_figures,
    write_report,
)
from plm.leaderboard.figures import few_shot, forest
from plm.leaderboard.results import GROUPS, BoardRow
from plm.messages import plain
from plm.recipe.runs import RunSummary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GAINS = ("personal_minus_global", "personal_minus_other")
_ENDS = ("", "_low", "_high")
_HEADS = (
    "run|method|data|unseen %|seen %|users|personal − global|personal − other|verdict|test pairs|fit s|date|commit|"
    "recipe|split|missing or damaged"
).split("|")
_COLUMNS = ["run", "method", "data", "date", "commit", "plm", "split", "fit_seconds"]
_COLUMNS += [f"{users}_{name}{end}" for users in GROUPS for name in ("accuracy", *_GAINS) for end in _ENDS]
_COLUMNS += [f"{users}_{name}" for users in GROUPS for name in ("num_users", "num_pairs")] + ["problems"]
_MOST_DRAWN = 40
"""Runs of one split in one picture, the newest."""
_NOTES = (
    "Accuracy is the mean over users of each user's share of right pairs, in per cent, with its 95 % interval over "
    "users. Runs are comparable where their split is the same: plm compare RUN RUN does it, paired by user.",
    "personal − global is what a user's own state gains over the population's, personal − other over the state of "
    "another user, in points, of the users that the column users names. A method must win both.",
)


def write_runs(runs: Sequence[RunSummary], root: Path, folder: Path) -> list[Path]:
    """Write ``runs.html``, ``runs.csv``, ``runs.tex`` and the pictures of every split with several runs.

    Args:
        runs: As `plm.recipe.runs.read_runs` finds them.
        root: The folder that they are in.
        folder: Where to write; links of the page lead from there.
    """
    pictures, drawn = write_figures(folder, _figures(runs))
    num_damaged = sum(bool(run.problems) for run in runs)
    title = f"{len(runs):,} runs" + (f", {num_damaged:,} of them with something missing" if num_damaged else "")
    sections = [
        Section(title, _HEADS, [_row(run, folder) for run in runs], is_sortable=True),
        *(Section(name, pictures={name: content}) for name, content in pictures.items()),
        Section("Figures and verdicts of each run") if runs else Section("There is no run."),
        *(_details(run, folder) for run in runs),
        Section("How to read this", lines=_NOTES),
    ]
    head = f"Runs in {plain(str(root))}"
    return write_report(folder, "runs", head, sections, _COLUMNS, map(_record, runs)) + drawn


def cells(run: RunSummary) -> dict[str, str]:
    """What a table shows of a run, by the head of its column; a dash where a run says nothing."""
    numbers = _present(run, run.users)
    own = next((text for text in run.verdicts if run.users and text.startswith(f"{run.users}: ")), "")
    seconds = run.facts.get("fit_seconds", math.nan)
    pairs = sum(_present(run, users)["num_pairs"] for users in run.numbers)
    shown = {
        "run": run.name,
        "method": run.method,
        "data": run.data,
        "date": str(run.facts.get("date", ""))[:16],
        "commit": str(run.facts.get("commit", "")),
        "users": run.users,
        **{f"{users} %": _accuracy(_present(run, users)) for users in GROUPS},
        **{name.replace("_minus_", " − "): _gain(numbers, name) for name in _GAINS},
        "verdict": own.split(": ")[1] if own else "",
        "test pairs": "" if math.isnan(pairs) or not run.numbers else f"{pairs:,.0f}",
        "fit s": f"{seconds:.1f}" if isinstance(seconds, float) and not math.isnan(seconds) else "",
        "split": run.split[:8],
        "missing or damaged": "; ".join(run.problems),
    }
    return {head: text or "–" for head, text in shown.items()}


def _row(run: RunSummary, folder: Path) -> TableRow:
    """The row of a run, whose name leads to its folder."""
    shown: dict[str, str] = cells(run)
    shown["run"] = Link(shown["run"], _href(run.folder, folder))
    files = [name for name in ("recipe.yaml", "test.yaml") if (run.folder / name).is_file()]
    shown["recipe"] = Link(files[0], _href(run.folder / files[0], folder)) if files else "–"
    return TableRow([shown[head] for head in _HEADS], "problem" if run.problems else "")


def _details(run: RunSummary, folder: Path) -> Section:
    """Verdicts, what is missing, the folder and the figures of a run."""
    lines = [*run.verdicts, *(f"missing or damaged: {text}" for text in run.problems)]
    lines.append(Link(f"folder {run.name}", _href(run.folder, folder)))
    files = sorted(file for file in run.folder.glob("*.png") if file.is_file() and os.access(file, os.R_OK))
    pictures = {f"{run.name}: {plain(file.stem)}": file.read_bytes() for file in files}
    return Section(run.name, lines=lines, pictures=pictures, is_folded=True)


def _href(path: Path, start: Path) -> str:
    """A relative URL; the dot keeps a name with a colon from being a scheme."""
    return f"./{quote(os.fsencode(os.path.relpath(path, start)))}"


def _present(run: RunSummary, users: str) -> dict[str, float]:
    """Numbers of a group, nan where there are none."""
    names = ["num_users", "num_pairs", *(f"{name}{end}" for name in ("accuracy", *_GAINS) for end in _ENDS)]
    return {**dict.fromkeys(names, math.nan), **run.numbers.get(users, {})}


def _accuracy(numbers: dict[str, float]) -> str:
    value = numbers["accuracy"]
    return "" if math.isnan(value) else points(value, "") + interval(numbers, "accuracy")


def _gain(numbers: dict[str, float], name: str) -> str:
    return "" if math.isnan(numbers[name]) else difference(numbers, name)


def _record(run: RunSummary) -> list[Any]:
    """The row of a run in the CSV file, as `_COLUMNS` names it."""
    facts = {name: run.facts.get(name) for name in ("date", "commit", "plm", "fit_seconds")}
    known = {**facts, "run": run.name, "method": run.method, "data": run.data, "split": run.split}
    known["problems"] = "; ".join(run.problems)
    known |= {f"{users}_{name}": value for users, found in run.numbers.items() for name, value in found.items()}
    found = [known.get(name) for name in _COLUMNS]
    return [None if isinstance(value, float) and math.isnan(value) else value for value in found]


def _figures(runs: Sequence[RunSummary]) -> dict[str, Figure]:
    """Accuracies and few-shot curves of runs of one split, for every split that has several."""
    by_split: dict[str, list[BoardRow]] = {}
    for run in runs:
        if run.numbers and run.split:
            numbers = {users: {**_present(run, users)} for users in run.numbers}
            row = BoardRow(run.name, "method", run.method, numbers=numbers, few_shot=dict(run.few_shot or {}) or None)
            row.facts["parameters_per_user"] = not math.isnan(_present(run, run.users)["personal_minus_global"])
            by_split.setdefault(run.split, []).append(row)
    figures: dict[str, Figure] = {}
    for split, rows in by_split.items():
        if len(rows) > 1:
            data = next((run.data for run in runs if run.split == split and run.data), "split")
            drawn = {"accuracy": forest(rows[:_MOST_DRAWN]), "few-shot curves": few_shot(rows[:_MOST_DRAWN])}
            figures |= {f"{data} {split[:8]}: {what}": figure for what, figure in drawn.items() if figure is not None}
    return figures
