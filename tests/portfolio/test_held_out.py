"""Losses of finished portfolios on held-out prompts, against brute force over the simplex and a planted answer."""

from __future__ import annotations

import numpy as np
import pytest

from plm.evaluation import cluster_bootstrap
from plm.methods.palm.grid import as_array, lattice
from plm.methods.palm.oracle import BestOfN
from plm.portfolio.held_out import Values, best_of_candidates, held_out, held_out_table

NAMES = ["a", "b", "c"]


def values(beta: float = 0.0) -> Values:
    """Five policies, 40 prompts, up to 6 candidates, three objectives."""
    rng = np.random.default_rng(0)
    candidates = rng.random((40, 6, 3))
    candidates[rng.random((40, 6)) < 0.2] = np.nan
    candidates[:, 0] = 0.5
    return Values(rng.random((5, 1, 3)) + 0.1 * rng.normal(size=(5, 40, 3)), candidates, beta)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_best_of_candidates_is_the_best_of_n_oracle_prompt_by_prompt(beta: float) -> None:
    made, weights = values(beta), np.random.default_rng(1).dirichlet(np.ones(3), 7)
    best = best_of_candidates(made, weights)
    assert best.mean(1) == pytest.approx(BestOfN(made.candidates, beta).best_value(weights))
    row = made.candidates[3] @ weights[2]
    row = row[np.isfinite(row)]
    assert best[2, 3] == pytest.approx(row.max() if beta == 0 else 0.1 * np.log(np.exp(row / 0.1).mean()))


def test_losses_are_those_of_the_member_that_serves_and_the_worst_is_that_of_the_simplex() -> None:
    """No weights of a fine lattice lose more than the worst, and some nearly as much."""
    made, members = values(), [3, 0]
    net = made.policies[members].mean(1) + 0.2 * np.random.default_rng(2).normal(size=(2, 3))  # as measured before
    grid = as_array(lattice(40, 3))
    own, worst, *_ = held_out(made, members, net, grid)
    served = (grid @ net.T).argmax(1)
    assert [row.member for row in own] == served.tolist()
    means = made.policies.mean(1)
    lost = (grid @ means.T).max(1) - (grid * means[np.array(members)[served]]).sum(1)
    assert [row.to_policies.mean for row in own] == pytest.approx(lost)
    assert lost.max() <= worst.to_policies.mean + 1e-12 and worst.to_policies.mean - lost.max() < 0.02
    gap = [row.to_best_of_n.mean for row in own]
    assert max(gap) <= worst.to_best_of_n.mean + 1e-12 and worst.to_best_of_n.mean - max(gap) < 0.02
    nobody, same, *_ = held_out(made, members, net, np.zeros((0, 3)))
    assert nobody == [] and same == worst  # nobody is known
    at = np.array(worst.weights)
    assert at @ means.max(0) >= at @ means[members[worst.member]]


def test_intervals_resample_prompts() -> None:
    """A single rival, and a fixed gap: the interval of a mean difference. Few prompts get none."""
    rng = np.random.default_rng(3)
    policies = rng.random((2, 50, 2))
    policies[1] += 5  # always the best
    made = Values(policies, np.full((50, 3, 2), 7.0), 0.0)
    (user,), *_ = held_out(made, [0], np.ones((1, 2)), np.array([[0.25, 0.75]]))
    difference = (policies[1] - policies[0]) @ [0.25, 0.75]
    low, high = cluster_bootstrap(difference)
    assert tuple(user.to_policies) == pytest.approx((difference.mean(), float(low), float(high)))
    low, high = cluster_bootstrap(7 - policies[0] @ [0.25, 0.75])
    assert tuple(user.to_best_of_n)[1:] == pytest.approx((float(low), float(high)))
    few = Values(policies[:, :5], made.candidates[:5], 0.0)
    (user,), worst, *_ = held_out(few, [0], np.ones((1, 2)), np.array([[0.25, 0.75]]))
    assert np.isnan(user.to_policies.low) and np.isnan(worst.to_best_of_n.high)


def test_the_table_has_a_line_for_everybody() -> None:
    made = values()
    losses = held_out(made, [1], made.policies[[1]].mean(1), np.eye(3)[:2])
    table = held_out_table(losses, ["anna", "ben"], NAMES)
    assert losses.num_policies == 5
    columns = [list(map(str, column.cells)) for column in table.columns]
    assert columns[0] == ["anna", "ben", "anybody, at most"] and columns[1][:2] == ["1.00 a", "1.00 b"]
    assert "40 held-out prompts" in str(table.title) and table.columns[4].header == "to best-of-6"
