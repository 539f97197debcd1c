"""DPL against numbers by hand, and worlds in which people disagree about half of the items."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plm.methods.dpl import DPL, categorical_chances, categorical_quantile, normal_chances
from plm.testing import PlantedData
from plm.types import PreferenceBatch
from tests.parity.planted_rivals import fitted

DIM = 4


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def method(kind: str, **options: Any) -> DPL:
    torch.manual_seed(0)
    found = DPL(2, DIM, kind=kind, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        found.heads.normal_()
    found.num_train_pairs = 1
    return found.eval()


def responses(seed: int = 1, count: int = 20) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_chances_on_atoms_by_hand() -> None:
    """0.3 * 0.5 + 0.5 * 0.8 + (0.1 + 0.09 + 0.1) / 2 = 0.695, and 0.305 the other way round."""
    p, q = numbers(0.2, 0.3, 0.5)[None], numbers(0.5, 0.3, 0.2)[None]
    chances = categorical_chances(p, q)
    assert chances.wins.exp().item() == pytest.approx(0.695)
    assert chances.loses.exp().item() == pytest.approx(0.305)
    assert -chances.wins.item() == pytest.approx(0.36384, abs=1e-5)


def test_certain_utilities_are_compared_with_certainty() -> None:
    """One atom each: 0, 1/2 or 1, and a finite loss."""
    atoms = torch.eye(3, dtype=torch.float64)
    wins = categorical_chances(atoms[[0, 1, 2]], atoms[[1, 1, 1]]).wins
    assert wins.exp().tolist() == pytest.approx([0, 0.5, 1], abs=2e-6) and wins.isfinite().all()


def test_normal_chances_by_hand() -> None:
    """Phi(1 / sqrt(2)) = 0.76025, where the code's logistic function of slope sqrt(2 pi) gives 0.85476."""
    one, zero = numbers(1), numbers(0)
    wins = normal_chances(one, one, zero, one).wins.exp().item()
    assert wins == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=1e-12) == pytest.approx(0.76025, abs=1e-5)
    assert wins != pytest.approx(1 / (1 + math.exp(-math.sqrt(2 * math.pi) / math.sqrt(2))), abs=0.05)


def test_only_ratios_of_means_and_spreads_are_seen() -> None:
    mean, spread, other, wide = numbers(1, -2), numbers(0.5, 1), numbers(0, 3), numbers(2, 0.1)
    first = normal_chances(mean, spread, other, wide).wins
    assert torch.allclose(first, normal_chances(3 * mean + 7, 3 * spread, 3 * other + 7, 3 * wide).wins)


@pytest.mark.parametrize("kind", ["mean_variance", "categorical"])
def test_the_chances_of_both_orders_sum_to_one(kind: str) -> None:
    model, left, right = method(kind), responses(1), responses(2)
    chances = model.chances(left, right)
    assert torch.allclose(chances.wins.exp() + chances.loses.exp(), torch.ones(20).double())
    back = model.chances(right, left)
    assert torch.allclose(chances.wins, back.loses)


def test_gradients_of_hopeless_pairs_are_finite() -> None:
    mean = numbers(50, -50, 500, -500).requires_grad_()
    losses = -normal_chances(
        mean, *(numbers(1, 1, 1, 1) for _ in range(1)), numbers(0, 0, 0, 0), numbers(1, 1, 1, 1)
    ).wins
    (gradient,) = torch.autograd.grad(losses.sum(), mean)
    assert losses.isfinite().all() and gradient.isfinite().all()
    assert gradient[1].item() == pytest.approx(-25, rel=0.05)  # of t^2 / 2 with t = mean / sqrt(2)


def test_pairs_are_judged_by_what_is_served() -> None:
    """Mean utilities 0.6 and 0.5 of three atoms: 0.1, whoever else is compared; the log odds of this pair are 0.302."""
    model = method("categorical", num_atoms=3, conditioning="none")
    chances = torch.stack([numbers(0.3, 0.2, 0.5), numbers(0.25, 0.5, 0.25)])
    with torch.no_grad():
        model.heads.copy_(torch.cat([chances.log(), torch.zeros(2, 3)]))
    items = torch.eye(DIM, dtype=torch.float64)
    batch = PreferenceBatch(items[:1], items[1:2], torch.zeros(1).long(), torch.ones(1), torch.zeros(1).bool())
    assert model.margin(batch).item() == pytest.approx(0.1)
    odds = model.chances(items[:1], items[1:2])
    assert (odds.wins - odds.loses).item() == pytest.approx(math.log(0.575 / 0.425))


