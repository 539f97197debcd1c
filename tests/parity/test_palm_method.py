"""PALM as a method: routing, certificates and cold start against NumPy, and training on planted users."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from plm.methods.palm import PALM
from plm.methods.palm.oracle import BestOfN
from plm.methods.palm.search import certificate, upper_bound, upper_planes, worst_regret
from plm.methods.palm.selection import Portfolio, build_portfolio
from plm.testing import PlantedData, quiet_trainer
from plm.types import Context

RNG = np.random.default_rng(0)
REWARDS = RNG.random((60, 8, 3))
USERS = RNG.dirichlet(np.ones(3), 40)


@pytest.fixture(scope="module")
def portfolio() -> Portfolio:
    return build_portfolio(BestOfN(REWARDS), size=4, delta=0.02)


@pytest.fixture
def served(portfolio: Portfolio) -> PALM:
    """Features are the three rewards themselves; forty users with given weights."""
    method = PALM(len(USERS), 3, num_objectives=3, size=4)
    method.install(portfolio, torch.as_tensor(USERS).float(), torch.eye(3))
    return method.eval()


def test_users_are_routed_to_their_best_member_with_a_certificate(served: PALM, portfolio: Portfolio) -> None:
    state = served.user_states(torch.arange(len(USERS)))
    values = USERS @ portfolio.members.net.T
    assert state.tensors["member"].tolist() == values.argmax(1).tolist()
    solved = portfolio.solved
    planes = upper_planes(solved.weights, solved.values(solved.weights).max(1))
    expected = upper_bound(USERS, planes) - values.max(1)
    assert state.tensors["regret"].numpy() == pytest.approx(expected, abs=1e-5)
    true = BestOfN(REWARDS).best_value(USERS) - values.max(1)
    assert (true <= expected + 1e-9).all() and expected.max() <= portfolio.certificate + 1e-9
    assert portfolio.certificate == pytest.approx(certificate(portfolio.members, solved).regret)


def test_strangers_get_the_minimax_member(served: PALM, portfolio: Portfolio) -> None:
    state = served.population_state(2)
    best_value = BestOfN(REWARDS).best_value
    alone = [worst_regret(portfolio.members.net[[row]], best_value).regret for row in range(4)]
    assert state.tensors["member"].tolist() == [int(np.argmin(alone))] * 2
    assert state.tensors["regret"].tolist() == pytest.approx([min(alone)] * 2, abs=1e-5)
    assert torch.allclose(state.tensors["weights"][0], torch.as_tensor(USERS.mean(0)).float())


def test_the_reward_is_that_of_the_member(served: PALM, portfolio: Portfolio) -> None:
    responses = torch.as_tensor(REWARDS[:40, 0]).float()
    state = served.user_states(torch.arange(40))
    made_for = portfolio.members.weights[state.tensors["member"].numpy()]
    assert served.score(responses, state).detach().numpy() == pytest.approx(
        (REWARDS[:40, 0] * made_for).sum(1), abs=1e-6
    )


def test_users_are_inferred_from_pairs(served: PALM) -> None:
    """With many pairs the weights come near and nearly all users reach the member of their true weights."""
    generator = np.random.default_rng(1)
    pairs = generator.standard_normal((len(USERS), 400, 2, 3)) * 4
    margin = np.einsum("usr,ur->us", pairs[:, :, 0] - pairs[:, :, 1], USERS)
    swap = generator.random(margin.shape) > 1 / (1 + np.exp(-margin))
    pairs[swap] = pairs[swap][:, ::-1]
    chosen, rejected = (torch.as_tensor(pairs[:, :, side]).float() for side in (0, 1))
    served.prior_precision = 0.0
    state = served.adapt(Context(chosen, rejected, torch.ones(len(USERS), 400).bool(), torch.ones(len(USERS), 400)))
    error = np.abs(state.tensors["weights"].numpy() - USERS).max(1)
    assert np.median(error) < 0.05 and torch.linalg.eigvalsh(state.tensors["precision"]).min() > 0
    right = (state.tensors["member"] == served.user_states(torch.arange(len(USERS))).tensors["member"]).float().mean()
    assert right >= 0.85


def test_training_finds_objectives_and_a_portfolio() -> None:
    """Planted users who disagree: routed members beat one member for all; one member for all is no better."""
    data = PlantedData(60, pairs_per_user=60, spread=1.5, seed=3)
    gains = {}
    for size in (1, 4):
        torch.manual_seed(0)
        method = PALM(60, data.feature_dim, num_objectives=4, size=size)
        quiet_trainer(".", max_epochs=60, check_val_every_n_epoch=60).fit(method, datamodule=data)
        method.trainer = None
        assert len(method.member_weights) <= size
        with torch.no_grad():
            facts: dict[str, Any] = method.eval().evaluate(data.unseen_batch)
        right = {name: (facts[name] > 0).float().mean().item() for name in ("margin", "population_margin")}
        gains[size] = right["margin"] - right["population_margin"]
    assert gains[1] == 0.0 and gains[4] > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_objectives": 7}, "2 to 6"),
        ({"size": 0}, "at least one member"),
        ({"delta": 0.0}, "a loss > 0"),
        ({"lr": 0.0}, "model.lr: expected a finite number > 0, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PALM(2, 3, **options)
