"""Pictures of a leaderboard: accuracies with intervals, few-shot curves, parameters against users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from plm.evaluation import shot_units
from plm.evaluation.figures import FAINT, HARMED, INK, SAME, blank, headline, tidy
from plm.leaderboard.report import Leaderboard
from plm.leaderboard.results import GROUPS, BoardRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#D9793B", "#3B6FB6", "#3C8D6E", "#8A5FB0", "#C2524B", "#5B6770", "#B08A2E")
_LONGEST = 44  # characters of a name
_KINDS = {"method": INK, "control": HARMED, "baseline": FAINT}


def all_figures(board: Leaderboard) -> dict[str, Figure]:
    """Title -> picture; those without anything to show are left out."""
    figures = {
        "Accuracy": forest(board.rows, board.reference),
        "Few-shot curves": few_shot(board.rows),
        "Sweep": sweep(board.rows, board.reference),
        "Parameters": parameters(board),
    }
    return {title: figure for title, figure in figures.items() if figure is not None}


def forest(rows: Sequence[BoardRow], reference: str = "") -> Figure | None:
    """Accuracy of every row with its interval, one panel per group of users, and a line at the reference row's."""
    rows = [row for row in rows if row.numbers]
    if not rows:
        return None
    groups = [group for group in GROUPS if any(group in row.numbers for row in rows)]
    figure = blank(4.2 + 3.6 * len(groups), 1.4 + 0.32 * len(rows))
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        tidy(axes)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color="#E7E9EC", linewidth=0.8)
        for place, row in enumerate(rows):
            numbers = row.numbers.get(group)
            if numbers is None:
                continue
            color = _KINDS[row.kind]
            middle = 100 * numbers["accuracy"]
            ends = [100 * numbers[f"accuracy_{end}"] for end in ("low", "high")]
            axes.plot(ends, [place, place], color=color, linewidth=1.8, solid_capstyle="butt")
            axes.plot([middle], [place], marker="o" if row.kind == "method" else "s", color=color, markersize=6)
            if row.name == reference:
                axes.axvline(middle, color=SAME, linewidth=1.1, linestyle=(0, (4, 3)), zorder=0)
        axes.set_xlabel("accuracy, mean over users (%)")
        count = next(row.numbers[group]["num_users"] for row in rows if group in row.numbers)
        headline(
            axes, f"{group.capitalize()} users", f"{count:,.0f} users" + (f"; dashed: {reference}" if reference else "")
        )
    panels[0].set_yticks(range(len(rows)), [_label(row.name) for row in rows])
    panels[0].invert_yaxis()
    return figure


def sweep(rows: Sequence[BoardRow], reference: str) -> Figure | None:
    """Accuracy over an argument that was swept, with intervals; faint what the same models reach for a stranger."""
    points = [(row.point, row) for row in rows if row.point and row.numbers]
    if not points:
        return None
    groups = [group for group in GROUPS if any(group in row.numbers for _, row in points)]
    places = {value: place for place, value in enumerate(sorted({point.value for point, _ in points}))}
    figure = blank(1.2 + 4.2 * len(groups), 4.2)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        tidy(axes)
        for index, series in enumerate(dict.fromkeys(point.series for point, _ in points)):
            found = sorted(
                (places[p.value], row.numbers[group])
                for p, row in points
                if p.series == series and group in row.numbers
            )
            at, numbers = [place for place, _ in found], [each for _, each in found]
            middle, low, high = (
                100 * np.array([each[f"accuracy{end}"] for each in numbers]) for end in ("", "_low", "_high")
            )
            color = _COLORS[index % len(_COLORS)]
            axes.errorbar(
                at,
                middle,
                (middle - low, high - middle),
                color=color,
                linewidth=2,
                marker="o",
                markersize=5,
                label=_label(series),
            )
            control = [100 * each.get("global_accuracy", np.nan) for each in numbers]
            axes.plot(at, control, color=color, alpha=0.5, linewidth=1.2, linestyle=(0, (4, 3)))
        for row in rows:
            if row.name == reference and group in row.numbers:
                axes.axhline(100 * row.numbers[group]["accuracy"], color=SAME, linewidth=1.1, zorder=0)
        axes.set_xticks(range(len(places)), [f"{value:g}" for value in places])
        axes.set_xlabel(points[0][0].argument)
        headline(axes, f"{group.capitalize()} users", f"dashed: not told who the user is; line: {reference}")
    panels[0].set_ylabel("accuracy, mean over users (%)")
    panels[-1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), labelcolor=INK)
    return figure


def few_shot(rows: Sequence[BoardRow]) -> Figure | None:
    """Accuracy of unseen users against support pairs, one line per row that has a curve."""
    rows = [row for row in rows if row.few_shot and row.kind != "control"]
    rows = [row for row in rows if shot_units(row.few_shot or {}) == shot_units(rows[0].few_shot or {})]
    if not rows:
        return None
    figure = blank(8.4, 4.8)
    axes = figure.add_subplot()
    tidy(axes)
    for index, row in enumerate(rows):
        curve = row.few_shot or {}
        at = np.log2(np.array(curve["shots"]) + 1.0)
        low, high = (100 * np.array(curve[f"accuracy_{end}"], dtype=float) for end in ("low", "high"))
        color, style = _COLORS[index % len(_COLORS)], "-" if row.is_personal else (0, (4, 3))
        axes.fill_between(at, low, high, color=color, alpha=0.09, linewidth=0)
        values = 100 * np.array(curve["accuracy"], dtype=float)
        axes.plot(
            at, values, color=color, linewidth=2, linestyle=style, marker="o", markersize=4, label=_label(row.name)
        )
    seeds = ", mean of the seeds'" if any(row.num_seeds > 1 for row in rows) else ""
    first = rows[0].few_shot or {}
    axes.set_xticks(np.log2(np.array(first["shots"]) + 1.0), [str(k) for k in first["shots"]])
    axes.set_xlabel(f"{shot_units(first)} per unseen user (shots)")
    axes.set_ylabel("accuracy, mean over users (%)")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), labelcolor=INK)
    headline(axes, f"How many {shot_units(first)} does a new user need?", "bands: 95% intervals over users" + seeds)
    return figure


def parameters(board: Leaderboard) -> Figure | None:
    """Numbers to store against users: shared ones plus those of every user."""
    rows = [row for row in board.rows if row.kind == "method" and row.facts.get("parameters")]
    if not rows:
        return None
    figure = blank(8.4, 4.4)
    axes = figure.add_subplot()
    tidy(axes)
    users = np.logspace(1, 6, 60)
    for index, row in enumerate(rows):
        total = row.facts["shared_parameters"] + row.facts["parameters_per_user"] * users
        color = _COLORS[index % len(_COLORS)]
        axes.plot(
            users,
            total,
            color=color,
            linewidth=2,
            label=_label(f"{row.name} (+{row.facts['parameters_per_user']}/user)"),
        )
        axes.plot([row.facts["num_users"]], [row.facts["parameters"]], marker="o", color=color, markersize=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("users")
    axes.set_ylabel("parameters, shared and personal")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), labelcolor=INK)
    headline(axes, "What do users cost?", "dots: the users of this leaderboard")
    return figure


def _label(name: str) -> str:
    """A name as matplotlib shows it: a dollar begins no formula, and an underscore hides no name in a legend."""
    text = (name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
