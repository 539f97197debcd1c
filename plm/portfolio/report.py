"""The tables, sentences and pictures of ``plm portfolio``.

Axes: R objectives, M members, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from plm.arrays import Float64Array
from plm.evaluation import Section, TableRow, plain_table, print_parts, section_table
from plm.evaluation.figures import FAINT, INK, SAME, blank, headline, tidy
from plm.judging import report as judge_report
from plm.methods.palm.bounds import Slack
from plm.methods.palm.measures import Usage, route
from plm.methods.palm.oracle import PolicySet
from plm.methods.palm.selection import Portfolio
from plm.portfolio.guarantee import Guarantee
from plm.portfolio.held_out import held_out_table
from plm.portfolio.study import BASELINES, StudyRow, spread
from plm.portfolio.written import Finished, own_mix_lines, users_table
from plm.types import UserState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#D9793B", "#3C8D6E", "#4C6FAE", "#B5527F", "#C9A227", "#5BA3B8", "#7A5C9E", "#8A8F3C")
_WAYS = {"PALM": "#D9793B", "random": "#9AA1AA", "lattice": "#4C6FAE", "k-means": "#3C8D6E"}
_RASTER = 220  # points of an edge of the triangle


class Search(NamedTuple):
    """What a search costs and proves on all prompts."""

    search: str
    calls: int
    """Oracle calls."""
    certificate: float
    """Largest loss over the simplex, beyond the share that the accuracy allows."""


class Result(NamedTuple):
    """A finished run, as it is shown."""

    names: list[str]
    """Of the objectives."""
    rows: list[StudyRow]
    """The study, a row for each size."""
    num_seeds: int
    """Halvings that the study is a mean over."""
    size: int
    """Of the portfolio that is saved."""
    drawn_users: int | None
    """Users drawn from the simplex for the study although some are known; None where the study needs no such note."""
    num_known: int
    """Known users."""
    accuracy: Slack
    """What the searches stop at."""
    searches: list[Search]
    portfolio: Portfolio
    usage: Usage
    cold_start: int
    """Member of an unknown user."""
    shares_of: str
    """Whose shares ``usage`` holds."""
    guarantee: Guarantee | None
    certificate_says: str
    """See `what_is_certified`."""


class WritingResult(NamedTuple):
    """What is shown besides where members write."""

    finished: Finished
    learned: UserState
    """The known users, learned from pairs."""
    num_pairs: int
    """Pairs that each is learned from."""
    judgement: dict[str, Any]
    """See `plm.portfolio.written.WrittenMembers.judge_texts`."""


def show(result: Result, writing: WritingResult | None, folder: Path) -> None:
    """Print a finished run and where its files are."""
    if writing is not None:
        print_parts("Sizes and searches are those of best-of-n, which chose the weights that policies were made for")
    if result.guarantee is not None:
        print_parts(*result.guarantee.lines(), "")
    num = len(result.names)
    print_parts(size_table(result.rows, num, result.num_seeds))
    if result.drawn_users is not None:
        print_parts(
            f"Mean regret, k-means, usage and dead members above are of {result.drawn_users:,} users drawn evenly from "
            f"the simplex: known are {result.num_known}, fewer than the largest size {result.rows[-1].size}"
        )
    members = members_table(result.portfolio.members, result.names, result.usage, result.cold_start, result.shares_of)
    print_parts("", members, "")
    row = next(row for row in result.rows if row.size == result.size)
    print_parts(search_table(result.searches, result.accuracy), "", *comparison_lines(row))
    if writing is not None:
        _show_writing(writing, result.names)
    pictures = "regret.png and simplex.png" if num == 3 else "regret.png"
    files = f"portfolio.ckpt, portfolio.json, study.json, {pictures} in {folder}"
    print_parts(f"certificate {result.portfolio.certificate:.4f}: {result.certificate_says}", f"{files}\n")


def _show_writing(writing: WritingResult, names: list[str]) -> None:
    """Print users learned from pairs, losses on held-out prompts, and what members write there."""
    finished, method = writing.finished, writing.finished.method
    print_parts(*finished.notes)
    if method.user_ids:
        print_parts(users_table(method, writing.learned, writing.num_pairs, names), "")
    print_parts(held_out_table(finished.losses, method.user_ids, names), "")
    judge_report.show(writing.judgement, Console())
    print_parts(*own_mix_lines(writing.judgement, list(writing.judgement["users"])))


def what_is_certified(finished: Finished | None, beta: float) -> str:
    """Say what the certificate of a portfolio bounds, and what it does not."""
    price = "KL is free, utilities are plain rewards" if beta == 0 else f"a nat of KL costs {beta:g}"
    if finished is None:
        return (
            "no weights lose more than this to any way of picking among the candidates of the prompts it was computed "
            f"on; {price}"
        )
    return (
        f"estimated loss to policies made in the same way ({finished.oracle_name}), no bound on the loss to "
        f"others, such as the best of several samples; {price}"
    )


def size_table(rows: Sequence[StudyRow], num_objectives: int, num_seeds: int) -> Table:
    """Show every size: worst-case regret of all ways to choose, and further measures of PALM's choice."""
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


def members_table(members: PolicySet, names: Sequence[str], used: Usage, cold_start: int, shares_of: str) -> Table:
    """Show the saved portfolio: weights, rewards and users of each member; ``shares_of`` says which users."""
    table = plain_table(f"The portfolio, usage perplexity {used.perplexity:.2f} of {len(used.shares)} over {shares_of}")
    table.add_column("member", justify="right")
    for head in (*(f"{name} weight" for name in names), *(f"{name} reward" for name in names), "users %", ""):
        table.add_column(head, justify="right")
    for index, (weights, rewards, share) in enumerate(zip(members.weights, members.rewards, used.shares, strict=True)):
        cells = [f"{value:.2f}" for value in (*weights, *rewards)]
        notes = [note for note, holds in (("unknown users", index == cold_start), ("dead", share == 0)) if holds]
        table.add_row(str(index), *cells, f"{100 * share:.1f}", ", ".join(notes))
    return table


def search_table(searches: Sequence[Search], accuracy: Slack) -> Table:
    """Show what each search costs and proves."""
    besides = f" besides {accuracy.eps:.2%} of the best value" if accuracy.eps else ""
    title = f"Searches to a loss of {accuracy.delta}{besides}, all prompts: the pool before it is cut to few"
    rows = [TableRow([search.search, f"{search.calls:,}", f"{search.certificate:.4f}"]) for search in searches]
    return section_table(Section(title, ("search", "oracle calls", "certificate over the simplex"), rows))


def comparison_lines(row: StudyRow) -> list[str]:
    """Say for each baseline whether PALM's worst-case regret is lower on held-out prompts."""
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
    """Draw worst-case regret on held-out prompts against size, with bands over seeds."""
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
    """Draw, for three objectives, the cell in which each member is best, the members, and the users."""
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
