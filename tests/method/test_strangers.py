"""What faces strangers is chosen on strangers, and nothing is served that did not help any."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch.nn.functional import logsigmoid

from plm.functional import PairList, fit_gaussian
from plm.method import strangers
from plm.method.strangers import MIN_USERS, UNREACHED, chance_of_difference, least_harmful, with_evidence
from plm.methods.lore import LoRe, model
from plm.methods.lore.model import PRIOR_SCALES
from plm.methods.pal import PAL
from plm.testing import PlantedData, quiet_trainer
from plm.types import PreferenceBatch, UserState

METHODS: dict[str, Any] = {
    "LoRe": lambda data: LoRe(data.num_users, data.feature_dim, num_bases=3),
    "PAL": lambda data: PAL(data.num_users, data.feature_dim, num_prototypes=3, residual="bradley_terry"),
}


def fit(data: PlantedData, folder: Path, name: str = "LoRe", epochs: int = 20) -> Any:
    torch.manual_seed(0)
    method = METHODS[name](data)
    options = {"check_val_every_n_epoch": epochs, "num_sanity_val_steps": 0}
    quiet_trainer(folder, max_epochs=epochs, **options).fit(method, datamodule=data)
    method.trainer = None
    return method.eval()


def test_a_gain_must_exceed_its_error() -> None:
    """Ten users who gain 1 each but for noise of standard deviation s: total 10, error s sqrt(10)."""
    noise = torch.tensor([1.0, -1.0] * 5).double()
    for spread, best in ((2.9, 1), (3.1, 0)):  # 10 against 9.67 and 10.33, with the deviation of a sample of ten
        losses = torch.stack([torch.full((10,), 5.0).double(), 4.0 + spread * noise, torch.full((10,), 6.0).double()])
        assert (10 > spread * math.sqrt(10 / 9) * math.sqrt(10)) == bool(best)
        assert least_harmful(losses) == best


def test_users_without_evidence_get_the_population() -> None:
    states = UserState({"weights": torch.arange(6.0).view(3, 2)}, torch.tensor([0, 3, 4]))
    served = with_evidence(states, torch.tensor(4), lambda n: UserState({"weights": -torch.ones(n, 2)}, torch.zeros(n)))
    assert served.tensors["weights"].tolist() == [[-1.0, -1.0], [-1.0, -1.0], [4.0, 5.0]]
    assert served.num_pairs.tolist() == [0, 3, 4]


def test_the_chance_of_a_difference_is_that_of_the_two_models() -> None:
    """Of one weight, against the ratio of their evidence by quadrature, where Laplace's approximation is close."""
    for shift, num_pairs, least, most in ((0.0, 60, 0.0, 0.4), (0.3, 60, 0.2, 0.8), (1.0, 60, 0.95, 1.0)):
        design = torch.linspace(-2, 2, num_pairs, dtype=torch.float64)[:, None]
        offset, weight = 0.3 * design[:, 0], torch.linspace(0.5, 1.5, num_pairs, dtype=torch.float64)
        target = torch.sigmoid(offset + shift * design[:, 0])  # what happens on average
        user = torch.zeros(num_pairs, dtype=torch.long)
        posterior = fit_gaussian(PairList(design, offset, target, weight, user, 1))
        own = offset + design[:, 0] * posterior.mean[0]

        def log_likelihood(value: float, design: Any = design, parts: Any = (offset, target, weight)) -> float:
            offset, target, weight = parts
            margin = offset + value * design[:, 0]
            return float((weight * (target * logsigmoid(margin) + (1 - target) * logsigmoid(-margin))).sum())

        def density(value: float, likelihood: Any = log_likelihood) -> float:
            return math.exp(likelihood(value) - likelihood(0.0) - value**2 / 2) / math.sqrt(2 * math.pi)

        odds = quad(density, -8, 8, points=[float(posterior.mean[0, 0])], limit=200)[0]
        chance = chance_of_difference(posterior, own, offset, target, weight, user)
        assert chance.item() == pytest.approx(odds / (1 + odds), abs=0.01), shift
        assert least <= chance.item() <= most, shift


