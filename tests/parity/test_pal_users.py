"""PAL's users: the posterior of their logits against SciPy, few shots, fits, and what a planted world gives back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, softmax
from torch import Tensor

from plm.backbones import HashingBackbone
from plm.data.datamodule import PreferenceDataModule
from plm.data.sources.synthetic import SyntheticPairs
from plm.functional import PairList, expected_losses, fit_gaussian, fit_simplex
from plm.methods.pal import PAL
from plm.methods.pal.solver import fit_deviations, linearised
from plm.testing import PlantedData, quiet_trainer
from plm.types import Context, PreferenceBatch

K = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit(method: PAL, data: Any, folder: Path, epochs: int = 40, **options: Any) -> PAL:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"check_val_every_n_epoch": epochs, **options}
        quiet_trainer(folder, max_epochs=epochs, **options).fit(method, datamodule=data)
    method.trainer = None  # type: ignore[assignment]
    return method.eval()


def accuracy(method: PAL, batch: PreferenceBatch, key: str = "margin") -> float:
    with torch.no_grad():
        return float((method.evaluate(batch)[key] > 0).double().mean())


# ---------------------------------------------------------------------- the solver
def test_posterior_mode_is_scipys() -> None:
    """Mixtures of three prototypes: every user's mode against BFGS on the objective written out in NumPy."""
    design, offset, user = 3 * draw(40, K), draw(40, seed=1), torch.arange(40) ** 2 % 4
    target, weight = torch.where(torch.arange(40) % 5 == 0, 0.5, 1.0).double(), torch.linspace(0.5, 2, 40).double()
    found = fit_deviations(
        lambda rows: offset + (design * torch.softmax(2 * rows, -1)).sum(-1), target, weight, user, draw(4, K) * 0, 60
    )
    for row in range(4):
        keep = (user == row).numpy()
        z, o, t, w = (value.numpy()[keep] for value in (design, offset, target, weight))

        def objective(v: np.ndarray, z: Any = z, o: Any = o, t: Any = t, w: Any = w) -> float:
            margin = o + z @ softmax(2 * v)
            return float((w * (np.logaddexp(0, -margin) + (1 - t) * margin)).sum() + v @ v / 2)

        best = minimize(objective, np.zeros(K), tol=1e-12)
        assert objective(found.mean[row].numpy()) <= best.fun + 1e-9
        np.testing.assert_allclose(found.mean[row], best.x, atol=1e-4)
        weights = softmax(2 * found.mean[row].numpy())
        jacobian = 2 * z @ (np.diag(weights) - np.outer(weights, weights))
        chance = expit(o + z @ weights)
        hessian = (jacobian * (w * chance * (1 - chance))[:, None]).T @ jacobian + np.eye(K)
        np.testing.assert_allclose(found.precision[row], hessian, atol=1e-4)


def test_linear_margins_give_the_convex_solution() -> None:
    design, offset, user = draw(30, K), draw(30, seed=1), torch.arange(30) % 3
    one = torch.ones(30).double()
    exact = fit_gaussian(PairList(design, offset, one, one, user, 3))
    curved = 1e-9  # autograd wants a graph for the second derivative
    found = fit_deviations(
        lambda rows: offset + (design * rows).sum(-1) + curved * rows.square().sum(-1),
        one,
        one,
        user,
        draw(3, K) * 0,
        60,
    )
    torch.testing.assert_close(found.mean, exact.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.precision, exact.precision, atol=1e-6, rtol=0)


def test_a_vague_prior_gives_the_best_weights_on_the_simplex() -> None:
    """Squared distances are linear in the weights, so without a prior the problem is convex on the simplex."""
    design, user = draw(60, K), torch.arange(60) % 2
    one = torch.ones(60).double()
    best = fit_simplex(PairList(design, 0 * one, one, one, user, 2), torch.full((K,), 1 / K))
    found = fit_deviations(
        lambda rows: (design * torch.softmax(1e3 * rows, -1)).sum(-1), one, one, user, draw(2, K) * 0, 60
    )

    def loss(weights: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-(design * weights[user]).sum(-1)).sum()

    assert loss(torch.softmax(1e3 * found.mean, -1)) <= loss(best.mean) + 1e-2


def test_expected_losses_are_the_expectation_to_second_order() -> None:
    """Against Gauss-Hermite quadrature of bt over the normal that the posterior gives a linear margin."""
    mode, design, precision = draw(1, K), 0.3 * draw(1, K, seed=1), (4 * torch.eye(K).double())[None]
    margin = (design * mode).sum(-1)
    found = expected_losses(margin, design, torch.ones(1).double(), precision, torch.zeros(1, dtype=torch.long))
    spread = float((design.square().sum() / 4).sqrt())
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    exact = (weights * np.logaddexp(0, -(margin.item() + spread * nodes))).sum() / weights.sum()
    assert found.item() == pytest.approx(exact, abs=1e-4)
    assert found.item() > np.logaddexp(0, -margin.item())


