"""``plm compare``: runs of one split paired by user, or files of anybody paired by item.

Axes: U users.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from plm.audit.comparison import compare_items, sections, user_numbers
from plm.audit.items import read_items
from plm.evaluation import Section, UserRows, html_part, print_parts, read_user_rows, section_table
from plm.messages import nearest, plain


@dataclass(frozen=True)
class ModelComparison:
    """What several models got right on the same judgements, and how far every two of them differ."""

    groups: Mapping[str, dict[str, Any]]
    """Group of users -> numbers as of `compare_items`: ``all`` of files, ``unseen`` and ``seen`` of runs."""

    def sections(self) -> list[Section]:
        """Two tables of each group: the models, then every two of them."""
        return [section for users, numbers in self.groups.items() for section in sections(users, numbers)]

    def __repr__(self) -> str:
        """The tables as the command prints them."""
        text = io.StringIO()
        print_parts(
            *map(section_table, self.sections()),
            console=Console(file=text, width=80, force_jupyter=False, force_terminal=False),
        )
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        """The tables, for notebooks."""
        return html_part(self.sections())


def compare(
    *models: str | os.PathLike[str], columns: Mapping[str, str] | None = None, root: str | Path = "runs"
) -> ModelComparison:
    """Compare two or more models on the same judgements, paired, clustered by user, and corrected by Holm.

    Runs are compared by what ``per_user.csv`` keeps, unseen and seen users apart; that is exact, as one split means the
    same pairs. If one of the models is a file, all are compared by item, a run by the ``predictions.csv`` of
    ``plm predict``.

    Args:
        *models: A run, its folder or its name below ``root``; or a file as of `plm.audit.items.read_items`.
        columns: Our column name -> that of the files.
        root: Folder of all runs.

    Raises:
        ValueError: If one cannot be read, or they were not tested on the same pairs: of runs with both hashes, of
            files with the items that differ.

    Example:
        >>> compare("runs/lore", "runs/vpl")  # doctest: +SKIP
    """
    if len(models) < 2:
        raise ValueError(f"expected two models or more, got {len(models)}")
    places = [_place(os.fspath(model), Path(root)) for model in models]
    again = [place for place in places if places.count(place) > 1]
    if again:
        raise ValueError(f"expected every model once, got {plain(str(again[0]))} again")
    if all((place / "per_user.csv").is_file() and (place / "metrics.json").is_file() for place in places):
        return ModelComparison(compare_runs([_read_run(place) for place in places]))
    return ModelComparison({"all": compare_items([read_items(place, columns) for place in places])})


def _place(name: str, root: Path) -> Path:
    """The file or folder that is meant."""
    for place in (Path(name), root / name):
        if place.exists():
            return place
    known = [folder.name for folder in root.iterdir()] if root.is_dir() else []
    expected = f"expected a file, the folder of a run or the name of one in {root}"
    raise ValueError(f"{expected}, got {name!r}, which does not exist{nearest(name, known)}")


class TestedRun(NamedTuple):
    """What the folder of a run says of its test."""

    name: str
    split_hash: str
    users: dict[str, UserRows]
    num_ties: dict[str, int]
    """Group of users -> pairs left out, as their user called them a tie; those of deleted users, too."""
    split_users: frozenset[str] | None
    """Everybody whom ``splits.json`` names, which is all of the split but who was deleted; None = there is no file."""


def _read_run(folder: Path) -> TestedRun:
    """Read ``metrics.json``, ``per_user.csv`` and, where it is there, ``splits.json`` of a run."""
    users = read_user_rows(folder / "per_user.csv")
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        ties = {group: int(metrics[group]["labelled_ties"]) for group in users}
        split_hash = str(metrics["split_hash"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'metrics.json'} is damaged: {type(error).__name__}: {error}") from error
    for rows in users.values():
        accuracy, num_pairs = rows.values["accuracy"], rows.values["num_pairs"]
        if not ((accuracy >= 0) & (accuracy <= 1) & (num_pairs >= 1) & np.isfinite(num_pairs)).all():
            raise ValueError(f"{folder / 'per_user.csv'} is damaged: expected accuracies from 0 to 1 of 1 pair or more")
    return TestedRun(str(folder), split_hash, users, ties, _split_users(folder / "splits.json", split_hash))


def _split_users(path: Path, split_hash: str) -> frozenset[str] | None:
    """Everybody whom the file of the split with this hash names; None = it is not there, or of another split."""
    if not path.is_file():
        return None
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        return frozenset(map(str, chain(*split["users"].values()))) if split["hash"] == split_hash else None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _deleted_users(runs: Sequence[TestedRun]) -> set[str]:
    """Who was deleted from a run after its test: one split names the same users, and its file no longer does."""
    named = [run.split_users for run in runs if run.split_users is not None]
    everybody = set().union(*named, *(rows.ids for run in runs for rows in run.users.values()))
    return {user for user in everybody if not all(user in users for users in named)}


def _without(run: TestedRun, user_ids: set[str]) -> TestedRun:
    """A run whose users are those that are not among some."""
    groups = {}
    for group, rows in run.users.items():
        kept = np.array([user not in user_ids for user in rows.ids])
        ids = [user for user in rows.ids if user not in user_ids]
        groups[group] = UserRows(ids, {name: values[kept] for name, values in rows.values.items()})
    return run._replace(users={group: rows for group, rows in groups.items() if rows.ids})


def compare_runs(runs: Sequence[TestedRun]) -> dict[str, dict[str, Any]]:
    """Compare every run with every other, paired by user: group of users -> numbers as of `compare_items`.

    Users who were deleted from a run are left out of the others, too, and counted as ``num_deleted`` of their group.

    Raises:
        ValueError: If the runs were tested on other pairs or users.
    """
    first = runs[0]
    for other in runs[1:]:
        if first.split_hash != other.split_hash:
            raise ValueError(
                f"expected runs of one split, got {plain(first.name)} of {plain(first.split_hash)[:12]} and "
                f"{plain(other.name)} of {plain(other.split_hash)[:12]}; fit both on the same pairs, with the same "
                "data.split_seed, unseen_users, val_rows and test_rows"
            )
    deleted = _deleted_users(runs)
    left_out = {
        group: len({user for run in runs if group in run.users for user in run.users[group].ids} & deleted)
        for group in ("unseen", "seen")
    }
    runs = [_without(run, deleted) for run in runs]
    first = runs[0]
    for other in runs[1:]:
        both = f"{plain(first.name)} and {plain(other.name)}"
        for group in first.users.keys() | other.users.keys():
            pairs = [
                dict(zip(rows.ids, rows.values["num_pairs"].tolist(), strict=True))
                for rows in (run.users.get(group, UserRows([], {"num_pairs": np.zeros(0)})) for run in (first, other))
            ]
            if pairs[0] != pairs[1]:
                number = sum(pairs[0].get(user) != pairs[1].get(user) for user in pairs[0].keys() | pairs[1].keys())
                raise ValueError(
                    f"expected the same test pairs of {group} users in {both}, got {number} users who differ, though "
                    "their splits do not: if users were deleted from one run, delete them from the other, too"
                )
    names = [run.name for run in runs]
    found = {}
    for group in ("unseen", "seen"):
        if group in first.users:
            values = [run.users[group].values for run in runs]
            weights = values[0]["num_pairs"]
            micro = [float(np.average(each["accuracy"], weights=weights)) for each in values]
            ties = [run.num_ties[group] for run in runs]
            found[group] = user_numbers(names, [each["accuracy"] for each in values], micro, ties, int(weights.sum()))
            found[group] |= {"num_deleted": left_out[group]} if left_out[group] else {}
    if not found:
        raise ValueError(f"expected test pairs of unseen or seen users in {plain(first.name)}, got none")
    return found
