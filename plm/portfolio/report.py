"""The tables, sentences and pictures of ``plm portfolio``.

Axes: R objectives, M members, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from plm.arrays import Float64Array
from plm.evaluation import plain_table
from plm.evaluation.figures import FAINT, INK, SAME, blank, headline, tidy
from plm.methods.palm.measures import Usage, route
from plm.methods.palm.oracle import PolicySet
from plm.portfolio.study import BASELINES, Estimate, StudyRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#D9793B", "#3C8D6E", "#4C6FAE", "#B5527F", "#C9A227", "#5BA3B8", "#7A5C9E", "#8A8F3C")
_WAYS = {"PALM": "#D9793B", "random": "#9AA1AA", "lattice": "#4C6FAE", "k-means": "#3C8D6E"}
_RASTER = 220  # points of an edge of the triangle


def spread(value: Estimate, digits: int = 3) -> str:
    """``0.025 [0.021, 0.029]``."""
    text = f"{value.mean:.{digits}f}"
    return text if np.isnan(value.low) else f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def size_table(rows: Sequence[StudyRow], num_objectives: int, num_seeds: int) -> Table:
    """Every size: worst-case regret of all ways to choose, and what else is known of PALM's choice."""
    table = plain_table(
        f"Regret on held-out prompts, {num_objectives} objectives, 95% intervals over {num_seeds} seeds"
    )
    heads = ("size", "worst", *(f"worst {way}" for way in BASELINES), "worst %", "mean", "mean k-means", "certificate",
             "calls", "usage", "dead", "dead lattice", "differ %")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right", no_wrap=head == "size")
    for row in rows:
        palm = row.quality["PALM"]
        table.add_row(
            str(row.size),
            spread(palm["worst"]),
            *(f"{row.quality[way]['worst'].mean:.3f}" for way in BASELINES),
            f"{100 * palm['worst_share'].mean:.1f}",
            f"{palm['mean'].mean:.4f}",
            f"{row.quality['k-means']['mean'].mean:.4f}",
            f"{row.certificate.mean:.3f}",
            f"{row.num_calls.mean:.0f}",
            f"{palm['perplexity'].mean:.1f}",
            f"{palm['num_dead'].mean:.1f}",
            f"{row.quality['lattice']['num_dead'].mean:.1f}",
            f"{100 * row.disagreement.mean:.0f}",
        )
    return table


def members_table(members: PolicySet, names: Sequence[str], used: Usage, cold_start: int, counted: str) -> Table:
    """The saved portfolio: weights, rewards and users of each member; ``counted`` says which users."""
    table = plain_table(f"The portfolio, usage perplexity {used.perplexity:.2f} of {len(used.shares)} over {counted}")
    table.add_column("member", justify="right")
    for head in (*(f"{name} weight" for name in names), *(f"{name} reward" for name in names), "users %", ""):
        table.add_column(head, justify="right")
    for index, (weights, rewards, share) in enumerate(zip(members.weights, members.rewards, used.shares, strict=True)):
        cells = [f"{value:.2f}" for value in (*weights, *rewards)]
        notes = [note for note, holds in (("strangers", index == cold_start), ("dead", share == 0)) if holds]
        table.add_row(str(index), *cells, f"{100 * share:.1f}", ", ".join(notes))
    return table


def search_table(searches: Sequence[dict[str, float | str]], delta: float) -> Table:
    """What each search costs and proves."""
    table = plain_table(f"Searches to a loss of {delta}, all prompts: the pool before it is cut to few")
    for head in ("search", "oracle calls", "certificate over the simplex"):
        table.add_column(head, justify="left" if head == "search" else "right")
    for one in searches:
        table.add_row(str(one["search"]), f"{one['calls']:,}", f"{one['certificate']:.4f}")
    return table


def comparison_lines(row: StudyRow) -> list[str]:
    """One sentence per baseline: is PALM's worst-case regret lower on held-out prompts?"""
    lines = []
    for way, ahead in row.ahead.items():
        both = f"{row.quality['PALM']['worst'].mean:.3f} against {row.quality[way]['worst'].mean:.3f}"
        if np.isnan(ahead.low):
            lines.append(f"size {row.size}: worst-case regret beside {way}'s: {both}; one seed has no interval")
            continue
        if ahead.low > 0:
            verdict = "lower than"
        elif ahead.high < 0:
            verdict = "HIGHER than"
        else:
            verdict = "not distinguishable from"
        lines.append(f"size {row.size}: worst-case regret is {verdict} {way}'s, {both}, difference {spread(ahead)}")
    return lines


def regret_figure(rows: Sequence[StudyRow]) -> Figure:
    """Worst-case regret on held-out prompts against size, with bands over seeds."""
    figure = blank(6.4, 4.2)
    axes = figure.subplots()
    sizes = [row.size for row in rows]
    for way, colour in _WAYS.items():
        values = [row.quality[way]["worst"] for row in rows]
        axes.plot(sizes, [v.mean for v in values], color=colour, marker="o", markersize=4, linewidth=1.8, label=way)
        axes.fill_between(
            sizes, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.15, linewidth=0
        )
    axes.plot(sizes, [r.certificate.mean for r in rows], color=INK, linestyle=":", label="PALM's certificate")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sizes)
    axes.set_xlabel("members")
    axes.legend(frameon=False, labelcolor=INK)
    tidy(axes)
    headline(axes, "Worst-case regret by size", "held-out prompts, whole simplex; bands: 95% over seeds")
    return figure


def simplex_figure(members: PolicySet, names: Sequence[str], users: Float64Array) -> Figure:
    """Three objectives: the cell in which each member is best, the members, and the users."""
    figure = blank(5.6, 5.2)
    axes = figure.subplots()
    steps = np.arange(_RASTER + 1)
    first, second = (part.ravel() for part in np.meshgrid(steps, steps))
    inside = first + second <= _RASTER
    weights = np.stack([first, second, _RASTER - first - second], axis=1)[inside] / _RASTER
    colours = [_COLOURS[index % len(_COLOURS)] for index in route(members, weights)]
    x, y = _flat(weights).T
    axes.scatter(x, y, c=colours, s=3, alpha=0.35, linewidths=0, marker="h")
    x, y = _flat(users[:1000]).T
    axes.scatter(x, y, c=FAINT, s=2, alpha=0.5, linewidths=0)
    for index, place in enumerate(_flat(members.weights)):
        axes.scatter(
            place[0], place[1], color=_COLOURS[index % len(_COLOURS)], s=90, edgecolors=INK, linewidths=1.2, zorder=3
        )
        axes.annotate(
            str(index), (place[0], place[1]), color=INK, fontsize=9, xytext=(7, 5), textcoords="offset points", zorder=4
        )
    corner = _flat(np.eye(3))
    axes.fill(*corner.T, fill=False, edgecolor=SAME, linewidth=1)
    for place, name, below in zip(corner, names, (True, True, False), strict=True):
        offset = -0.035 if below else 0.03
        axes.text(
            place[0], place[1] + offset, name, ha="center", va="top" if below else "bottom", color=INK, fontsize=10
        )
    axes.set_aspect("equal")
    axes.set_axis_off()
    headline(axes, "Who is served by whom", "cells, members and users on the simplex of weights")
    return figure


def _flat(weights: Float64Array) -> Float64Array:
    """Points of the simplex in the plane, ``(V, 3)`` -> ``(V, 2)``."""
    place: Float64Array = weights @ np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
    return place