def test_derivatives_of_margins() -> None:
    rows = draw(4, K)
    value, design = linearised(lambda v: (v**3).sum(-1), rows)
    torch.testing.assert_close(value, (rows**3).sum(-1))
    torch.testing.assert_close(design.detach(), 3 * rows**2)


# ---------------------------------------------------------------------- few shots
def opposite_camps(head: str, variant: str = "A") -> PAL:
    """Two prototypes that disagree about the first feature."""
    method = PAL(2, 4, num_prototypes=2, head=head, users="table", variant=variant, projector="mlp0-linear-dropout0")  # type: ignore[arg-type]
    geometry = method.geometry
    geometry.projector.weights[0].data, geometry.projector.biases[0].data = torch.eye(4)[None], torch.zeros(1, 1, 4)
    camps = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    if geometry.user_projectors is None:
        geometry.prototypes.data = camps  # type: ignore[union-attr]
    else:
        geometry.user_projectors.weights[0].data.zero_()
        geometry.user_projectors.biases[0].data = camps[:, None]
    return method.eval()


@pytest.mark.parametrize(("head", "variant"), [("dist", "A"), ("dist_squared", "A"), ("angle", "A"), ("angle", "B")])
def test_one_pair_points_the_right_way(head: str, variant: str) -> None:
    """From a random start the published schedule gets 54 % of users right after one pair; from zero all."""
    method = opposite_camps(head, variant)
    users = 40
    chosen = draw(users, 1, 4).float()
    context = Context(chosen, -chosen, torch.ones(users, 1).bool(), torch.ones(users, 1))
    weights = method.adapt(context).tensors["weights"]
    assert torch.equal(weights.argmax(-1), (chosen[:, 0, 0] < 0).long())
    assert torch.equal(method.population_state(1).tensors["weights"], torch.full((1, 2), 0.5))


def test_partition_gives_one_hot_weights() -> None:
    method = opposite_camps("dist")
    method.partition = True
    chosen = draw(6, 2, 4).float()
    mask = torch.tensor([[True, True]] * 5 + [[False, False]])
    weights = method.adapt(Context(chosen, -chosen, mask, torch.ones(6, 2))).tensors["weights"]
    assert set(weights[:5].flatten().tolist()) == {0.0, 1.0} and weights[5].tolist() == [0.5, 0.5]


def test_more_pairs_are_surer() -> None:
    method = opposite_camps("dist_squared")
    chosen = draw(1, 8, 4).float()
    chosen[..., 0] = chosen[..., 0].abs()
    states = [
        method.adapt(Context(chosen[:, :n], -chosen[:, :n], torch.ones(1, n).bool(), torch.ones(1, n)))
        for n in (1, 4, 8)
    ]
    first = [float(state.tensors["weights"][0, 0]) for state in states]
    assert 0.5 < first[0] < first[1] < first[2]
    prior = float(method.population_state(1).tensors["precision"][0].trace())
    assert all(float(state.tensors["precision"][0].trace()) > prior for state in states)


