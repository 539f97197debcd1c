"""Do personal policies write what their users like? Rewards of their texts against those of the unaligned policy.

Prompts are the unit of sampling: all policies write on the same prompts with the same seeds, and intervals resample
prompts.

Axes: W writers, the unaligned policy first and the population's second, P prompts, N texts of a writer on a prompt, V
people who value texts, U = W - 2 users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plm.arrays import Float64Array
from plm.evaluation.statistics import cluster_bootstrap


def compare_policies(values: Float64Array, users: Sequence[str], people: Sequence[str]) -> dict[str, Any]:
    """Compare every user's policy with the unaligned and the population's by the mean value of their texts to people.

    Args:
        values: ``(W, P, N, V)`` value of each text to each person.
        users: U names, of the writers after the first two.
        people: V names; a user of the same name is that person.

    Returns:
        ``unaligned``: person -> mean; ``population`` and, in ``users``, every user -> ``people``: person -> ``mean``,
        ``difference`` to the unaligned policy with ``difference_low`` and ``difference_high``. For a user who is one of
        the people also ``own_minus_population``: how far their own mean is from that of the population's policy; and
        where there are several people, ``own_minus_others``: the difference by their own values less the mean of the
        differences by the others', both with their ends. Ends are nan for fewer than `MIN_USERS` prompts.
    """

    def with_ends(name: str, values: Float64Array) -> dict[str, float]:
        low, high = cluster_bootstrap(values)
        return {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}

    means = values.mean(axis=2)  # (W, P, V)
    gains = (means[1:] - means[:1]).transpose(1, 0, 2)  # (P, U, V)
    low, high = cluster_bootstrap(gains)
    out: dict[str, Any] = {"unaligned": dict(zip(people, means[0].mean(axis=0).tolist(), strict=True)), "users": {}}
    for row, user in enumerate([None, *users]):
        entry: dict[str, Any] = {
            "people": {
                person: {
                    "mean": float(means[row + 1, :, place].mean()),
                    "difference": float(gains[:, row, place].mean()),
                    "difference_low": float(low[row, place]),
                    "difference_high": float(high[row, place]),
                }
                for place, person in enumerate(people)
            }
        }
        if user is None:
            out["population"] = entry
            continue
        if user in people:
            place = list(people).index(user)
            entry |= with_ends("own_minus_population", gains[:, row, place] - gains[:, 0, place])
            if len(people) > 1:
                others = np.delete(gains[:, row], place, axis=1).mean(axis=1)
                entry |= with_ends("own_minus_others", gains[:, row, place] - others)
        out["users"][user] = entry
    return out


def distinct(texts: Sequence[str], size: int) -> float:
    """Distinct runs of ``size`` words by all runs of the texts (Li et al. 2016, arXiv 1510.03055); nan without any.

    Example:
        >>> distinct(["a b a b", "a b"], 1), distinct(["a b a b", "a b"], 2)
        (0.3333333333333333, 0.5)
    """
    runs = [
        tuple(words[start : start + size])
        for words in (text.split() for text in texts)
        for start in range(len(words) - size + 1)
    ]
    return len(set(runs)) / len(runs) if runs else float("nan")
