"""Per-user Bradley-Terry against scikit-learn's logistic regression, user by user."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from plm.functional import flatten_context
from plm.leaderboard.facts import state_size
from plm.leaderboard.per_user import NUM_COMPONENTS, RIDGES, PerUserBradleyTerry
from plm.testing import PlantedData


def fitted(data: PlantedData) -> PerUserBradleyTerry:
    method = PerUserBradleyTerry(data.num_users, data.feature_dim)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, num_sanity_val_steps=0, **quiet)
    trainer.fit(method, datamodule=data)
    return method.eval()


def test_every_user_is_a_logistic_regression_of_their_own():
    data = PlantedData(num_users=6, num_unseen=5, num_shots=12, spread=1.0)
    method = fitted(data)
    ridge = float(method.ridge)
    assert min(abs(ridge - value) for value in RIDGES) < 1e-6
    states = method.adapt(data.context)
    difference, _, _, user = flatten_context(data.context)
    for row in range(5):
        own = difference[user == row].numpy().astype(float) / float(method.feature_scale)
        both, label = np.concatenate([own, -own]), np.repeat([1, 0], len(own))
        # every pair is there twice, once from either side, hence half the penalty's inverse
        peer = LogisticRegression(C=0.5 / ridge, fit_intercept=False, tol=1e-10, max_iter=1000).fit(both, label)
        mine = (method.components @ states.tensors["weights"][row]).numpy()
        np.testing.assert_allclose(mine, peer.coef_[0], atol=2e-4)


def test_without_validation_pairs_no_ridge_is_picked(monkeypatch):
    monkeypatch.setattr(PerUserBradleyTerry, "val_pass", lambda self: iter(()))
    with pytest.raises(ValueError, match="expected validation pairs to pick the ridge by, got none"):
        fitted(PlantedData(num_users=6, num_unseen=4))


def test_nothing_is_learned_from_others():
    data = PlantedData(num_users=8, num_unseen=4)
    method = fitted(data)
    whole = method.adapt(data.context).tensors["weights"]
    first = type(data.context)(*(None if value is None else value[:1] for value in data.context))
    torch.testing.assert_close(method.adapt(first).tensors["weights"], whole[:1])
    assert not method.population_state(3).tensors["weights"].any()
    assert method.num_pairs.tolist() == [30] * 8
    everyone = method.population_state(method.num_users)
    assert state_size(method.user_states(torch.arange(method.num_users)), everyone) == 8
    assert state_size(everyone, everyone) == 0, "a state that is everybody's is no parameter of a user"


def test_wide_features_are_reduced_to_their_leading_components():
    data = PlantedData(num_users=10, num_unseen=4, feature_dim=100, pairs_per_user=40)
    method = fitted(data)
    assert method.components.shape == (100, NUM_COMPONENTS)
    torch.testing.assert_close(method.components.T @ method.components, torch.eye(NUM_COMPONENTS), atol=1e-4, rtol=0)
    difference = (data.train_batch.chosen - data.train_batch.rejected).double()
    kept = (difference @ method.components.double()).square().sum() / difference.square().sum()
    best = torch.linalg.eigvalsh(difference.T @ difference).flip(0)
    assert abs(float(kept) - float(best[:NUM_COMPONENTS].sum() / best.sum())) < 1e-6
