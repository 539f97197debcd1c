"""MRM against arithmetic by hand, automatic and finite differences, and planted users."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plm.functional import PairList
from plm.method.episodes import draw_episodes
from plm.methods.mrm import MRM, robust_weights, user_losses, weight_gradients
from plm.testing import PlantedData
from plm.types import Context, PreferenceBatch
from tests.groups import method_options
from tests.parity.planted_rivals import accuracies, fitted, opposite_users

DIM = 4


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def objective(losses: Tensor, temperature: float, worst: float = 0.5) -> float:
    return float((robust_weights(losses, worst, temperature) * losses).sum())


def method(seed: int = 0, **options: Any) -> MRM:
    torch.manual_seed(seed)
    found = MRM(3, DIM, **{"num_bases": 3, **options}).double()
    with torch.no_grad():
        found.start.normal_()
        found.bradley_terry.normal_()
    found.num_train_pairs = 1
    return found.eval()


def context(users: int = 3, pairs: int = 5) -> Context:
    draw = torch.Generator().manual_seed(2)
    chosen, rejected = (torch.randn(users, pairs, DIM, generator=draw, dtype=torch.float64) for _ in range(2))
    return Context(chosen, rejected, torch.ones(users, pairs).bool(), torch.ones(users, pairs, dtype=torch.float64))


# ---------------------------------------------------------------------- the robust objective
def test_the_objective_stresses_the_worse_half() -> None:
    """tau is the mean of (0.5, 0.9), 0.7: sigmoid(-0.4) 0.5 + sigmoid(0.4) 0.9; hard, the worse one counts alone."""
    assert robust_weights(numbers(0.5, 0.9), 0.5, 0.5).tolist() == pytest.approx([0.40131, 0.59869], abs=1e-5)
    assert objective(numbers(0.5, 0.9), 0.5) == pytest.approx(0.73948, abs=1e-5)
    assert objective(numbers(0.5, 0.9), 0.0) == pytest.approx(0.9)
    four = robust_weights(numbers(1, 2, 3, 4), 0.5, 0.5)
    assert four.tolist() == pytest.approx([0.04743, 0.26894, 0.73106, 0.95257], abs=1e-5)
    assert objective(numbers(1, 2, 3, 4), 0.5) == pytest.approx(6.58878, abs=1e-5)
    assert objective(numbers(1, 2, 3, 4), 0.0) == pytest.approx(7.0)


def test_all_users_count_half_at_least_where_all_are_the_worst() -> None:
    assert robust_weights(numbers(0.2, 1.0, 3.0), 1.0, 0.5).min() == 0.5


# ---------------------------------------------------------------------- the step
def one_pair(**options: Any) -> Tensor:
    """Weights of a user after a step on one pair with the margins (1, -1), from equal logits."""
    model = MRM(1, 2, num_bases=2, inner_steps=1, simplex=True, residual=False, temperature=1.0, **options).double()
    with torch.no_grad():
        model.bases.copy_(torch.eye(2))
        model.start.zero_()
    pair = Context(*torch.tensor([[[[1.0, -1.0]]], [[[0.0, 0.0]]]]).double(), torch.ones(1, 1).bool(), torch.ones(1, 1))
    model.conditioning.reset()
    return torch.softmax(model.eval()._adapt(pair._replace(weight=pair.weight.double())).tensors["logits"], -1)[0]


def test_a_step_by_hand() -> None:
    """Gradient (-1/4, 1/4): weights sigmoid(1/2) and sigmoid(-1/2); the published step moves 0.0005, whatever it is."""
    assert one_pair().tolist() == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))], abs=1e-9)
    assert one_pair(inner="adam_sign", inner_lr=1e-3).tolist() == pytest.approx([0.5005, 0.4995], abs=1e-7)


@pytest.mark.parametrize("options", [{}, {"simplex": True}, {"simplex": True, "residual": False}])
def test_a_step_is_autograds(options: dict[str, Any]) -> None:
    """One step of gradient descent on each user's mean loss in the logits, and nothing more, with several users."""
    model, support = method(inner_steps=1, inner_lr=0.7, **options), context()
    logits = model.start.detach().repeat(3, 1).requires_grad_()
    margins = []
    for row in range(3):
        along, offset = model._along_bases(support.difference[row])
        margins.append(along.detach() @ model._weights(logits)[row] + offset)
    loss = torch.nn.functional.softplus(-torch.stack(margins)).mean(-1).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(model._adapt(support).tensors["logits"], logits - 0.7 * gradient, atol=1e-9)