@pytest.mark.parametrize("name", METHODS)
def test_strangers_who_are_unlike_the_seen_are_not_harmed(name: str, tmp_path: Path) -> None:
    """All seen users differ and no stranger does: cross-fitting says that strangers differ, their own pairs do not."""
    sizes = {"pairs_per_user": 30, "num_shots": 20, "num_test": 40, "feature_dim": 6}
    data = PlantedData(40, 60, spread=1.0, unseen_spread=0.0, seed=3, **sizes)
    method = fit(data, tmp_path, name)
    assert float(method.stranger_scale) >= 0.5
    with torch.no_grad():
        facts = method.evaluate(data.unseen_batch)
    own, population = (facts[key].double() for key in ("margin", "population_margin"))
    assert ((own > 0).double() - (population > 0).double()).mean() > -0.005
    assert (logsigmoid(population) - logsigmoid(own)).mean() < 0


@pytest.mark.parametrize("name", METHODS)
def test_strangers_of_a_population_that_agrees_are_served_the_population(name: str, tmp_path: Path) -> None:
    data = PlantedData(30, 20, pairs_per_user=12, feature_dim=6, spread=0.0, seed=1)
    method = fit(data, tmp_path, name, epochs=4)
    assert int(method.least_pairs) == UNREACHED and float(method.stranger_scale) == pytest.approx(PRIOR_SCALES[0])
    with torch.no_grad():
        facts = method.evaluate(data.unseen_batch)
    assert torch.equal(facts["margin"], facts["population_margin"])


@pytest.mark.parametrize("name", METHODS)
def test_strangers_of_a_population_that_differs_are_adapted(name: str, tmp_path: Path) -> None:
    data = PlantedData(30, 20, pairs_per_user=30, num_shots=20, feature_dim=6, spread=1.5)
    method = fit(data, tmp_path, name)
    assert int(method.least_pairs) <= 4 and float(method.stranger_scale) >= 0.5
    assert float(method.prior_scale) == float(method.stranger_scale)
    with torch.no_grad():
        facts = method.evaluate(data.unseen_batch)
    own, population = ((facts[key] > 0).float().mean() for key in ("margin", "population_margin"))
    assert own > population + 0.05


def test_cross_fitting_leaves_the_fit_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases and seen users of a fit with and without it are the same to the bit."""
    data, fits = PlantedData(30, 20, pairs_per_user=12, feature_dim=6), []
    for skip in (False, True):
        if skip:
            monkeypatch.setattr(model, "meet_strangers", lambda *arguments: None)
        fits.append(fit(data, tmp_path, epochs=4))
    assert float(fits[0].stranger_scale) > 0 > float(fits[1].stranger_scale)
    for key in ("bases", "weights", "precision", "log_population_spread"):
        assert torch.equal(getattr(fits[0], key), getattr(fits[1], key)), key


def test_few_users_are_no_strangers(tmp_path: Path) -> None:
    """Fewer than `MIN_USERS` say nothing about others: the choice is that for seen users."""
    method = fit(PlantedData(MIN_USERS - 1, pairs_per_user=12, feature_dim=6), tmp_path, epochs=4)
    assert float(method.stranger_scale) == -1.0 and int(method.least_pairs) == 0


def test_of_pairs_in_many_batches_few_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    method: Any = LoRe(60, 4, num_bases=2, temperature=1.0)
    user, ones = torch.arange(60).repeat_interleave(3), torch.ones(180)
    pairs = PreferenceBatch(torch.randn(180, 4), torch.randn(180, 4), user, ones, ones > 1)
    made: list[weakref.ref[torch.Tensor]] = []
    take, most = PreferenceBatch.take, 0

    def watched(batch: PreferenceBatch, rows: torch.Tensor) -> PreferenceBatch:
        nonlocal most
        taken = take(batch, rows)
        made.append(weakref.ref(taken.chosen))
        most = max(most, sum(one() is not None for one in made))
        return taken

    monkeypatch.setattr(PreferenceBatch, "take", watched)
    method.train_pass = lambda: (pairs.take(rows) for rows in torch.split(torch.arange(180), 18))
    method.num_train_pairs, method.sum_over_processes = 180, lambda values: values
    strangers._fit(method, torch.arange(60) % 3 > 0, torch.full((60,), 3), lambda batches: None)
    assert len(made) > 2 * strangers.NUM_STEPS  # a batch as it was read, and the pairs of it that take part
    assert most <= 4
