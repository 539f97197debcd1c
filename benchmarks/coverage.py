"""Do 95 % intervals cover the truth in 95 of 100 repetitions? And does a p-value reject a true null in 5 of 100?

Usage: python benchmarks/coverage.py [--simulations 500 --resamples 1000]

Every simulation draws users from one population: each has a probability to be judged right with their own state and
with the population's, both vary between users and hang together, and users with more pairs are easier. The truth is the
mean over the whole population. Reported: how often the interval holds it, for the macro accuracy, the micro accuracy,
the gain over the global control, and the difference of two methods averaged over three seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from plm.arrays import Float64Array
from plm.evaluation import cluster_bootstrap, compare

ALLOWED = (0.93, 0.97)


class Drawn(NamedTuple):
    """What a simulation observes, one value per user."""

    num_pairs: Float64Array
    accuracy: Float64Array
    global_accuracy: Float64Array
    rival: Float64Array
    """Accuracy of a second method, mean of three seeds."""
    equal: Float64Array
    """Accuracy of a third method that is as good as the first on average."""


class Truth(NamedTuple):
    """What the intervals must hold."""

    macro: float
    micro: float
    gain: float
    difference: float


def population(rng: np.random.Generator, num_users: int) -> tuple[Float64Array, ...]:
    """Pairs and probabilities to be right of users: personal, global, of a rival, of an equal."""
    ease, taste, luck, other = rng.standard_normal((4, num_users))
    num_pairs = np.maximum(5, np.round(np.exp(3.2 + 0.6 * luck + 0.2 * ease)))
    personal = 0.5 + 0.5 / (1 + np.exp(-(0.4 + 0.8 * ease)))
    global_ = np.clip(personal - 0.05 + 0.06 * taste, 0.02, 0.98)
    rival = np.clip(personal - 0.02 + 0.04 * taste, 0.02, 0.98)
    equal = personal + np.where(other > 0, 1, -1) * np.minimum(0.03, 1 - personal)
    return num_pairs, personal, global_, rival, equal


def truth(seed: int = 0, num_users: int = 4_000_000) -> Truth:
    """Means over a population so large that its own error does not matter."""
    num_pairs, personal, global_, rival, _ = population(np.random.default_rng([seed, 1]), num_users)
    gain, difference = (personal - global_).mean(), (personal - rival).mean()
    return Truth(float(personal.mean()), float(np.average(personal, weights=num_pairs)), float(gain), float(difference))


def draw(rng: np.random.Generator, num_users: int) -> Drawn:
    """One data set."""
    num_pairs, personal, global_, rival, equal = population(rng, num_users)

    def judged(chance: Float64Array) -> Float64Array:
        return rng.binomial(num_pairs.astype(int), chance) / num_pairs

    seeds = np.mean([judged(rival) for _ in range(3)], axis=0)
    return Drawn(num_pairs, judged(personal), judged(global_), seeds, judged(equal))


def simulate(num_users: int, simulations: int, resamples: int, seed: int = 0) -> dict[str, float]:
    """Share of simulations whose interval holds the truth, by statistic; and that of rejected true nulls."""
    true = truth()
    hits = {"macro": 0, "micro": 0, "gain": 0, "difference": 0}
    rejected = 0
    for number in range(simulations):
        data = draw(np.random.default_rng([seed, num_users, number]), num_users)
        values = np.stack([data.accuracy, data.accuracy, data.accuracy - data.global_accuracy], axis=1)
        weights = np.stack([np.ones(num_users), data.num_pairs, np.ones(num_users)], axis=1)
        low, high = cluster_bootstrap(values, weights, num_resamples=resamples, seed=number)
        for index, name in enumerate(("macro", "micro", "gain")):
            hits[name] += bool(low[index] <= getattr(true, name) <= high[index])
        test = compare(data.accuracy, data.rival, num_resamples=resamples, seed=number)
        hits["difference"] += test.low <= true.difference <= test.high
        rejected += compare(data.accuracy, data.equal, num_resamples=resamples, seed=number).p_value < 0.05
    return {**{name: count / simulations for name, count in hits.items()}, "rejected": rejected / simulations}


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate and print; status 1 if a coverage is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=500)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--users", type=int, nargs="+", default=[20, 60, 200, 1000])
    options = parser.parse_args(arguments)
    results = {count: simulate(count, options.simulations, options.resamples) for count in options.users}
    names = ["macro", "micro", "gain", "difference", "rejected"]
    table = Table("users", *names, title=f"Coverage of 95 % intervals, {options.simulations} simulations")
    for count, shares in results.items():
        table.add_row(str(count), *(f"{100 * shares[name]:.1f} %" for name in names))
    Console().print(table)
    covered = [shares[name] for shares in results.values() for name in names[:-1]]
    if not all(ALLOWED[0] <= share <= ALLOWED[1] for share in covered):
        raise SystemExit(f"a coverage is outside {100 * ALLOWED[0]:.0f} to {100 * ALLOWED[1]:.0f} %")


if __name__ == "__main__":
    main()