def test_quantiles_by_hand() -> None:
    """The mass of atom i lies evenly on the bin ``[i / A, (i + 1) / A]``."""
    chances = torch.stack([numbers(0.5, 0.5, 0, 0), numbers(0, 0, 0, 1), numbers(0.1, 0.2, 0.3, 0.4)])
    assert categorical_quantile(chances, 0.25).tolist() == pytest.approx([0.125, 0.8125, 0.25 + 0.25 * 0.75])
    model = method("mean_variance", risk=0.01)
    mean, variance = model.moments(responses())
    low = model.score(responses(), model.population_state(20))
    assert torch.allclose(low, mean - 2.3263 * variance.sqrt(), atol=1e-3)


def test_of_equal_means_the_surer_ranks_higher_with_a_risk() -> None:
    averse, neutral = method("mean_variance", risk=0.01), method("mean_variance")
    with torch.no_grad():
        for model in (averse, neutral):
            model.heads.zero_()
            model.heads[0, 1] = 1.0
    items = torch.zeros(5, DIM).double()
    items[:, 0] = torch.arange(5)
    assert (averse.score(items, averse.population_state(5)).diff() < 0).all()
    assert not neutral.score(items, neutral.population_state(5)).diff().any()


@pytest.mark.parametrize("kind", ["mean_variance", "categorical"])
def test_the_loss_is_the_likelihood_of_labels_and_ties(kind: str) -> None:
    data = PlantedData(3, 2, feature_dim=DIM)
    batch = data.train_batch
    batch = batch._replace(chosen=batch.features[0].double(), rejected=batch.features[1].double())
    batch = batch._replace(
        weight=torch.linspace(0, 2, batch.num_pairs).double(), tie=torch.arange(batch.num_pairs) % 3 == 0
    )
    model = method(kind, ridge=0.0, entropy=0.0)
    chances = model.chances(*batch.features)
    wins, loses = chances.wins.exp(), chances.loses.exp()
    each = torch.where(batch.tie, -0.5 * (wins * loses).log(), -wins.log())
    assert torch.allclose(model.loss(batch)["loss"], (batch.weight * each).mean())
    if kind == "categorical":
        model.entropy = 0.1
        mean = torch.softmax(torch.cat(batch.features) @ model.heads, -1).mean(0)
        bonus = 0.1 * (mean * mean.log()).sum()
        assert torch.allclose(model.loss(batch)["loss"], (batch.weight * each).mean() + bonus)


def disputed(share: float) -> PlantedData:
    """Items of quality 0 to 1, half of them disputed: there a share of people wants the opposite; no other noise."""
    data = PlantedData(40, 4, pairs_per_user=40, feature_dim=DIM)
    draw = torch.Generator().manual_seed(3)

    def change(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        items = [torch.zeros_like(chosen) for _ in range(2)]
        for item in items:
            item[..., 0] = torch.rand(chosen.shape[:-1], generator=draw)
            item[..., 1] = (torch.rand(chosen.shape[:-1], generator=draw) < 0.5).float()
            item[..., 2] = item[..., 0] * item[..., 1]
        opposite = torch.rand(chosen.shape[:-1], generator=draw) < share  # the person who judges this pair
        left, right = (torch.where(opposite & (item[..., 1] > 0), 1 - item[..., 0], item[..., 0]) for item in items)
        wins = (left > right)[..., None]
        return torch.where(wins, *items), torch.where(wins, items[1], items[0])

    data.change(change)
    return data


def test_disagreement_shows_as_spread(tmp_path: Path) -> None:
    """Half of the people disagree about half of the items: these get the larger spread, and r2 falls."""
    report = {}
    for share in (0.5, 0.0):
        data = disputed(share)
        model = fitted(DPL(40, DIM, ridge=0.01, lr=0.3), data, tmp_path, 100)
        report[share] = model.report()
        if share:
            items = torch.cat(data.test_batch.features)
            with torch.no_grad():
                spread = model.moments(model.conditioning(items))[1]
            flag = items[:, 1] > 0
            area = (spread[flag][:, None] > spread[~flag]).double().mean()
            assert area > 0.9
    assert report[0.5]["r2"] < 0.7 < 0.9 < report[0.0]["r2"], report
    assert report[0.0]["turned"] < report[0.5]["turned"], report
