"""PReF against arithmetic by hand, singular values, and planted users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plm.functional import expected_losses
from plm.methods.pref import PReF, leading_directions
from plm.testing import PlantedData
from plm.types import Context
from tests.parity.planted_rivals import accuracies, fitted, opposite_users

DIM, WIDTH = 5, 2


def method(**options: Any) -> PReF:
    torch.manual_seed(0)
    found = PReF(3, DIM, **{"num_features": WIDTH, "conditioning": "none", **options}).double()
    found.bradley_terry.normal_()
    return found.eval()


def context(users: int = 3, pairs: int = 6) -> Context:
    draw = torch.Generator().manual_seed(2)
    chosen, rejected = (torch.randn(users, pairs, DIM, generator=draw, dtype=torch.float64) for _ in range(2))
    return Context(chosen, rejected, torch.ones(users, pairs).bool(), torch.ones(users, pairs, dtype=torch.float64))


def scores(model: PReF, support: Context) -> Tensor:
    return model.score(torch.ones(3, DIM, dtype=torch.float64), model.adapt(support)).detach()


@pytest.mark.parametrize(("margin", "weight"), [(1.0, 0.401058), (2.0, 0.521298)])
def test_one_pair_by_hand(margin: float, weight: float) -> None:
    """With one base the weight solves ``w = margin * sigmoid(-margin * w)``."""
    model = PReF(1, 1, num_features=1, mean="zero", conditioning="none").double()
    with torch.no_grad():
        model.bases.fill_(1.0)
    ones = torch.ones(1, 1, dtype=torch.float64)
    pair = Context(torch.full((1, 1, 1), margin).double(), torch.zeros(1, 1, 1).double(), ones.bool(), ones)
    state = model.eval().adapt(pair).tensors
    assert state["weights"].item() == pytest.approx(weight, abs=1e-6)
    chance = torch.sigmoid(torch.tensor(margin * weight)).item()
    assert state["precision"].item() == pytest.approx(1 + margin**2 * chance * (1 - chance), abs=1e-6)


def test_turning_the_bases_turns_the_weights() -> None:
    """``F -> F M``, ``w -> M' w`` for a rotation M, which leaves the prior alone: the same rewards."""
    model, other, support = method(), method(), context()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    with torch.no_grad():
        other.bases.copy_(model.bases @ turn)
    first, second = (one.adapt(support).tensors["weights"] for one in (model, other))
    assert torch.allclose(second, first @ turn, atol=1e-8)
    assert torch.allclose(scores(model, support), scores(other, support), atol=1e-8)


def test_reversed_labels_reverse_the_user_where_the_prior_is_around_zero() -> None:
    for mean in ("zero", "population"):
        model, support = method(mean=mean), context()
        reverse = support._replace(chosen=support.rejected, rejected=support.chosen)
        own, other = (model.adapt(one).tensors["weights"] for one in (support, reverse))
        assert torch.allclose(own, -other, atol=1e-8) == (mean == "zero")


def test_nobody_is_the_population_and_a_new_user_of_the_published_prior_wants_nothing() -> None:
    model, support = method(), context()
    empty = support._replace(mask=torch.zeros(3, 6).bool())
    population = model.population_state(3)
    assert all(torch.equal(model.adapt(empty).tensors[name], value) for name, value in population.tensors.items())
    responses = support.features[0][:, 0]
    assert torch.equal(model.score(responses, population), responses @ model.bradley_terry)
    assert not method(mean="zero").score(responses, population).any()


def test_directions_are_the_singular_vectors() -> None:
    """Of centred rows weighted by pairs, against ``torch.linalg.svd``; what all users share is no direction."""
    draw = torch.Generator().manual_seed(0)
    steps, count = torch.randn(9, DIM, generator=draw) + 10, torch.randint(1, 20, (9,), generator=draw).float()
    weight = count / count.sum()
    centred = (steps - weight @ steps) * weight.sqrt()[:, None]
    expected = torch.linalg.svd(centred).Vh[:WIDTH].T
    found = leading_directions(steps, count, WIDTH)
    assert torch.allclose((found * expected).sum(0).abs(), torch.ones(WIDTH), atol=1e-4)


def test_the_loss_is_the_expected_one_under_the_posteriors() -> None:
    data = PlantedData(3, 2, feature_dim=DIM)
    batch = data.train_batch
    batch = batch._replace(chosen=batch.features[0].double(), rejected=batch.features[1].double())
    batch = batch._replace(weight=batch.weight.double())
    model = method(ridge=2.0)
    model.num_train_pairs = batch.num_pairs
    size = batch.num_pairs // 3
    ones = torch.ones(3, size, dtype=torch.float64)
    support = Context(*(side.view(3, size, DIM) for side in batch.features), ones.bool(), ones)
    state = model.adapt(support).tensors
    design, offset = model._read(batch.difference)
    margin = offset + (design * state["weights"][batch.user_index]).sum(-1)
    losses = expected_losses(margin, design, torch.ones(3 * size).double(), state["precision"], batch.user_index)
    expected = losses.mean() + model.bases.square().sum() / batch.num_pairs
    assert model.loss(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def overlap(model: PReF, data: PlantedData) -> float:
    """Mean squared cosine of the principal angles between bases and planted subspace."""
    learned = torch.linalg.qr(model.bases.detach()).Q
    return float(torch.linalg.svdvals(learned.T @ data.basis).square().mean())


def test_singular_vectors_are_a_better_start(tmp_path: Path) -> None:
    """Planted rank 3 of 16: after three steps most of the subspace, from random bases about three sixteenths."""
    data = PlantedData(80, 4, pairs_per_user=60, feature_dim=16, rank=3)
    found = {}
    for init in ("svd", "random"):
        torch.manual_seed(1)  # the data are drawn with 0
        model = fitted(PReF(80, 16, num_features=3, init=init, lr=0.01), data, tmp_path, 3)  # type: ignore[arg-type]
        found[init] = overlap(model, data)
    assert found["svd"] > 0.9 and found["random"] < 0.5, found


def test_users_of_opposite_tastes_are_told_apart(tmp_path: Path) -> None:
    data = opposite_users(num_shots=20)
    torch.manual_seed(0)
    model = fitted(PReF(data.num_users, data.feature_dim, num_features=2), data, tmp_path, 30)
    accuracy = accuracies(model, data.unseen_batch)
    assert accuracy["margin"] > 0.85 and accuracy["flipped_margin"] < 0.15, accuracy
    assert abs(accuracy["population_margin"] - 0.5) < 0.08, accuracy


def test_shuffled_users_are_the_population(tmp_path: Path) -> None:
    data = PlantedData(60, 20, shuffle_users=True)
    torch.manual_seed(0)
    model = fitted(PReF(60, 8, num_features=3), data, tmp_path, 30)
    facts = model.evaluate(data.unseen_batch)
    assert model.report()["scale"] == 0.0
    assert torch.equal(facts["margin"], facts["population_margin"])


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"model\.mean: expected one of population, zero, got 'learned'"):
        PReF(1, 2, mean="learned")  # type: ignore[arg-type]
