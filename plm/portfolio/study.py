"""How good portfolios of every size are on prompts they were not chosen on, beside simpler ways to choose them.

Axes: K sizes, S seeds, U users, R objectives, M members, X prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from plm.arrays import Float64Array
from plm.methods.palm.bounds import Slack
from plm.methods.palm.grid import as_array, combined_grid, combined_grid_size, kmeans_weights, lattice_weights
from plm.methods.palm.grid import random_weights as random_draw
from plm.methods.palm.measures import disagreement, route, usage
from plm.methods.palm.oracle import BestOfN, Oracle, PolicySet
from plm.methods.palm.search import Certified, certificate, corner_search, lazy_grid, regret, worst_regret
from plm.methods.palm.selection import Solver, choose_portfolio

BASELINES = ("random", "lattice", "k-means")
_RANDOM_DRAWS = 5  # random portfolios of a seed, averaged
_DISAGREEMENT_PROMPTS = 200
_MOST_GRID = 2000  # oracle calls that a whole grid may take


class Quality(NamedTuple):
    """A portfolio on held-out prompts; regrets are exact over the simplex, or over users."""

    worst: float
    """Largest additive regret over the simplex."""
    worst_share: float
    """Largest share of the best value that is lost."""
    mean: float
    """Mean additive regret over users."""
    p95: float
    """Regret that 95 % of the users stay below."""
    perplexity: float
    """As if so many members were used evenly."""
    num_dead: float
    """Members no user is routed to."""


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % t interval."""

    mean: float
    low: float
    high: float


class StudyRow(NamedTuple):
    """A portfolio of one size, as estimated over seeds."""

    size: int
    certificate: Estimate
    num_calls: Estimate
    quality: dict[str, dict[str, Estimate]]
    """Way of choosing -> field of `Quality`."""
    ahead: dict[str, Estimate]
    """Baseline -> by how much its worst regret exceeds PALM's on the same prompts."""
    disagreement: Estimate
    """Share of the prompts on which two of PALM's members answer differently, mean over pairs of members."""


def spread(value: Estimate) -> str:
    """``0.025 [0.021, 0.029]``."""
    return f"{value.mean:.3f}" + ("" if np.isnan(value.low) else f" [{value.low:.3f}, {value.high:.3f}]")


def record(value: Any) -> Any:
    """A value as a file holds it: named tuples are dicts, wherever they are in it.

    >>> record({"worst": Estimate(0.5, 0.25, 0.75)})
    {'worst': {'mean': 0.5, 'low': 0.25, 'high': 0.75}}
    """
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: record(part) for name, part in value.items()}
    return [record(part) for part in value] if isinstance(value, list) else value


def run_search(oracle: Oracle, search: str, accuracy: Slack, cell: tuple[float, float], max_calls: int) -> Certified:
    """Make policies to choose from, by the search of this name.

    Args:
        oracle: Makes them.
        search: corner, lazy or grid.
        accuracy: What anybody may lose: a share of the best value, and an absolute loss besides.
        cell: Slacks of the cells of the grid.
        max_calls: Most oracle calls of the corner search.

    Raises:
        ValueError: If a whole grid is too large.
    """
    if search == "corner":
        return corner_search(oracle, accuracy.delta, accuracy.eps, max_calls)
    size = combined_grid_size(*cell, oracle.num_objectives)
    if size > _MOST_GRID:
        raise ValueError(
            f"the grid at {cell} has {size:,} weights for {oracle.num_objectives} objectives, more than "
            f"{_MOST_GRID:,}; use search: corner, or a coarser cell"
        )
    grid = as_array(combined_grid(*cell, oracle.num_objectives))
    if search == "lazy":
        return lazy_grid(oracle, grid, accuracy.delta, accuracy.eps)
    solved = oracle.solve(grid)
    return Certified(solved, certificate(solved, solved, oracle.error, accuracy.eps).regret, len(grid))


