"""Searches, certificates and covers of PALM against closed forms, Monte Carlo, brute force and a published table."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import linprog

from plm.methods.palm.grid import as_array, combined_grid, direct_grid, random_weights, two_sided_levels
from plm.methods.palm.measures import disagreement, route, usage
from plm.methods.palm.oracle import BestOfN, PolicySet, check_simplex
from plm.methods.palm.search import (
    certificate,
    corner_search,
    corners,
    lazy_grid,
    regret,
    upper_bound,
    upper_planes,
    worst_regret,
)
from plm.methods.palm.selection import best_subset, choose_portfolio, greedy_cover, smallest_cover
from tests.parity.palm_references import worst_regret_among

# the ten published policies of the seed-1 pool: weight of helpfulness, two rewards, KL
PUBLISHED = np.array(
    [
        [1, 0.808, 0.180, 0.65], [0.833, 0.834, 0.222, 0.83], [0.781, 0.828, 0.245, 0.89], [0.718, 0.830, 0.275, 1.32],
        [0.646, 0.835, 0.314, 1.78], [0.566, 0.819, 0.337, 2.31], [0.5, 0.801, 0.346, 2.35], [0, 0.699, 0.430, 5.46],
        [0.167, 0.726, 0.428, 5.25], [0.219, 0.729, 0.422, 5.28],
    ]
)  # fmt: skip


def bandit(seed: int, num: int = 3, beta: float = 0.1, prompts: int = 32, candidates: int = 16) -> BestOfN:
    return BestOfN(np.random.default_rng(seed).random((prompts, candidates, num)), beta)


# ---------------------------------------------------------------------- oracle
def test_soft_best_of_n_is_the_closed_form() -> None:
    """``J* = beta E_x ln mean_y exp(w . r / beta)``, reached by the policy itself."""
    oracle = bandit(0, beta=0.2)
    weights = random_weights(20, 3, np.random.default_rng(1))
    scores = np.einsum("xcr,vr->vxc", oracle.rewards, weights)
    expected = 0.2 * np.log(np.exp(scores / 0.2).mean(2)).mean(1)
    pool = oracle.solve(weights)
    assert oracle.best_value(weights) == pytest.approx(expected)
    assert np.einsum("vr,vr->v", weights, pool.net) == pytest.approx(expected)
    assert (pool.costs >= 0).all() and (pool.costs <= oracle.max_cost).all() and oracle.num_calls == 20


def test_hard_best_of_n_takes_the_best_candidate() -> None:
    rewards = np.array([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.6]], [[0.2, 0.9], [0.4, 0.1], [np.nan, np.nan]]])
    pool = BestOfN(rewards).solve(np.array([[1.0, 0.0], [0.5, 0.5]]))
    assert pool.rewards.tolist() == [[0.7, 0.05], [0.4, 0.75]] and not pool.costs.any()
    assert BestOfN(rewards).max_reward == pytest.approx((1.2 + 1.1) / 2)
    with pytest.raises(ValueError, match=r"sum to 1, got \[0.5, 0.6\] in row 1"):
        check_simplex(np.array([[1.0, 0.0], [0.5, 0.6]]), 2)


# ---------------------------------------------------------------------- geometry
@pytest.mark.parametrize("num", [2, 3, 4, 5])
def test_corners_are_those_of_brute_force(num: int) -> None:
    """Solve every choice of tight constraints and keep the feasible solutions."""
    net = np.random.default_rng(num).random((5, num))
    found = set()
    rows = np.concatenate([np.column_stack([net, -np.ones(5)]), np.column_stack([-np.eye(num), np.zeros(num)])])
    for tight in itertools.combinations(range(len(rows)), num):
        system = np.concatenate([rows[list(tight)], [[1.0] * num + [0.0]]])
        if abs(np.linalg.det(system)) < 1e-9:
            continue
        point = np.linalg.solve(system, np.append(np.zeros(num), 1.0))
        if (rows @ point <= 1e-9).all():
            found.add(tuple(np.round(point[:num], 7) + 0.0))
    assert {tuple(np.round(row, 7) + 0.0) for row in corners(net)} == found


def test_upper_planes_solve_the_linear_program() -> None:
    oracle = bandit(1)
    solved = oracle.solve(np.concatenate([np.eye(3), random_weights(12, 3, np.random.default_rng(2))]))
    values = np.einsum("vr,vr->v", solved.weights, solved.net)
    planes = upper_planes(solved.weights, values)
    for user in random_weights(40, 3, np.random.default_rng(3)):
        system = np.concatenate([solved.weights.T])
        expected = linprog(values, A_eq=system, b_eq=user, bounds=(0, None)).fun
        assert upper_bound(user[None], planes)[0] == pytest.approx(expected, abs=1e-8)
    with pytest.raises(ValueError, match="every vertex"):
        upper_planes(solved.weights[1:], values[1:])


# ---------------------------------------------------------------------- regret
@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
@pytest.mark.parametrize("num", [2, 3, 4])
def test_corner_regret_is_never_below_monte_carlo(num: int, kind: str) -> None:
    users = np.concatenate([random_weights(4000, num, np.random.default_rng(0)), np.eye(num)])
    for seed, size in itertools.product(range(4), (1, 2, 4, 7)):
        oracle = bandit(seed, num, beta=0.1 if seed % 2 else 0.0)
        members = oracle.solve(random_weights(size, num, np.random.default_rng(seed)))
        exact = worst_regret(members.net, oracle.best_value, kind)  # type: ignore[arg-type]
        drawn = regret(oracle.best_value(users), members.values(users).max(1), kind)  # type: ignore[arg-type]
        assert exact.regret >= drawn.max() - 1e-9
        assert exact.regret <= drawn.max() + 0.03  # and close above it
        here = regret(oracle.best_value(exact.weights[None]), members.values(exact.weights[None]).max(1), kind)  # type: ignore[arg-type]
        assert here[0] == pytest.approx(exact.regret)


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_regret_in_a_finite_pool_agrees_with_corners(kind: str) -> None:
    for seed in range(5):
        pool = np.random.default_rng(seed).random((12, 3)) + 0.1
        members = pool[:3]
        best: Callable[[np.ndarray], np.ndarray] = lambda users, pool=pool: (users @ pool.T).max(1)  # noqa: E731
        by_corners = worst_regret(members, best, kind).regret  # type: ignore[arg-type]
        assert worst_regret_among(members, pool, kind).regret == pytest.approx(by_corners, abs=1e-8)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- searches
@pytest.mark.parametrize("tau", [0.08, 0.04, 0.02])
def test_searches_certify_a_loss_with_few_calls(tau: float) -> None:
    """The certificate bounds the true gap; corners need fewer calls than the lazy grid, and that fewer than all."""
    grid = as_array(direct_grid(two_sided_levels(0.4, 0.0125), 3))
    for seed in range(3):
        oracle = bandit(seed)
        corner, lazy = corner_search(oracle, tau), lazy_grid(oracle, grid, tau)
        assert corner.gap <= tau
        for found in (corner, lazy):
            assert worst_regret(found.policies.net, oracle.best_value).regret <= found.gap + 1e-9
        assert corner.num_calls <= lazy.num_calls <= len(grid) + 3
        at_grid = oracle.best_value(grid) - lazy.policies.values(grid).max(1)
        assert at_grid.max() <= tau + 1e-9


def test_an_inexact_oracle_widens_the_certificate() -> None:
    oracle = bandit(0)
    pool = corner_search(oracle, 0.05).policies
    exact = certificate(pool, pool)
    assert certificate(pool, pool, error=0.1).regret == pytest.approx(exact.regret + 0.1)
    assert certificate(pool, pool, eps=0.1).regret < exact.regret


def test_a_search_can_stop_early() -> None:
    found = corner_search(bandit(0), 1e-6, max_calls=6)
    assert found.num_calls == 6 and found.gap > 1e-6


def test_a_weight_vector_is_one_call_however_often_it_is_asked_for() -> None:
    """Vertices are members, searches begin with them again, and rounding makes no new weights."""
    oracle = bandit(0)
    oracle.solve(np.concatenate([np.eye(3), np.eye(3)[1:], [[0.1 + 0.2, 0.7, 0.0], [0.3, 0.7, 0.0]]]))
    assert oracle.num_calls == 4
    oracle.solve(np.array([[0.3, 0.7, 0.0], [0.3, 0.6, 0.1]]))
    assert oracle.num_calls == 5
    found = corner_search(oracle, 1e-6, max_calls=6)
    assert found.num_calls == 6  # of its own
    portfolio = choose_portfolio(bandit(0), found.policies, 2, rounds=0)
    assert portfolio.num_calls == 0  # all of them had been solved
    with pytest.raises(ValueError, match="expected rounds >= 0, got -1"):
        choose_portfolio(bandit(0), found.policies, 2, rounds=-1)


# ---------------------------------------------------------------------- covers and portfolios
def test_exact_covers_are_smallest() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        serves = rng.random((9, 20)) < 0.3
        serves[0] |= ~serves.any(0)
        fewest = next(
            size
            for size in range(1, 10)
            if any(serves[list(rows)].any(0).all() for rows in itertools.combinations(range(9), size))
        )
        greedy, exact = greedy_cover(serves), smallest_cover(serves)
        assert len(exact) == fewest <= len(greedy) and serves[exact].any(0).all() and serves[greedy].any(0).all()
    with pytest.raises(ValueError, match="column 1"):
        greedy_cover(np.array([[True, False]]))


def test_greedy_can_need_more_than_exact() -> None:
    """The textbook trap: the largest set first costs one more."""
    serves = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 1]], dtype=bool)
    assert len(greedy_cover(serves)) == 3 and smallest_cover(serves) == [1, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_subsets_are_optimal(size: int) -> None:
    for seed in range(8):
        losses = np.random.default_rng(seed).random((10, 25))
        best = min(losses[list(rows)].min(0).max() for rows in itertools.combinations(range(10), size))
        rows, loss = best_subset(losses, size, "milp")
        assert len(rows) <= size and loss == pytest.approx(best)
        assert best <= best_subset(losses, size)[1] <= 1.5 * best


@pytest.mark.parametrize(("size", "gap"), [(2, 1.03), (3, 0.79), (4, 0.0)])
def test_the_published_pool_needs_four_policies(size: int, gap: float) -> None:
    """Multiplicative gap against the own pool at beta 0.01, at 1,001 weights and over the whole simplex."""
    pool = PolicySet(np.column_stack([PUBLISHED[:, 0], 1 - PUBLISHED[:, 0]]), PUBLISHED[:, 1:3], 0.01 * PUBLISHED[:, 3])
    first = np.linspace(0, 1, 1001)
    values = pool.values(np.column_stack([first, 1 - first]))
    losses = (1 - values / values.max(1, keepdims=True)).T
    rows, loss = best_subset(losses, size)
    assert round(100 * loss, 2) == gap
    assert best_subset(losses, size, "milp")[1] == pytest.approx(loss, abs=1e-12)
    exact = worst_regret_among(pool.net[rows], pool.net, "multiplicative").regret
    assert loss <= exact + 1e-12 and exact == pytest.approx(loss, abs=1e-4)


def test_a_portfolio_is_certified_and_improves_with_size() -> None:
    oracle, reached = bandit(0, beta=0.0, prompts=100), []
    solved = oracle.solve(as_array(combined_grid(0.4, 0.2, 3)))
    for size in (1, 2, 3, 5, 8):
        portfolio = choose_portfolio(oracle, solved, size)
        true = worst_regret(portfolio.members.net, oracle.best_value).regret
        assert len(portfolio.members.weights) <= size and true <= portfolio.certificate + 1e-9
        reached.append(portfolio.certificate)
        random = [oracle.solve(random_weights(size, 3, np.random.default_rng(seed))) for seed in range(10)]
        assert true < np.mean([worst_regret(pool.net, oracle.best_value).regret for pool in random])
    assert reached == sorted(reached, reverse=True)


# ---------------------------------------------------------------------- measures
def test_usage_and_disagreement() -> None:
    members = PolicySet(np.eye(3), np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0.1]]), np.zeros(3))
    users = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.3, 0.7, 0.0], [0.6, 0.4, 0.0]])
    member = route(members, users)
    used = usage(member, 3)
    assert member.tolist() == [0, 1, 1, 0] and used.shares.tolist() == [0.5, 0.5, 0] and used.num_dead == 1
    assert used.perplexity == pytest.approx(2.0)
    policies = np.array([[[1.0, 0], [1, 0]], [[1, 0], [0, 1]], [[0, 1], [0, 1]]])  # differ on 1, 2 and 1 of 2 prompts
    assert disagreement(policies) == pytest.approx((0.5 + 1.0 + 0.5) / 3) and disagreement(policies[:1]) == 0.0


@pytest.mark.parametrize("num", [2, 3, 4])
def test_regret_of_users_who_were_routed_by_other_prompts(num: int) -> None:
    """Against many draws of users; never less than with routing by the truth, and the same where nothing was wrong."""
    rng = np.random.default_rng(num)
    oracle = BestOfN(rng.random((30, 6, num)))
    net = oracle.measured(rng.dirichlet(np.ones(num), 5)).net
    known = net + 0.05 * rng.standard_normal(net.shape)
    users = np.concatenate([rng.dirichlet(np.ones(num), 4000), rng.dirichlet(np.full(num, 0.3), 4000), np.eye(num)])
    for kind in ("additive", "multiplicative"):
        found = worst_regret(net, oracle.best_value, kind, routed_by=known)
        served = (users * net[(users @ known.T).argmax(1)]).sum(1)
        drawn = regret(oracle.best_value(users), served, kind).max()
        assert drawn - 1e-9 <= found.regret < drawn + 0.02
        true = worst_regret(net, oracle.best_value, kind)
        assert found.regret >= true.regret - 1e-9
        assert worst_regret(net, oracle.best_value, kind, routed_by=net).regret == pytest.approx(true.regret, abs=1e-6)
