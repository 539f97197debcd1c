"""Whether users who are learned after a fit are predicted as those were whom the fit was tested on.

Both are judged alike: pairs that were not learned, predicted without any pair of the user and after some.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from plm.evaluation.report import plain_table
from plm.evaluation.statistics import MIN_USERS, summarize_few_shot
from plm.evaluation.wording import difference, interval, points, shot_units
from plm.metrics import FewShotTable

_NAMES = ("num_users", "accuracy", "accuracy_low", "accuracy_high", "log_loss", "gain", "gain_low", "gain_high")


def run_folder(ckpt_path: str | Path) -> Path:
    """The folder of the run that a checkpoint is of."""
    folder = Path(ckpt_path).parent
    return folder.parent if folder.name == "checkpoints" else folder


def unseen_users_curve(ckpt_path: str | Path) -> dict[str, Any] | None:
    """The few-shot curve that the test of a checkpoint's run has measured, up to as many pairs as its users had.

    Returns:
        ``few_shot`` of the run's ``metrics.json``, at the numbers of pairs that the unseen users had on average, and
        ``group_by``, by what their pairs were divided; None where the run has no test or no unseen users, or counts
        dialogues.
    """
    run = run_folder(ckpt_path)
    try:
        curve: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["few_shot"]
        splits = json.loads((run / "splits.json").read_text(encoding="utf-8"))
        most = splits["pairs_support"] / splits["users_unseen"]
    except (OSError, KeyError, ZeroDivisionError):
        return None
    except ValueError as error:  # the users are learned all the same
        warnings.warn(f"metrics.json or splits.json of {run} is damaged: no report of drift ({error})", stacklevel=2)
        return None
    if shot_units(curve) != "pairs":  # new users are learned from pairs
        return None
    lists = {name: value for name, value in curve.items() if isinstance(value, list)}
    reached = [place for place, shots in enumerate(curve["shots"]) if shots <= most]
    group_by = {"group_by": splits.get("group_by", "auto")}
    return {**curve, **group_by, **{name: [values[place] for place in reached] for name, values in lists.items()}}


def drift_report(table: FewShotTable, fit: Mapping[str, Any]) -> dict[str, Any]:
    """Compare new users with the unseen users of a fit's test, after the same number of pairs.

    Differences have 95 % intervals from those of both groups, whose users are others: the distances of the ends from
    the estimates add up in squares (Zou and Donner 2008, "Construction of confidence limits about effect measures",
    equation 3). The bases fit new users less well where the interval of the accuracy lies below zero, which happens to
    one of 40 groups of users who are as the others were.

    Args:
        table: New users after no pair and after some.
        fit: The few-shot curve of the fit, ``few_shot`` of its ``metrics.json``, with the same number of pairs.

    Returns:
        ``shots``; ``new`` and ``fit``, of each ``num_users``, ``accuracy``, ``log_loss`` and the ``gain`` of accuracy
        over no pairs; ``difference`` of accuracy and gain; ``fit_again`` (None = nobody can tell) and ``verdict``.
    """
    shots = int(table.shots[-1])
    curves = {"new": summarize_few_shot(table), "fit": fit}
    groups = {name: _at(curve, shots) for name, curve in curves.items()}
    new, then = groups["new"], groups["fit"]
    change = {**_difference(new, then, "accuracy"), **_difference(new, then, "gain")}
    fit_again, verdict = _verdict(shots, new, then, change)
    return {"shots": shots, **groups, "difference": change, "fit_again": fit_again, "verdict": verdict}


def drift_table(report: Mapping[str, Any]) -> Table:
    """Tabulate a report: a column per group of users, accuracies in per cent, differences in points."""
    groups = [report["new"], report["fit"]]
    table = plain_table(f"Pairs predicted after {report['shots']} of the user were learned, 95% intervals over users")
    table.add_column("", no_wrap=True)
    for head in ("new users", "unseen users of the fit"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_row("users", *(f"{one['num_users']:,.0f}" for one in groups))
    table.add_row("accuracy %", *(f"{points(one['accuracy'], '')}{interval(one, 'accuracy')}" for one in groups))
    table.add_row("gain over no pairs", *(difference(one, "gain") for one in groups))
    table.add_row("log-loss", *(f"{one['log_loss']:.3f}" for one in groups))
    return table


def _at(curve: Mapping[str, Any], shots: int) -> dict[str, float]:
    """The numbers of a curve after some pairs; nan where there is none."""
    place = curve["shots"].index(shots)
    found = {name: curve.get(name) for name in _NAMES}
    values = {name: value[place] if isinstance(value, list) else value for name, value in found.items()}
    return {name: math.nan if value is None else value for name, value in values.items()}


def _difference(new: Mapping[str, float], then: Mapping[str, float], name: str) -> dict[str, float]:
    """A number of one group less that of another, with its interval."""
    value = new[name] - then[name]
    below, above = (f"{name}_low", f"{name}_high")
    return {
        name: value,
        below: value - math.hypot(new[name] - new[below], then[above] - then[name]),
        above: value + math.hypot(new[above] - new[name], then[name] - then[below]),
    }


def _verdict(
    shots: int, new: Mapping[str, float], then: Mapping[str, float], change: Mapping[str, float]
) -> tuple[bool | None, str]:
    """Whether to fit again, and why."""
    if math.isnan(change["accuracy_low"]):
        counts = f"got {new['num_users']:.0f} new ones and {then['num_users']:.0f} at the fit"
        return None, f"no verdict on the bases: an interval needs {MIN_USERS} users of each group, {counts}"
    found = f"{difference(change, 'accuracy', ' points')} of accuracy after {shots} pairs, against the fit's own test"
    if change["accuracy_high"] >= 0:
        return False, f"no evidence that the bases fit these users less well: {found}"
    gain = difference(change, "gain", " points")
    again = "the bases fit these users less well, fit again with their pairs"
    return True, f"{again}: {found}; what their pairs add, {gain}"
