"""The Bradley-Terry model that every method on features is compared with, against scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from plm.method import PersonalizationMethod
from plm.method.population import RIDGES, tuned_population
from plm.methods.lore import LoRe
from plm.methods.pal import PAL
from plm.methods.vpl import VPL
from plm.testing import PlantedData, quiet_trainer
from plm.types import PreferenceBatch

DIM = 6


def optimum(batch: PreferenceBatch, scale: float, ridge: float) -> np.ndarray:
    """scikit-learn's penalised logistic regression without intercept."""
    x = batch.difference.numpy() / scale
    rows, labels = np.concatenate([x, -x]), np.repeat([1, 0], len(x))  # each pair twice, half as heavy
    model = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(rows, labels, sample_weight=np.full(len(rows), 0.5))
    coefficients: np.ndarray = model.coef_[0]
    return coefficients


@pytest.mark.parametrize("pairs_per_user", [3, 60])
def test_the_ridge_is_the_one_validation_pairs_choose(pairs_per_user: int) -> None:
    data = PlantedData(6, pairs_per_user=pairs_per_user, feature_dim=DIM, seed=2)
    train, val, scale = data.train_batch, data.val_batch, torch.tensor(2.5)
    fit = tuned_population(lambda: [train], lambda: [val], DIM, scale, train.num_pairs, lambda value: value)
    optima = {ridge: optimum(train, 2.5, ridge) for ridge in RIDGES}
    losses = {
        ridge: float(np.logaddexp(0, -val.difference.numpy() @ best / 2.5).mean()) for ridge, best in optima.items()
    }
    assert fit.ridge == min(losses, key=losses.__getitem__)
    np.testing.assert_allclose(fit.direction.numpy() * 2.5, optima[fit.ridge], atol=5e-3)


def test_batches_add_up_to_one_batch() -> None:
    data = PlantedData(6, feature_dim=DIM)
    train, one = data.train_batch, torch.tensor(1.0)
    first = PreferenceBatch(*(value[:70] for value in train[:5]))  # type: ignore[index, arg-type]
    rest = PreferenceBatch(*(value[70:] for value in train[:5]))  # type: ignore[index, arg-type]
    fits = [
        tuned_population(lambda parts=parts: parts, lambda: [data.val_batch], DIM, one, train.num_pairs, lambda x: x)  # type: ignore[misc]
        for parts in ([train], [first, rest])
    ]
    assert fits[0].ridge == fits[1].ridge
    torch.testing.assert_close(fits[0].direction, fits[1].direction, atol=2e-3, rtol=0)


def test_every_run_is_compared_with_it(tmp_path: Path) -> None:
    data = PlantedData(12, feature_dim=DIM)
    margins = []
    for method in (VPL(12, DIM, latent_dim=2, hidden_dim=4), LoRe(12, DIM, num_bases=3, lr=1e-9)):
        quiet_trainer(tmp_path, max_epochs=2).fit(method, datamodule=data)
        with torch.no_grad():
            margins.append(method.evaluate(data.test_batch)["bradley_terry_margin"])
        assert float(method.bradley_terry_ridge) in [pytest.approx(ridge) for ridge in RIDGES]
    assert torch.equal(margins[0], margins[1])


@pytest.mark.parametrize("every", [1, 2])
def test_the_ridge_of_a_run_is_tuned_before_its_first_validation(every: int, tmp_path: Path) -> None:
    """Users with 2 pairs each: the largest ridge, whenever the first validation comes."""
    data = PlantedData(12, pairs_per_user=2, feature_dim=DIM, signal=0.3)
    method = LoRe(12, DIM, num_bases=3)
    options = {"max_epochs": 2, "check_val_every_n_epoch": every, "num_sanity_val_steps": 0}
    quiet_trainer(tmp_path, **options).fit(method, datamodule=data)
    sizes = (DIM, method.feature_scale, data.train_batch.num_pairs)
    fit = tuned_population(lambda: [data.train_batch], lambda: [data.val_batch], *sizes, lambda x: x)
    assert float(method.bradley_terry_ridge) == fit.ridge == 10.0
    torch.testing.assert_close(method.bradley_terry, fit.direction, atol=1e-3, rtol=0)


def test_a_reward_that_nobody_asked_for_is_not_added(tmp_path: Path) -> None:
    method = PAL(12, DIM, num_prototypes=3)
    quiet_trainer(tmp_path, max_epochs=1).fit(method, datamodule=PlantedData(12, feature_dim=DIM))
    assert method.bradley_terry.norm() > 0.1 and not method.base.any()


@pytest.mark.parametrize(
    "method",
    [
        LoRe(12, DIM, num_bases=3, lr=1e-9),
        LoRe(12, DIM, num_bases=3, lr=1e-9, temperature=0.7),
        PAL(12, DIM, num_prototypes=3, residual="bradley_terry", lr=1e-9),
        VPL(12, DIM, latent_dim=2, hidden_dim=4, decoder="bilinear", lr=1e-9),
        VPL(12, DIM, latent_dim=2, hidden_dim=4, lr=1e-9),
    ],
)
def test_a_fit_starts_from_it(method: PersonalizationMethod, tmp_path: Path) -> None:
    """With a step of nearly nothing the part of the reward that is linear and everybody's is its direction; a fit of
    what was fitted before goes on from there."""
    data = PlantedData(12, feature_dim=DIM)
    if isinstance(method, LoRe):
        part = method.bases[:, 0]
    elif isinstance(method, PAL):
        part = method.base
    else:
        decoder: Any = method.decoder
        part = getattr(decoder, "linear", decoder).population
    for former in (0.0, 3.0):
        with torch.no_grad():
            part.fill_(former)
        quiet_trainer(tmp_path, max_epochs=1).fit(method, datamodule=data)
        method.trainer = None
        assert method.bradley_terry.norm() > 0.1
        unit = method.feature_scale
        if isinstance(method, LoRe) and method.temperature is not None:
            unit = torch.tensor(method.temperature)
        if isinstance(method, VPL):
            unit = unit / DIM**0.5
        expected = torch.full((DIM,), 3.0) if former else method.bradley_terry * unit
        torch.testing.assert_close(part.detach(), expected, atol=1e-5, rtol=1e-5)
