"""BradleyTerry against scikit-learn and SciPy: every candidate ridge is a separate fit."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from plm.methods.bradley_terry import BradleyTerry
from plm.testing import PlantedData, quiet_trainer
from plm.types import PreferenceBatch

DIM = 6
RIDGES = (0.01, 1.0, 100.0)


def batch_of(count: int = 80) -> PreferenceBatch:
    draw = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(count, DIM, generator=draw, dtype=torch.float64)

    chosen, rejected = normal() + 0.3 * torch.arange(DIM), normal()
    weight = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    return PreferenceBatch(chosen, rejected, torch.zeros(count).long(), weight, torch.arange(count) % 7 == 0)


def arrays(batch: PreferenceBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences, weights and the probability that chosen wins."""
    difference = (batch.chosen - batch.rejected).double().numpy()  # type: ignore[operator]
    return difference, batch.weight.double().numpy(), np.where(batch.tie.numpy(), 0.5, 1.0)


def separate_fit(batch: PreferenceBatch, scale: float, ridge: float) -> np.ndarray:
    x, weight, target = arrays(batch)
    model = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-12, max_iter=10_000)
    twice = np.concatenate([x, x]) / scale
    shares = np.concatenate([weight * target, weight * (1 - target)]) + 1e-300
    coefficients: np.ndarray = model.fit(twice, np.repeat([1, 0], len(x)), sample_weight=shares).coef_[0]
    return coefficients


def fit(method: BradleyTerry, data: PlantedData, folder: Path, epochs: int) -> BradleyTerry:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(folder, max_epochs=epochs, check_val_every_n_epoch=epochs)
        trainer.fit(method, datamodule=data)
    method.trainer = None  # type: ignore[assignment]
    return method


def test_every_candidate_has_its_own_optimum() -> None:
    """At scikit-learn's separate optima the gradient of all candidates vanishes."""
    batch = batch_of()
    method = BradleyTerry(1, DIM, ridges=RIDGES).double()
    method.num_train_pairs = batch.num_pairs
    method.feature_scale.fill_(3.0)
    optima = np.stack([separate_fit(batch, 3.0, ridge) for ridge in RIDGES], 1)
    with torch.no_grad():
        method.directions.copy_(torch.from_numpy(optima))
    method.loss(batch)["loss"].backward()  # type: ignore[no-untyped-call]
    assert method.directions.grad is not None and method.directions.grad.abs().max() < 1e-6
    lengths = np.linalg.norm(optima, axis=0)
    assert lengths[0] > lengths[1] > lengths[2]


def test_training_reaches_the_separate_fits_and_validation_picks_one(tmp_path: Path) -> None:
    data = PlantedData(num_users=10, pairs_per_user=20, feature_dim=DIM)
    method = fit(BradleyTerry(10, DIM, ridges=RIDGES, lr=0.05), data, tmp_path, 800)
    scale = float(method.feature_scale)
    optima = np.stack([separate_fit(data.train_batch, scale, ridge) for ridge in RIDGES], 1)
    assert np.allclose(method.directions.detach().numpy(), optima, atol=5e-3)
    x, weight, _ = arrays(data.val_batch)
    losses = [(weight * np.logaddexp(0, -x @ optima[:, column] / scale)).mean() for column in range(3)]
    chosen = int(method.chosen_ridge)
    assert chosen == int(np.argmin(losses))
    rewards = method.score(torch.eye(DIM)) - method.score(torch.zeros(1, DIM))
    assert np.allclose(rewards.detach().numpy(), optima[:, chosen] / scale, atol=5e-3)


@pytest.mark.parametrize("best", range(3))
def test_the_picked_ridge_is_the_best_on_validation_whichever_it_is(best: int, tmp_path: Path) -> None:
    """Validation pairs are made such that the planted column wins."""
    data = PlantedData(num_users=4, feature_dim=DIM)
    method = BradleyTerry(4, DIM, ridges=RIDGES, lr=1e-9)
    with torch.no_grad():
        method.directions.copy_(torch.eye(DIM)[:, :3])
    val = data.val_batch
    rejected = torch.zeros(val.num_pairs, DIM)
    data.val_batch = val._replace(chosen=rejected + 5 * torch.eye(DIM)[best], rejected=rejected)
    fit(method, data, tmp_path, 1)
    assert int(method.chosen_ridge) == best
    direction = (method.score(torch.eye(DIM)) - method.score(torch.zeros(1, DIM))).detach()
    assert int(direction.argmax()) == best and (direction > 1e-3).sum() == 1


def test_with_an_anchor_only_the_way_from_the_reference_is_penalised(tmp_path: Path) -> None:
    data, head = PlantedData(num_users=10, pairs_per_user=20, feature_dim=DIM), torch.linspace(-1, 2, DIM)
    data.reference_head = head
    method = fit(BradleyTerry(10, DIM, ridges=[5.0, 1e6], anchor=True, lr=0.02), data, tmp_path, 600)
    x, weight, _ = arrays(data.train_batch)
    x = x / float(method.feature_scale)

    def objective(value: np.ndarray) -> float:
        margin = x @ (value[:DIM] + value[DIM] * head.numpy())
        return float((weight * np.logaddexp(0, -margin)).sum() + 2.5 * (value[:DIM] ** 2).sum())

    best = minimize(objective, np.zeros(DIM + 1), method="BFGS").x
    responses = torch.randn(8, DIM, generator=torch.Generator().manual_seed(1))
    method.chosen_ridge.fill_(0)
    expected = responses.numpy() @ (best[:DIM] + best[DIM] * head.numpy()) / float(method.feature_scale)
    assert np.allclose(method.score(responses).detach().numpy(), expected, atol=2e-2)
    method.chosen_ridge.fill_(1)  # an infinite ridge leaves the reference itself, up to its scale
    rewards, reference = method.score(responses).detach().numpy(), responses.numpy() @ head.numpy()
    assert np.corrcoef(rewards, reference)[0, 1] > 0.9999 and rewards @ reference > 0


def test_nothing_is_personal() -> None:
    data = PlantedData(num_users=4, feature_dim=DIM)
    method = BradleyTerry(4, DIM)
    state = method.adapt(data.context)
    assert state.tensors == {} and state.num_pairs.tolist() == [10] * 6


@pytest.mark.parametrize("ridges", [[], [-1.0]])
def test_bad_ridges_are_refused(ridges: list[float]) -> None:
    with pytest.raises(ValueError, match=r"model\.ridges: expected numbers >= 0"):
        BradleyTerry(1, DIM, ridges=ridges)
