"""UserEmbedding against SciPy and automatic differentiation, and planted users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from plm.methods.user_embedding import UserEmbedding
from plm.testing import PlantedData
from plm.types import Context
from tests.parity.planted_rivals import accuracies, fitted, opposite_users

DIM, WIDTH = 4, 3


def method(**options: Any) -> UserEmbedding:
    torch.manual_seed(0)
    found = UserEmbedding(3, DIM, embedding_dim=WIDTH, hidden_dim=5, prior_scale=0.5, **options).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_()
        found.bradley_terry.normal_()
        found.feature_scale.fill_(1.5)
        found.scale.fill_(0.8)
    found.num_train_pairs = 1
    return found.eval()


def context(users: int = 3, pairs: int = 6) -> Context:
    draw = torch.Generator().manual_seed(2)
    chosen, rejected = (torch.randn(users, pairs, DIM, generator=draw, dtype=torch.float64) for _ in range(2))
    tie = torch.arange(users * pairs).view(users, pairs) % 5 == 0
    ones = torch.ones(users, pairs, dtype=torch.float64)
    return Context(chosen, rejected, ones.bool(), ones, tie=tie)


@pytest.mark.parametrize("residual", [True, False])
def test_the_reward_is_the_formula(residual: bool) -> None:
    """``w0 @ x + (out + F e) @ tanh(P x / scale + bias)``, vector by vector."""
    model, responses = method(residual=residual), context().features[0][:, 0]
    state = model.adapt(context())
    hidden, bias, out, mixing = (getattr(model, name).detach().numpy() for name in ("hidden", "bias", "out", "mixing"))
    expected = [
        residual * x @ model.bradley_terry.numpy() + np.tanh(x @ hidden / 1.5 + bias) @ (out + mixing @ vector)
        for x, vector in zip(responses.numpy(), state.tensors["weights"].numpy(), strict=True)
    ]
    assert model.score(responses, state).detach().numpy() == pytest.approx(np.array(expected), abs=1e-12)


def test_a_new_user_is_the_mode_of_the_posterior() -> None:
    """SciPy's minimum of the negative log posterior, with ties, and its Hessian there by autograd."""
    model, support = method(), context()
    state = model.adapt(support).tensors
    for row in range(3):
        with torch.no_grad():
            personal, generic = model._differences(support.features[0][row], support.features[1][row])
        assert support.tie is not None
        target = torch.where(support.tie[row], 0.5, 1.0)

        def objective(vector: Tensor, pairs: tuple[Tensor, ...] = (generic, personal, target)) -> Tensor:
            margin = pairs[0] + pairs[1] @ vector
            losses = torch.nn.functional.softplus(-margin) + (1 - pairs[2]) * margin
            return losses.sum() + vector.square().sum() / (2 * 0.4**2)

        found = minimize(lambda value: objective(torch.tensor(value)).item(), np.zeros(WIDTH), tol=1e-12)
        assert state["weights"][row].numpy() == pytest.approx(found.x, abs=1e-4)
        hessian = torch.autograd.functional.hessian(objective, state["weights"][row])
        assert torch.allclose(state["precision"][row], hessian, atol=1e-6)


def test_a_user_without_pairs_is_the_generic_one_bit_for_bit() -> None:
    model, support = method(), context()
    empty = support._replace(mask=torch.zeros(3, 6).bool())
    responses = support.features[0][:, 0]
    assert torch.equal(model.score(responses, model.adapt(empty)), model.score(responses, model.population_state(3)))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_vectors_learn_from_the_share_of_users(share: float) -> None:
    """At share 0 no vector has a gradient; at 1/2 the loss is half of each part, with the prior by user."""
    model, data = method(user_share=share, ridge=0.0), PlantedData(3, 2, feature_dim=DIM)
    batch = data.train_batch
    batch = batch._replace(chosen=batch.features[0].double(), rejected=batch.features[1].double())
    found = model.train().loss(batch._replace(weight=batch.weight.double()))
    (gradient,) = torch.autograd.grad(found["loss"], model.vectors)
    assert bool(gradient.any()) == (share > 0)
    personal, generic = model._differences(*batch.features)
    own = torch.nn.functional.softplus(-(generic + (personal * model.vectors[batch.user_index]).sum(-1))).mean()
    of_generic = torch.nn.functional.softplus(-generic).mean()
    prior = model.vectors.square().sum() / (2 * 0.5**2 * batch.num_pairs)
    assert torch.allclose(found["loss"], share * (own + prior) + (1 - share) * of_generic)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"model\.user_share: expected a share in \[0, 1\], got 1\.5"):
        UserEmbedding(1, 2, user_share=1.5)


def test_users_of_opposite_tastes_are_told_apart(tmp_path: Path) -> None:
    data = opposite_users(num_shots=20)
    torch.manual_seed(0)
    model = UserEmbedding(data.num_users, data.feature_dim, embedding_dim=4, hidden_dim=16, prior_scale=0.3, lr=0.1)
    accuracy = accuracies(fitted(model, data, tmp_path, 60), data.unseen_batch)
    assert accuracy["margin"] > 0.85 and accuracy["flipped_margin"] < 0.15, accuracy
    assert abs(accuracy["population_margin"] - 0.5) < 0.08, accuracy


def test_shuffled_users_are_the_generic_one(tmp_path: Path) -> None:
    data = PlantedData(60, 20, shuffle_users=True)
    torch.manual_seed(0)
    model = fitted(UserEmbedding(60, 8, embedding_dim=4, hidden_dim=16, prior_scale=0.3, lr=0.1), data, tmp_path, 60)
    assert model.report()["scale"] == 0.0
    facts = model.evaluate(data.unseen_batch)
    assert torch.equal(facts["margin"], facts["population_margin"])