def quality_of(members: PolicySet, judging: BestOfN, users: Float64Array, best: Float64Array) -> Quality:
    """Measure members on the judging prompts, where users are routed by the members' values on the choosing prompts.

    Args:
        members: The members, measured on the choosing prompts.
        judging: Oracle of the judging prompts.
        users: ``(U, R)``.
        best: ``(U,)`` the best value for each user on the judging prompts.
    """
    net, member = judging.measured(members.weights).net, route(members, users)
    lost = regret(best, (users * net[member]).sum(1))
    used = usage(member, len(net))
    return Quality(
        worst_regret(net, judging.best_value, routed_by=members.net).regret,
        worst_regret(net, judging.best_value, "multiplicative", routed_by=members.net).regret,
        float(lost.mean()),
        float(np.quantile(lost, 0.95)),
        used.perplexity,
        float(used.num_dead),
    )


def run_study(
    make_split: Callable[[np.random.Generator], tuple[BestOfN, BestOfN, Float64Array]],
    sizes: list[int],
    num_seeds: int,
    find_policies: Callable[[Oracle], Certified],
    solver: Solver,
) -> list[StudyRow]:
    """Choose and judge portfolios of all sizes on ``num_seeds`` random halves of the prompts.

    Args:
        make_split: Oracle of the choosing half, that of the judging half, and users ``(U, R)``.
        sizes: Numbers of members.
        num_seeds: Random halves.
        find_policies: The search for policies to choose from.
        solver: See `plm.methods.palm.selection.best_subset`.
    """
    seeds = [
        _one_seed(make_split, sizes, np.random.default_rng(seed), find_policies, solver) for seed in range(num_seeds)
    ]
    rows = []
    for index, size in enumerate(sizes):
        facts = [seed[index] for seed in seeds]
        quality = {
            way: {name: estimate([getattr(fact.quality[way], name) for fact in facts]) for name in Quality._fields}
            for way in ("PALM", *BASELINES)
        }
        ahead = {
            way: estimate([fact.quality[way].worst - fact.quality["PALM"].worst for fact in facts]) for way in BASELINES
        }
        others = [estimate([fact.facts[column] for fact in facts]) for column in range(3)]
        rows.append(StudyRow(size, others[0], others[1], quality, ahead, others[2]))
    return rows


class _Seed(NamedTuple):
    """A portfolio of one size, as one seed chose it."""

    quality: dict[str, Quality]
    facts: tuple[float, float, float]
    """Certificate, calls, disagreement."""


def _one_seed(
    make_split: Callable[[np.random.Generator], tuple[BestOfN, BestOfN, Float64Array]],
    sizes: list[int],
    rng: np.random.Generator,
    find_policies: Callable[[Oracle], Certified],
    solver: Solver,
) -> list[_Seed]:
    choosing, judging, users = make_split(rng)
    best = judging.best_value(users)
    solved = find_policies(choosing).policies
    num = choosing.num_objectives
    few = BestOfN(np.where(judging.present[..., None], judging.rewards, np.nan)[:_DISAGREEMENT_PROMPTS], judging.beta)

    def measured(weights: Float64Array) -> Quality:
        return quality_of(choosing.measured(weights), judging, users, best)

    out = []
    for size in sizes:
        portfolio = choose_portfolio(choosing, solved, size, solver)
        weights = portfolio.members.weights
        draws = [measured(random_draw(size, num, rng)) for _ in range(_RANDOM_DRAWS)]
        ways = {
            "PALM": measured(weights),
            "random": Quality(*np.mean(draws, axis=0).tolist()),
            "lattice": measured(lattice_weights(size, num, rng)),
            "k-means": measured(kmeans_weights(users, size, rng)),
        }
        apart = disagreement(few.policies(weights))
        facts = (portfolio.certificate, float(portfolio.num_calls), apart)
        out.append(_Seed(ways, facts))
        solved = portfolio.solved  # what was solved for one size serves the next
    return out


def estimate(values: list[float]) -> Estimate:
    """Mean and 95 % t interval over seeds; a single seed has no interval.

    >>> estimate([1.0, 1.0, 1.0])
    Estimate(mean=1.0, low=1.0, high=1.0)
    """
    mean, num = float(np.mean(values)), len(values)
    if num < 2:
        return Estimate(mean, np.nan, np.nan)
    half = float(stdtrit(num - 1, 0.975)) * float(np.std(values, ddof=1)) / num**0.5
    return Estimate(mean, mean - half, mean + half)