# ---------------------------------------------------------------------- fits
def test_personal_beats_global_and_shuffled_users_do_no_harm(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_prototypes": 6, "residual": "bradley_terry"}
    data = PlantedData(num_users=120, num_unseen=120, pairs_per_user=30, num_shots=30, num_test=40)
    torch.manual_seed(0)
    method = fit(PAL(120, 8, **options), data, tmp_path)
    for batch in (data.test_batch, data.unseen_batch):
        assert accuracy(method, batch) > accuracy(method, batch, "population_margin") + 0.04
    data = PlantedData(num_users=120, num_unseen=120, pairs_per_user=30, num_shots=30, num_test=40, shuffle_users=True)
    torch.manual_seed(0)
    method = fit(PAL(120, 8, **options), data, tmp_path)
    for batch in (data.test_batch, data.unseen_batch):
        assert accuracy(method, batch) > accuracy(method, batch, "population_margin") - 0.01


def test_reference_residual_starts_at_the_reference(tmp_path: Path) -> None:
    data = PlantedData(num_users=12)
    with pytest.raises(ValueError, match="residual reference needs the reward head"):
        fit(PAL(12, 8, residual="reference"), data, tmp_path, epochs=1)
    data.reference_head = data.directions[0]
    method = fit(PAL(12, 8, residual="reference", users="table", freeze=["base"]), data, tmp_path, epochs=1)
    method.geometry.prototypes.data.zero_()  # type: ignore[union-attr]
    own = (data.test_batch.chosen - data.test_batch.rejected) @ data.directions[0]  # type: ignore[operator]
    item = [
        side.square().sum(-1) / method.feature_scale**2 for side in (data.test_batch.chosen, data.test_batch.rejected)
    ]  # type: ignore[union-attr]
    torch.testing.assert_close(method.margin(data.test_batch), own - item[0] + item[1])


def test_a_table_becomes_the_prior_of_unseen_users(tmp_path: Path) -> None:
    data = PlantedData(num_users=40)
    method = fit(PAL(40, 8, num_prototypes=4, users="table", lr=0.1), data, tmp_path)
    logits = method.logits.detach()
    torch.testing.assert_close(method.prior_centre, logits.mean(0))
    torch.testing.assert_close(method.prior_scale, (logits - logits.mean(0)).square().mean().sqrt())
    population = method.population_state(1).tensors["weights"][0]
    torch.testing.assert_close(population, torch.softmax(logits.mean(0) / method.log_temperature.exp(), -1).detach())
    assert accuracy(method, data.test_batch) > 0.7


def test_the_bound_keeps_ideal_points_in_a_ball(tmp_path: Path) -> None:
    data, norms = PlantedData(num_users=20), []
    for bound in (None, 0.5):
        torch.manual_seed(0)
        method = fit(PAL(20, 8, users="table", head="dist", bound=bound, lr=0.1), data, tmp_path, epochs=60)
        points = method.user_states(torch.arange(20)).tensors["weights"] @ method.geometry.points()
        norms.append(points.norm(dim=-1).mean().item())
    assert norms[1] < 0.9 * norms[0] and norms[1] < 0.8


def test_prompts_decide_in_variant_b(tmp_path: Path) -> None:
    """Users like the first feature after one prompt and dislike it after the other: only g(c) can express it."""
    count, users = 400, 10
    which = torch.arange(count) % 2
    prompt = torch.eye(4)[which]
    one, two = torch.randn(count, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(count, 4)
    wins = (one[:, :1] > 0) == (which[:, None] == 0)
    batch = PreferenceBatch(
        torch.where(wins, one, two),
        torch.where(wins, two, one),
        torch.arange(count) // 2 % users,
        torch.ones(count),
        torch.zeros(count, dtype=torch.bool),
        prompt,
    )
    torch.manual_seed(0)
    data = PlantedData(num_users=users, feature_dim=4)
    data.train_batch = data.val_batch = batch._replace(user_row=batch.user_index)
    groups = {"projector": {"lr": 0.02}, "user_projectors": {"lr": 0.02}}
    method = PAL(users, 4, num_prototypes=2, variant="B", head="angle", projector="mlp1-gelu-dropout0", groups=groups)
    fit(method, data, tmp_path, epochs=60)
    with torch.no_grad():
        assert (method.margin(batch) > 0).double().mean() > 0.95
        assert (method.margin(batch._replace(prompt=prompt.flip(0))) > 0).double().mean() < 0.05
    assert method.reads_prompts
    with pytest.raises(ValueError, match="prompt_features: true"):
        method.score(batch.chosen, method.user_states(batch.user_index))


def test_conflicting_groups_are_told_apart_by_five_pairs(tmp_path: Path) -> None:
    """PAL-B with one prototype per planted group; whoever does not know the user is right half of the time."""
    data = PreferenceDataModule(
        SyntheticPairs("conflicting_groups", num_users=120, pairs_per_user=60, num_objectives=1, noise=0.0),
        HashingBackbone(),
        cache_dir=str(tmp_path / "cache"),
        prompt_features=True,
        max_support=5,
        shots=[],
    )
    torch.manual_seed(0)
    groups = {"projector": {"lr": 0.02}, "user_projectors": {"lr": 0.02}}
    method = PAL(
        data.num_users,
        data.feature_dim,
        num_prototypes=2,
        variant="B",
        head="angle",
        projector="mlp0-linear-dropout0-nobias",
        user_projector="mlp1-gelu-dropout0",
        dim=8,
        groups=groups,
    )
    fit(method, data, tmp_path, epochs=100)
    unseen = list(data.test_dataloader()[1])
    personal, shared = (
        np.mean([accuracy(method, batch, key) for batch in unseen]) for key in ("margin", "population_margin")
    )
    assert personal >= 0.9 and shared < 0.65
