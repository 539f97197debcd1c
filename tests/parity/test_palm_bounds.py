"""Lemma 3.2 and the composition of errors: on random problems without a violation, and on a tight example."""

from __future__ import annotations

import numpy as np
import pytest

from plm.methods.palm.bounds import Slack, cell_for, cell_loss, composed
from plm.methods.palm.grid import random_weights
from plm.methods.palm.oracle import BestOfN
from tests.parity.palm_references import best_of_n_cost, route_to_grid

DRAWS = 10_000


def bandit(seed: int, beta: float, num: int = 3, prompts: int = 8, candidates: int = 6) -> BestOfN:
    return BestOfN(np.random.default_rng(seed).random((prompts, candidates, num)), beta)


def in_cells(rng: np.random.Generator, count: int, num: int, cell: Slack) -> tuple[np.ndarray, np.ndarray]:
    """Weights and users in their cells, from very near to as far as allowed."""
    users = np.concatenate([rng.dirichlet(np.full(num, a), count) for a in (1.0, 0.3)])
    moved = users + (cell.eps * users + cell.delta) * rng.uniform(-1, 1, users.shape)
    moved = np.clip(moved, 0, None)
    some = moved.sum(1) > 0
    moved, users = moved[some] / moved[some].sum(1, keepdims=True), users[some]
    kept = (np.abs(moved - users) <= cell.eps * users + cell.delta).all(1)
    return moved[kept][:count], users[kept][:count]


def test_the_lemma_holds() -> None:
    """Loss of the policy for w at a user in the cell of w, for closed-form optima with and without KL penalty."""
    total, used = 0, []
    for seed, beta in enumerate((0.0, 0.05, 0.2, 1.0, 0.0, 0.1)):
        oracle = bandit(seed, beta)
        for cell in (Slack(0.4, 0.2), Slack(0.4, 0.0125), Slack(0.1, 0.05), Slack(1.0, 0.02)):
            weights, users = in_cells(np.random.default_rng(seed), 500, 3, cell)
            best, pool = oracle.best_value(users), oracle.solve(weights)
            served = np.einsum("vr,vr->v", users, pool.net)
            for tight in (True, False):
                loss = cell_loss(cell, oracle.max_reward, oracle.max_cost, tight)
                assert (served >= (1 - loss.eps) * best - loss.delta - 1e-9).all()
                used.append(((best - served) / (loss.eps * best + loss.delta)).max())
            total += len(users)
    assert total >= DRAWS and 0 < max(used) < 1


def test_composition_holds() -> None:
    """A worse policy for w, as from an inexact oracle, a pruned pool or a misjudged user."""
    total = 0
    for seed, beta in enumerate((0.0, 0.1, 0.5, 0.0, 0.05)):
        rng, oracle = np.random.default_rng(seed), bandit(seed, beta)
        for cell in (Slack(0.4, 0.1), Slack(0.2, 0.05), Slack(0.05, 0.2), Slack(0.8, 0.01)):
            weights, users = in_cells(rng, 600, 3, cell)
            worse = oracle.solve(random_weights(len(weights), 3, rng))
            own = np.einsum("vr,vr->v", weights, worse.net)
            best = oracle.best_value(weights)
            alpha = rng.uniform(0, 0.5, len(weights))
            gamma = np.clip((1 - alpha) * best - own, 0, None)
            served, best = np.einsum("vr,vr->v", users, worse.net), oracle.best_value(users)
            for row in range(len(users)):
                error = Slack(float(alpha[row]), float(gamma[row]))
                for tight in (True, False):
                    loss = composed(cell, error, oracle.max_reward, oracle.max_cost, tight)
                    assert served[row] >= (1 - loss.eps) * best[row] - loss.delta - 1e-9
            total += len(users)
    assert total >= DRAWS


def test_errors_add_up_by_hand() -> None:
    """``1 - (1 - alpha)(1 - 2 eps)``, ``2 (eps f_max + delta R_max) + gamma``; the same with tight constants."""
    cell, error = Slack(0.25, 0.1), Slack(0.2, 0.3)
    assert composed(cell, error, max_reward=2.0, max_cost=0.5) == pytest.approx((1 - 0.8 * 0.5, 0.65 + 0.3))
    tight = composed(cell, error, max_reward=2.0, max_cost=0.5, tight=True)
    assert tight == pytest.approx((1 - 0.8 * 0.75 / 1.25, 0.65 / 1.25 + 0.3))
    assert composed(Slack(0.0, 0.0), error, max_reward=2.0) == pytest.approx(error)


@pytest.mark.parametrize("t", [0.01, 0.05, 0.1])
def test_four_objectives_need_the_bound_on_the_sum_of_rewards(t: float) -> None:
    """With A = (1, 1, 0, 0) and B = (0, 0, 1, 1) the oracle may answer A at the centre; 4 t are lost at v."""
    user = np.array([0.25 - t, 0.25 - t, 0.25 + t, 0.25 + t])
    one, two = np.array([1.0, 1, 0, 0]), np.array([0.0, 0, 1, 1])
    lost = user @ two - user @ one
    assert lost == pytest.approx(4 * t)
    assert lost == pytest.approx(cell_loss(Slack(0.0, t), max_reward=2.0).delta)
    assert lost > cell_loss(Slack(0.0, t), max_reward=1.0).delta


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("target", [Slack(0.4, 0.3), Slack(0.9, 1.5), Slack(0.2, 0.2)])
def test_the_grid_for_a_target_reaches_it(beta: float, target: Slack) -> None:
    oracle = bandit(3, beta)
    cell = cell_for(target, oracle.max_reward, oracle.max_cost)
    promised = cell_loss(cell, oracle.max_reward, oracle.max_cost, tight=False)
    assert promised.eps <= target.eps + 1e-12 and promised.delta <= target.delta + 1e-12
    users = random_weights(500, 3, np.random.default_rng(0))
    pool = oracle.solve(route_to_grid(users, round(cell.eps, 6), round(cell.delta, 6)))
    served = np.einsum("vr,vr->v", users, pool.net)
    assert (served >= (1 - target.eps) * oracle.best_value(users) - target.delta).all()


def test_numbers_of_the_published_setting() -> None:
    assert cell_loss(Slack(0.4, 0.2), 1.18, 0.061, tight=False) == pytest.approx((0.8, 0.5208))
    assert cell_loss(Slack(0.4, 0.2), 1.0) == pytest.approx((1 - 0.6 / 1.4, 0.4 / 1.4))
    assert cell_for(Slack(0.4, 0.4), 2.0) == pytest.approx((0.2, 0.1))
    assert cell_for(Slack(0.4, 0.4), 2.0, 1.0) == pytest.approx((0.1, 0.05))
    assert best_of_n_cost(2, 1.0) == pytest.approx(np.log(2) - 0.5)
    with pytest.raises(ValueError, match="delta > 0"):
        cell_for(Slack(0.4, 0.0), 1.0)