def test_gradients_and_losses_of_users_are_those_of_autograd() -> None:
    draw = torch.Generator().manual_seed(0)
    design, offset = (torch.randn(9, width, generator=draw, dtype=torch.float64) for width in (3, 1))
    target, weight = torch.ones(9, dtype=torch.float64), torch.rand(9, generator=draw, dtype=torch.float64)
    target[4] = 0.5
    pairs = PairList(design, offset[:, 0], target, weight, torch.tensor([0, 0, 2, 2, 2, 2, 0, 2, 0]), 3)
    weights = torch.randn(3, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(user_losses(pairs, weights).sum(), weights)
    assert torch.allclose(weight_gradients(pairs, weights), expected, atol=1e-12)
    assert not expected[1].any()


def test_repeating_every_pair_changes_no_step() -> None:
    model, support = method(), context()
    twice = Context(*(torch.cat([value, value], 1) for value in support[:4]))  # type: ignore[arg-type]
    assert torch.allclose(model.adapt(support).tensors["logits"], model.adapt(twice).tensors["logits"], atol=1e-12)


def test_nobody_moves_without_pairs() -> None:
    model, support = method(), context()
    empty = support._replace(mask=torch.zeros(3, 5).bool())
    assert torch.equal(model.adapt(empty).tensors["logits"], model.population_state(3).tensors["logits"])


def test_one_base_on_the_simplex_is_one_reward_for_everybody() -> None:
    model, support = method(num_bases=1, simplex=True), context()
    responses = support.features[0][:, 0]
    assert torch.equal(model.score(responses, model.adapt(support)), model.score(responses, model.population_state(3)))


def test_the_order_of_the_bases_changes_nothing() -> None:
    model, other, support, order = method(), method(), context(), [2, 0, 1]
    with torch.no_grad():
        for name in ("start", "log_steps"):
            getattr(model, name).copy_(torch.arange(3) / 3)
            getattr(other, name).copy_(torch.arange(3)[order] / 3)
        other.bases.copy_(model.bases[:, order])
    responses = support.features[0][:, 0]
    scores = [one.score(responses, one.adapt(support)) for one in (model, other)]
    assert torch.allclose(*scores, atol=1e-12)


def test_the_meta_gradient_is_the_slope() -> None:
    """Of bases, shared weights and step sizes, through the steps, against central differences."""
    data = PlantedData(6, 2, feature_dim=DIM)
    batch = data.train_batch._replace(
        **{name: getattr(data.train_batch, name).double() for name in ("chosen", "rejected", "weight")}
    )
    model = method(simplex=True, inner_lr=3.0).train()

    def loss() -> Tensor:
        torch.manual_seed(5)  # the same episodes
        return model.loss(batch)["loss"]

    parameters = [model.bases, model.start, model.log_steps]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
        flat = parameter.detach().view(-1)
        for place in (0, len(flat) - 1):
            values = []
            for sign in (1, -1):
                flat[place] += sign * 1e-5
                values.append(loss().item())
                flat[place] -= sign * 1e-5
            slope = (values[0] - values[1]) / 2e-5
            assert gradient.view(-1)[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_the_loss_is_the_robust_mean_over_users_with_a_query_pair() -> None:
    """User by user: steps on the support, mean loss of the query, the worse stressed; plus the prior of the bases."""
    data = PlantedData(6, 2, feature_dim=DIM)
    batch = data.train_batch._replace(
        **{name: getattr(data.train_batch, name).double() for name in ("chosen", "rejected")},
        weight=torch.linspace(0.5, 2, data.train_batch.num_pairs).double(),
    )
    model = method(ridge=2.0)
    model.num_train_pairs = 50
    ordered, user, nodes = model._arranged(batch)
    torch.manual_seed(5)
    support, query = draw_episodes(user, nodes, "response", 0, 64, 64)
    torch.manual_seed(5)
    out = model.loss(batch)
    losses = []
    for person in range(6):
        read, held = support[user[support] == person], query[user[query] == person]
        if not len(held):
            continue
        logits = model.start
        if len(read):
            ones = torch.ones(1, len(read)).bool()
            pairs = Context(ordered.chosen[read][None], ordered.rejected[read][None], ones, ordered.weight[read][None])
            logits = model._adapt(pairs).tensors["logits"][0]
        margin = ordered.difference[held] @ (model.bases @ logits / model.feature_scale + model.bradley_terry)
        weight = ordered.weight[held]
        losses.append((weight * torch.nn.functional.softplus(-margin)).sum() / weight.sum())
    each = torch.stack(losses)
    expected = (torch.sigmoid((each - each.median().lerp(each.sort().values[len(each) // 2], 0.5)) / 0.5) * each).mean()
    assert len(losses) == 6
    assert out["loss"].item() == pytest.approx((expected + model.bases.square().sum() / 50).item(), abs=1e-9)
    assert out["count"].item() == 6


def test_without_query_pairs_every_parameter_keeps_its_place_in_the_graph() -> None:
    """Pairs that all share a response are one piece, here support or query; processes wait for all gradients."""
    model = method().train()
    response = torch.ones(4, DIM).double()
    others = torch.randn(4, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = PreferenceBatch(response, others, torch.zeros(4).long(), torch.ones(4).double(), torch.zeros(4).bool())
    counts = set()
    for seed in range(20):
        torch.manual_seed(seed)
        out = model.loss(batch)
        model.zero_grad()
        out["loss"].backward()
        counts.add(out["count"].item())
        assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
        assert out["count"].item() > 0 or not model.start.grad.any()  # type: ignore[union-attr]
    assert counts == {0.0, 1.0}


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"model\.worst: expected a share in \(0, 1\], got 0"):
        MRM(1, 2, worst=0.0)
    with pytest.raises(ValueError, match=r"model\.inner: expected one of sgd, adam_sign, got 'newton'"):
        MRM(1, 2, inner="newton")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- planted users
@pytest.mark.parametrize(("simplex", "inner_lr"), [(False, 1.0), (True, 30.0)])
def test_users_of_opposite_tastes_are_told_apart(simplex: bool, inner_lr: float, tmp_path: Path) -> None:
    data = opposite_users(num_shots=20)
    torch.manual_seed(0)
    model = MRM(data.num_users, data.feature_dim, num_bases=3, simplex=simplex, inner_lr=inner_lr, lr=0.1)
    accuracy = accuracies(fitted(model, data, tmp_path, 40), data.unseen_batch)
    assert accuracy["margin"] > 0.85 and accuracy["flipped_margin"] < 0.15, accuracy
    assert abs(accuracy["population_margin"] - 0.5) < 0.08, accuracy


def test_the_published_step_tells_nobody_apart(tmp_path: Path) -> None:
    """Weights move by 0.0005, so that no order changes; the docs say so."""
    data = opposite_users(num_shots=20)
    torch.manual_seed(0)
    model = fitted(MRM(data.num_users, data.feature_dim, **method_options("mrm_paper")), data, tmp_path, 40)
    accuracy = accuracies(model, data.unseen_batch)
    assert abs(accuracy["margin"] - accuracy["population_margin"]) < 0.02, accuracy
    assert model.report()["moved"] == pytest.approx(0.0005, abs=5e-5)


def test_shuffled_users_do_not_move(tmp_path: Path) -> None:
    data = PlantedData(60, 20, shuffle_users=True)
    torch.manual_seed(0)
    model = fitted(MRM(60, 8, num_bases=3, lr=0.1), data, tmp_path, 40)
    assert model.report()["scale"] == 0.0
