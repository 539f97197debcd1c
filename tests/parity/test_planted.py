"""Planted truth: LoRe recovers what the pairs determine and claims nothing they do not."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plm.evaluation import cluster_bootstrap
from plm.methods.lore import LoRe
from plm.testing import PlantedData, quiet_trainer
from plm.types import PreferenceBatch

DIM, RANK = 32, 3


def fit(data: PlantedData, folder: Path, epochs: int = 250) -> LoRe:
    torch.manual_seed(0)
    method = LoRe(data.num_users, DIM, num_bases=RANK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(folder, max_epochs=epochs, check_val_every_n_epoch=epochs, num_sanity_val_steps=0)
        trainer.fit(method, datamodule=data)
    method.trainer = None  # type: ignore[assignment]
    return method.eval()


def overlap(method: LoRe, data: PlantedData) -> float:
    """Mean squared cosine of the principal angles between learned and planted subspace; RANK / DIM by chance."""
    learned = torch.linalg.qr(method.bases.detach()).Q
    cosines = torch.linalg.svdvals(learned.T @ data.basis)
    return float(cosines.square().mean())


def by_user(correct: Tensor, batch: PreferenceBatch) -> np.ndarray:
    """``(U,)`` mean over the pairs of each user, who all have equally many."""
    assert batch.user_row is not None
    rows, row = torch.unique(batch.user_row, return_inverse=True)
    out: np.ndarray = (torch.zeros(len(rows)).index_add_(0, row, correct.float()) / torch.bincount(row)).numpy()
    return out


def oracle_gain(method: LoRe, batch: PreferenceBatch, data: PlantedData) -> float:
    """Mean accuracy of the planted users' own rewards minus that of the method's global control, on the same pairs."""
    assert batch.user_row is not None and isinstance(batch.chosen, Tensor) and isinstance(batch.rejected, Tensor)
    margin = ((batch.chosen - batch.rejected) * data.directions[batch.user_row]).sum(-1)
    with torch.no_grad():
        population = method.evaluate(batch)["population_margin"]
    return float(by_user((margin > 0).float() - (population > 0).float(), batch).mean())


def gains(method: LoRe, batch: PreferenceBatch) -> np.ndarray:
    """``(U,)`` accuracy of the personal model minus that of its own global control."""
    with torch.no_grad():
        facts = method.evaluate(batch)
    return by_user((facts["margin"] > 0).float() - (facts["population_margin"] > 0).float(), batch)


def log_losses(method: LoRe, batch: PreferenceBatch) -> tuple[float, float]:
    """Mean log-loss of the personal model and of its global control."""
    with torch.no_grad():
        facts = method.evaluate(batch)
    return tuple(float(torch.nn.functional.softplus(-facts[name]).mean()) for name in ("margin", "population_margin"))  # type: ignore[return-value]


def first_pairs(batch: PreferenceBatch, num_users: int, count: int) -> PreferenceBatch:
    """The first ``count`` pairs of every user of a batch in which all have equally many."""
    kept = torch.arange(batch.num_pairs) % (batch.num_pairs // num_users) < count
    return batch._replace(**{name: value[kept] for name, value in batch._asdict().items() if isinstance(value, Tensor)})


def with_shots(batch: PreferenceBatch, count: int) -> PreferenceBatch:
    """The same query with only the first ``count`` support pairs of every user."""
    assert batch.context is not None
    return batch._replace(context=batch.context._replace(mask=batch.context.mask & (torch.arange(64) < count)))


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoRe, PlantedData]:
    """100 pairs of each of 80 users."""
    data = PlantedData(80, 60, pairs_per_user=100, num_shots=64, num_test=60, feature_dim=DIM, rank=RANK)
    return fit(data, tmp_path_factory.mktemp("rich")), data


def test_many_pairs_recover_the_planted_subspace(rich: tuple[LoRe, PlantedData]) -> None:
    method, data = rich
    assert overlap(method, data) > 0.95
    population = method.bases.detach()[:, 0]
    cosine = torch.nn.functional.cosine_similarity(population, data.basis[:, 0], dim=0)
    assert cosine > 0.8  # 80 users around it leave their mean uncertain


def test_many_pairs_recover_the_users(rich: tuple[LoRe, PlantedData]) -> None:
    """Learned directions of unseen users point where the planted ones do."""
    method, data = rich
    weights = method.adapt(data.context).tensors["weights"]
    learned, planted = weights @ method.bases.detach().T, data.directions[data.num_users :]
    assert torch.nn.functional.cosine_similarity(learned, planted, dim=1).median() > 0.9
    for batch in (data.test_batch, data.unseen_batch):
        gain = gains(method, batch)
        assert gain.mean() > 0.1 and cluster_bootstrap(gain)[0] > 0.05


def test_the_gain_grows_with_shots(rich: tuple[LoRe, PlantedData]) -> None:
    method, data = rich
    curve = [gains(method, with_shots(data.unseen_batch, count)).mean() for count in (0, 2, 8, 64)]
    assert curve[0] == 0.0
    assert all(later > earlier + 0.01 for earlier, later in pairwise(curve)), curve


@pytest.mark.parametrize(
    ("pairs_per_user", "copies"), [(2, 1), pytest.param(5, 1, marks=SLOW), pytest.param(10, 1, marks=SLOW), (5, 4)]
)
def test_few_pairs_do_not_pretend(pairs_per_user: int, copies: int, tmp_path: Path) -> None:
    """Few pairs of 40 users leave the subspace open, and what is claimed about users holds on new pairs.

    The number of users matters because the subspace is shared: what determines it is all pairs together, so 40 users
    with 10 pairs are too few where 200 users are enough (see the next test). 40 leave it open at 2, 5 and 10.

    Overconfidence shows in three ways, none of which may occur, with no more than 2 validation pairs per user to choose
    the spread by: a personal log-loss worse than that of the global control (0.02 nats are allowed; over ten seeds the
    most was 0.007), a personal accuracy below the control's, and an interval of personal - global that reaches above
    what the planted rewards themselves gain. The control is not judged here: its ridge is fixed, and at 2 and 5 pairs
    per user it is worse than a coin itself (log-loss 0.65 to 1.01).

    Where every training pair stands four times, the pairs say four times too much, and the spread that their evidence
    learns is far too wide: only the spread that validation pairs choose keeps users from harm.
    """
    data = PlantedData(40, 60, pairs_per_user, num_shots=pairs_per_user, num_test=60, feature_dim=DIM, rank=RANK)
    data.val_batch = first_pairs(data.val_batch, data.num_users, 2)
    copied = torch.arange(data.train_batch.num_pairs).repeat_interleave(copies)
    fields: dict[str, Any] = {
        name: value[copied] for name, value in data.train_batch._asdict().items() if isinstance(value, Tensor)
    }
    data.train_batch = data.train_batch._replace(**fields)
    method = fit(data, tmp_path)
    assert overlap(method, data) < 0.7  # recovered would be 0.9; over ten seeds 0.13 to 0.64
    for batch in (data.test_batch, data.unseen_batch):
        personal, population = log_losses(method, batch)
        assert personal < population + 0.02
        gain = gains(method, batch)
        assert gain.mean() > -0.01
        assert cluster_bootstrap(gain)[1] < oracle_gain(method, batch, data)


@pytest.mark.slow
def test_more_users_with_as_few_pairs_recover_the_subspace(tmp_path: Path) -> None:
    """10 pairs of 200 users are as many as 50 of 40: overlap 0.92, where 10 pairs of 40 users reach 0.56."""
    data = PlantedData(200, 60, pairs_per_user=10, num_shots=10, num_test=60, feature_dim=DIM, rank=RANK)
    method = fit(data, tmp_path)
    assert overlap(method, data) > 0.85
    assert cluster_bootstrap(gains(method, data.unseen_batch))[0] > 0.05


@pytest.mark.parametrize("pairs_per_user", [10, pytest.param(60, marks=SLOW)])
def test_shuffled_users_shrink_to_the_population(pairs_per_user: int, tmp_path: Path) -> None:
    data = PlantedData(
        60, 40, pairs_per_user, num_shots=30, num_test=100, feature_dim=DIM, rank=RANK, shuffle_users=True
    )
    method = fit(data, tmp_path)
    spread = (method.weights - method.weights.mean(0)) @ method.bases.detach().T
    assert spread.norm(dim=1).mean() < 0.1 * method.bases.detach()[:, 0].norm()
    for batch in (data.test_batch, data.unseen_batch):
        assert abs(gains(method, batch).mean()) < 0.005


def test_reversed_labels_reverse_the_personal_term_exactly_around_a_population_that_wants_nothing() -> None:
    """Posterior modes under a centred normal prior are odd in the labels; a population's reward breaks that."""
    data = PlantedData(12, 40, num_shots=20)
    torch.manual_seed(0)
    method = LoRe(12, 8, num_bases=4)  # as initialised: the population's basis is zero
    shares = []
    for size in (0.0, 2.0):
        with torch.no_grad():
            method.bases[:, 0] = size * data.basis[:, 0]
            facts = method.evaluate(data.unseen_batch)
        term, flipped = (facts[name] - facts["population_margin"] for name in ("margin", "flipped_margin"))
        shares.append(float((term * flipped < 0).float().mean()))
    assert shares[0] == 1.0 > shares[1]


def test_where_nobody_differs_no_basis_is_in_use(tmp_path: Path) -> None:
    """The smallest spread is chosen, and leaves users the population to the bit."""
    data = PlantedData(40, 60, pairs_per_user=20, num_shots=2, num_test=60, feature_dim=DIM, rank=RANK, spread=0.0)
    method = fit(data, tmp_path, epochs=60)
    assert method.report()["effective_bases"] == 0.0
    with torch.no_grad():
        facts = method.evaluate(data.test_batch)
    assert torch.equal(facts["margin"], facts["population_margin"])
