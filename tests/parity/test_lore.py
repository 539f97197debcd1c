"""LoRe against independent transcriptions: the paper's equations in NumPy, SciPy and scikit-learn."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from plm.functional import Posterior, targets
from plm.methods.lore import LoRe, PublishedLoRe
from plm.methods.lore.maths import cosine_anchor, evidence_losses, kept_bases, l2_anchor, warm_up
from plm.methods.lore.model import PRIOR_SCALES
from plm.testing import PlantedData, quiet_trainer
from plm.types import PreferenceBatch, UserState

USERS, DIM, BASES, TAU = 5, 7, 3, 10.0


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(count: int = 40, dim: int = DIM, ties: bool = True) -> PreferenceBatch:
    """Pairs in float64 with uneven users, weights of mean one, and ties."""
    user = torch.arange(count) ** 2 % USERS
    weight = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    tie = torch.arange(count) % 6 == 0 if ties else torch.zeros(count, dtype=torch.bool)
    return PreferenceBatch(draw(count, dim, seed=1), draw(count, dim, seed=2), user, weight, tie)


def lore(num_bases: int = BASES, dim: int = DIM, **options: Any) -> LoRe:
    torch.manual_seed(0)
    return LoRe(USERS, dim, num_bases=num_bases, **options).double()


def published(num_bases: int = BASES, **options: Any) -> PublishedLoRe:
    torch.manual_seed(0)
    return PublishedLoRe(USERS, DIM, num_bases=num_bases, **options).double()


def fit(method: Any, data: PlantedData, folder: Path, *callbacks: L.Callback, epochs: int = 30) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(folder, max_epochs=epochs, callbacks=list(callbacks), log_every_n_steps=1).fit(
            method, datamodule=data
        )
    method.trainer = None
    return method


class Losses(L.Callback):
    def __init__(self) -> None:
        self.loss: list[float] = []
        self.nll: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.loss.append(float(trainer.callback_metrics["train/loss"]))
        self.nll.append(float(trainer.callback_metrics["train/nll"]))


# ---------------------------------------------------------------------- the published model
def test_factored_step_equals_the_dense_one_forward_and_backward() -> None:
    """The published formulation makes all pairs x users logits and picks one column; so does this transcription."""
    method, batch = published(temperature=TAU), batch_of()
    loss = method.loss(batch)["loss"]
    loss.backward()  # type: ignore[no-untyped-call]

    bases, logits = (p.detach().clone().requires_grad_() for p in (method.bases, method.weight_logits))
    difference = batch.chosen - batch.rejected  # type: ignore[operator]
    dense = difference @ (bases @ torch.softmax(logits, -1).T) / TAU  # (B, U)
    margin = dense[torch.arange(batch.num_pairs), batch.user_index]
    target = torch.where(batch.tie, 0.5, 1.0)
    losses = -(target * torch.log(torch.sigmoid(margin)) + (1 - target) * torch.log(torch.sigmoid(-margin)))
    expected = (batch.weight * losses).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert abs(loss.item() - expected.item()) < 1e-9
    for ours, theirs in ((method.bases, bases), (method.weight_logits, logits)):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-9)


def test_gradients_are_the_closed_forms() -> None:
    """grad V = -X' [(c s) W[y]] / tau; grad omega_u = w_u (g_u - <w_u, g_u>) with g_u = -sum c s Z / tau."""
    method, batch = published(temperature=TAU), batch_of(ties=False)
    method.loss(batch)["loss"].backward()  # type: ignore[no-untyped-call]
    x, y = (batch.chosen - batch.rejected).numpy(), batch.user_index.numpy()  # type: ignore[operator]
    v, w = method.bases.detach().numpy(), torch.softmax(method.weight_logits, -1).detach().numpy()
    z = x @ v
    pull = batch.weight.numpy() / len(y) * expit(-(z * w[y]).sum(1) / TAU)
    grad_v = -x.T @ (pull[:, None] * w[y]) / TAU
    g = np.zeros_like(w)
    np.add.at(g, y, -pull[:, None] * z / TAU)
    assert method.bases.grad is not None and method.weight_logits.grad is not None
    assert np.allclose(method.bases.grad.numpy(), grad_v, atol=1e-12)
    assert np.allclose(method.weight_logits.grad.numpy(), w * (g - (w * g).sum(1, keepdims=True)), atol=1e-12)


def test_order_of_bases_and_names_of_users_do_not_matter() -> None:
    method, batch = published(), batch_of()
    before = method.loss(batch)["loss"].item()
    order, names = torch.tensor([2, 0, 1]), torch.tensor([3, 4, 0, 1, 2])
    with torch.no_grad():
        method.bases.copy_(method.bases[:, order].clone())
        method.weight_logits.copy_(method.weight_logits[:, order].clone())
        assert method.loss(batch)["loss"].item() == pytest.approx(before, abs=1e-12)
        renamed = torch.empty_like(method.weight_logits)
        renamed[names] = method.weight_logits
        method.weight_logits.copy_(renamed)
    assert method.loss(batch._replace(user_index=names[batch.user_index]))["loss"].item() == pytest.approx(
        before, abs=1e-12
    )


def test_a_basis_without_weight_changes_nothing() -> None:
    small, large, batch = lore(), lore(num_bases=BASES + 1), batch_of()
    with torch.no_grad():
        large.bases[:, :BASES] = small.bases
        weights = draw(batch.num_pairs, BASES)
        padded = torch.cat([weights, torch.zeros(batch.num_pairs, 1)], 1)
        ones = torch.ones(batch.num_pairs).long()
        assert torch.allclose(
            small.margin(batch, UserState({"weights": weights}, ones)),
            large.margin(batch, UserState({"weights": padded}, ones)),
        )


@pytest.mark.parametrize("make", [published, lore])
def test_loss_and_gradient_are_finite_at_huge_margins(make: Any) -> None:
    method, batch = make(temperature=1e-4).float(), batch_of(ties=False)
    with torch.no_grad():
        method.bases[:, 0] = 1.0
    batch = batch._replace(chosen=batch.chosen.float(), rejected=batch.rejected.float(), weight=batch.weight.float())  # type: ignore[union-attr]
    with torch.no_grad():
        assert method.margin(batch).abs().max() > 1e4
    method.num_train_pairs = 1
    loss = method.loss(batch)["loss"]
    loss.backward()
    assert loss.isfinite() and (loss > 1e3 or make is lore)  # users who deviate at will soon fit their pairs
    assert method.bases.grad is not None and method.bases.grad.isfinite().all()


def test_anchors_and_their_gradients_are_the_closed_forms() -> None:
    bases, reference = draw(DIM, BASES).requires_grad_(), draw(DIM, seed=3)
    value = cosine_anchor(bases, reference)
    (gradient,) = torch.autograd.grad(value, bases)
    v, s = bases.detach().numpy(), reference.numpy()
    length = np.linalg.norm(v, axis=0)
    unit, s = v / length, s / np.linalg.norm(s)
    cosine = s @ unit
    assert value.item() == pytest.approx((1 - cosine).mean(), abs=1e-12)
    assert np.allclose(gradient.numpy(), -(s[:, None] - cosine * unit) / length / BASES, atol=1e-12)
    value = l2_anchor(bases, reference)
    (gradient,) = torch.autograd.grad(value, bases)
    assert value.item() == pytest.approx(((v - reference.numpy()[:, None]) ** 2).sum())
    assert np.allclose(gradient.numpy(), 2 * (v - reference.numpy()[:, None]))


def test_warm_up_values() -> None:
    shares = {0.0: 0, 0.1999: 0, 0.2: 0, 0.35: 0.25, 0.5: 0.5, 0.65: 0.75, 0.8: 1, 0.9: 1, 1.0: 1}
    assert {share: pytest.approx(value, abs=1e-12) for share, value in shares.items()} == {
        share: warm_up(share) for share in shares
    }


@pytest.mark.parametrize("num_bases", [1, 2])
@pytest.mark.parametrize("optimization", ["joint", "alternating"])
def test_the_anchor_warms_up_over_the_training_steps(optimization: Any, num_bases: int, tmp_path: Path) -> None:
    data, losses = PlantedData(USERS, feature_dim=DIM), Losses()
    data.reference_head = torch.ones(DIM)
    method = PublishedLoRe(
        USERS, DIM, num_bases=num_bases, anchor="l2", anchor_strength=3.0, optimization=optimization, lr=1e-9
    )
    expected = 3.0 * l2_anchor(method.bases.detach(), torch.ones(DIM)).item()
    fit(method, data, tmp_path, losses, epochs=10)
    shares = [(loss - nll) / expected for loss, nll in zip(losses.loss, losses.nll, strict=True)]
    assert shares == pytest.approx([max(0, min(1, (step / 10 - 0.2) / 0.6)) for step in range(10)], abs=1e-3)


def test_the_precision_of_published_users_is_that_at_their_own_weights() -> None:
    """Few steps of Adam end elsewhere than the optimum: sum_n p (1 - p) x x' at the weights that are served."""
    torch.manual_seed(3)
    method, data = (
        PublishedLoRe(USERS, DIM, num_bases=3, adapt_solver="adam", prior_precision=0.1),
        PlantedData(USERS, feature_dim=DIM, num_shots=5),
    )
    state = method.adapt(data.context)
    weights, bases = state.tensors["weights"].double(), method._bases().detach().double()
    margins = data.context.difference.double() @ bases  # (U, S, K)
    chance = torch.sigmoid((margins * weights[:, None]).sum(-1))
    expected = torch.einsum("us,usj,usk->ujk", chance * (1 - chance), margins, margins) + 5 * 0.1 * torch.eye(3)
    torch.testing.assert_close(state.tensors["precision"].double(), expected, atol=1e-4, rtol=1e-4)


def test_pruning_keeps_the_heaviest_and_renormalises() -> None:
    weights = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.0, 0.2]])
    assert kept_bases(weights, 0.0).tolist() == [True] * 3
    assert kept_bases(weights, 0.25).tolist() == [True, True, False]
    assert kept_bases(weights, 0.9).tolist() == [True, False, False]
    for num_bases in (1, 2, 200):  # uniform weights of 200 bases are all below a threshold of 0.01
        assert kept_bases(torch.full((3, num_bases), 1 / num_bases), 0.01).any()


def test_pruning_a_negligible_basis_changes_next_to_nothing() -> None:
    plain, pruned = published(), published(prune_below=0.01)
    with torch.no_grad():
        for method in (plain, pruned):
            method.weight_logits[:, 1] = -12.0
            method.kept.copy_(kept_bases(torch.softmax(method.weight_logits, -1), method.prune_below))
        index = torch.arange(USERS)
        before, after = (method.user_states(index).tensors["weights"] for method in (plain, pruned))
        assert (after[:, 1] == 0).all() and torch.allclose(after.sum(-1), torch.ones(USERS).double())
        assert (before - after).abs().max() < 1e-4
        margins = [method.margin(batch_of()) for method in (plain, pruned)]
    assert torch.allclose(*margins, atol=1e-3)


@pytest.mark.parametrize("optimization", ["joint", "alternating"])
def test_published_training_lowers_the_loss(optimization: Any, tmp_path: Path) -> None:
    data, losses = PlantedData(20, pairs_per_user=40, feature_dim=DIM, rank=3), Losses()
    fit(PublishedLoRe(20, DIM, num_bases=4, optimization=optimization, lr=0.1), data, tmp_path, losses, epochs=60)
    assert losses.nll[-1] < 0.75 * losses.nll[0] and losses.nll[-1] < 0.5


def test_alternating_moves_weights_first_and_then_bases(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            seen.append((module.weight_logits.detach().clone(), module.bases.detach().clone()))

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            seen.append((module.weight_logits.detach().clone(), module.bases.detach().clone()))

    method = PublishedLoRe(USERS, DIM, num_bases=2, optimization="alternating", lr=0.1, user_lr=0.3)
    fit(method, PlantedData(USERS, feature_dim=DIM), tmp_path, Watch(), epochs=1)
    (weights_0, bases_0), (weights_1, bases_1), (weights_2, bases_2) = seen
    assert torch.equal(bases_0, bases_1) and torch.equal(weights_1, weights_2)
    # the first step of Adam is its learning rate in every coordinate
    assert torch.allclose((weights_1 - weights_0).abs(), torch.tensor(0.3), rtol=1e-3)
    assert torch.allclose((bases_2 - bases_1).abs(), torch.tensor(0.1), rtol=1e-3)


# ---------------------------------------------------------------------- special cases
def pooled(batch: PreferenceBatch, scale: float, ridge: float) -> np.ndarray:
    """scikit-learn's ridge-penalised logistic regression without intercept; a tie is half a win and half a loss."""
    x = (batch.chosen - batch.rejected).numpy() / scale  # type: ignore[operator]
    target, weight = targets(batch.tie).numpy(), batch.weight.numpy()
    rows, labels = np.concatenate([x, x]), np.repeat([1, 0], len(x))
    model = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(rows, labels, sample_weight=np.concatenate([weight * target, weight * (1 - target)]) + 1e-300)
    coefficients: np.ndarray = model.coef_[0]
    return coefficients


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_one_basis_is_pooled_logistic_regression(ridge: float) -> None:
    """At scikit-learn's optimum our gradient vanishes, and weights have none at all."""
    batch = batch_of(60)
    method = lore(num_bases=1, ridge=ridge, temperature=2.0)
    method.num_train_pairs = batch.num_pairs
    optimum = torch.from_numpy(pooled(batch, 2.0, ridge))
    with torch.no_grad():
        method.bases[:, 0] = optimum
    method.loss(batch)["loss"].backward()  # type: ignore[no-untyped-call]
    assert method.bases.grad is not None and method.bases.grad.abs().max() < 1e-6
    assert not any(p.requires_grad for name, p in method.named_parameters() if name != "bases")
    responses = draw(3, DIM)
    assert torch.allclose(method.score(responses), responses @ optimum / 2.0)


def test_one_basis_trains_to_the_pooled_optimum(tmp_path: Path) -> None:
    data = PlantedData(USERS, pairs_per_user=40, feature_dim=DIM)
    method = fit(LoRe(USERS, DIM, num_bases=1, ridge=1.0), data, tmp_path, epochs=400)
    optimum = pooled(data.train_batch, float(method.feature_scale), 1.0)
    assert np.allclose(method.bases.detach().numpy()[:, 0], optimum, atol=2e-3)


def test_simplex_with_one_basis_leaves_the_weights_without_gradient() -> None:
    method = published(num_bases=1)
    assert not method.weight_logits.requires_grad
    method.loss(batch_of())["loss"].backward()  # type: ignore[no-untyped-call]
    assert method.weight_logits.grad is None
    assert torch.equal(method.user_states(torch.arange(USERS)).tensors["weights"], torch.ones(USERS, 1).double())


@pytest.mark.parametrize("temperature", [1.0, None])
def test_no_basis_is_the_reference_head(temperature: float | None, tmp_path: Path) -> None:
    """Its very logits."""
    data, head = PlantedData(USERS, feature_dim=DIM), torch.linspace(-1, 1, DIM)
    data.reference_head = head
    method = fit(LoRe(USERS, DIM, num_bases=0, temperature=temperature), data, tmp_path, epochs=2)
    batch = data.test_batch
    logits = (batch.chosen - batch.rejected) @ head  # type: ignore[operator]
    with torch.no_grad():
        margin = method.margin(batch)
        unseen = method.margin(data.unseen_batch)
    assert torch.allclose(margin, logits, atol=1e-5) and torch.equal(margin > 0, logits > 0)
    difference = data.unseen_batch.chosen - data.unseen_batch.rejected  # type: ignore[operator]
    assert torch.allclose(unseen, difference @ head, atol=1e-5)


# ---------------------------------------------------------------------- few-shot adaptation
@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict[type, tuple[Any, PlantedData]]:
    out: dict[type, tuple[Any, PlantedData]] = {}
    for method_class in (PublishedLoRe, LoRe):
        options = {"prior_precision": 0.1} if method_class is PublishedLoRe else {}
        data = PlantedData(20, feature_dim=DIM, rank=3, num_unseen=4)
        method = method_class(20, DIM, num_bases=3, lr=0.1, **options)
        out[method_class] = fit(method, data, tmp_path_factory.mktemp("fit"), epochs=100), data
    return out


def design_of(method: Any, data: PlantedData, user: int) -> np.ndarray:
    """``(S, K)`` margins of a user's support along each basis, read off the public score."""
    chosen, rejected = (side[user] for side in data.context.features)
    columns = []
    for k in range(3):
        weights = torch.zeros(len(chosen), 3)
        weights[:, k] = 1.0
        users = UserState({"weights": weights}, torch.ones(len(chosen)).long())
        with torch.no_grad():
            columns.append(method.score(chosen, users) - method.score(rejected, users))
    return torch.stack(columns, 1).double().numpy()


def test_adapted_weights_are_the_posterior_mean(fitted: dict[type, tuple[Any, PlantedData]]) -> None:
    """Of users who are the population or drawn from the normal prior that ``population_state`` states, at even odds.

    The mode of the second is SciPy's; its evidence is Laplace's, relative to that of the prior mean alone.
    """
    method, data = fitted[LoRe]
    state, prior = method.adapt(data.context), method.population_state(1)
    mean, precision = (prior.tensors[name][0].detach().double().numpy() for name in ("weights", "precision"))
    for user in range(4):
        design = design_of(method, data, user)

        def objective(w: np.ndarray, design: np.ndarray = design) -> float:
            return float(np.logaddexp(0, -design @ w).sum() + 0.5 * (w - mean) @ precision @ (w - mean))

        best = minimize(objective, mean, method="BFGS", options={"gtol": 1e-9})
        chance = expit(design @ best.x)
        hessian = design.T @ (design * (chance * (1 - chance))[:, None]) + precision
        drop = objective(mean) - objective(best.x)
        differs = expit(drop + (np.linalg.slogdet(precision)[1] - np.linalg.slogdet(hessian)[1]) / 2)
        expected = mean + differs * (best.x - mean)
        assert np.allclose(state.tensors["weights"][user].numpy(), expected, atol=1e-4)
        assert np.allclose(state.tensors["precision"][user].numpy(), hessian, rtol=1e-3, atol=1e-3)


def test_adapted_simplex_weights_are_the_papers_optimum(fitted: dict[type, tuple[Any, PlantedData]]) -> None:
    """Paper eq 11 with the pull to the mean user, by SciPy."""
    method, data = fitted[PublishedLoRe]
    state, centre = method.adapt(data.context), method.population_state(1).tensors["weights"][0].detach().numpy()
    for user in range(4):
        design = design_of(method, data, user)

        def objective(w: np.ndarray, design: np.ndarray = design) -> float:
            return float(np.logaddexp(0, -design @ w).mean() + 0.05 * ((w - centre) ** 2).sum())

        best = minimize(
            objective,
            np.full(3, 1 / 3),
            method="SLSQP",
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert np.allclose(state.tensors["weights"][user].numpy(), best.x, atol=1e-4)


# ---------------------------------------------------------------------- the evidence bound of our estimator
def posterior_of(num_pairs: int, tightness: float) -> tuple[Tensor, Tensor, Tensor, Posterior, Tensor]:
    """Pairs of two users and posteriors whose precision is ``tightness`` times a positive matrix."""
    design, offset = draw(num_pairs, BASES), draw(num_pairs, seed=4)
    root = draw(2, BASES, BASES, seed=5)
    precision = tightness * (root @ root.mT + torch.eye(BASES))
    user = torch.arange(num_pairs) % 2
    return (
        design,
        offset,
        targets(torch.arange(num_pairs) % 5 == 0).double(),
        Posterior(draw(2, BASES, seed=6), precision),
        user,
    )


def gauss_hermite(margin: np.ndarray, variance: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Expected loss under a normal margin, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    z = margin[:, None] + np.sqrt(variance)[:, None] * nodes
    losses = np.logaddexp(0, -z) + (1 - target[:, None]) * z
    expected: np.ndarray = losses @ weights / np.sqrt(2 * np.pi)
    return expected


@pytest.mark.parametrize(("tightness", "tolerance"), [(100.0, 2e-5), (10.0, 2e-3)])
def test_evidence_losses_are_expected_losses(tightness: float, tolerance: float) -> None:
    """Exact to second order: a ten times smaller variance leaves a hundred times smaller error."""
    design, offset, target, posterior, user = posterior_of(20, tightness)
    ours = evidence_losses(design, offset, target, posterior, user).numpy()
    margin = (offset + (design * posterior.mean[user]).sum(-1)).numpy()
    covariance = np.linalg.inv(posterior.precision.numpy())[user.numpy()]
    variance = np.einsum("nj,njk,nk->n", design.numpy(), covariance, design.numpy())
    assert variance.max() > 0.3 / tightness
    assert np.abs(ours - gauss_hermite(margin, variance, target.numpy())).max() < tolerance


def test_evidence_gradient_is_that_of_the_expected_loss_at_a_fixed_curvature() -> None:
    """d E[bt] / d offset = p - t; d / d design = (p - t) m + p (1 - p) H^-1 design, by hand."""
    design, offset, target, posterior, user = posterior_of(20, 100.0)
    design.requires_grad_(), offset.requires_grad_()
    evidence_losses(design, offset, target, posterior, user).sum().backward()  # type: ignore[no-untyped-call]
    x, mean = design.detach().numpy(), posterior.mean[user].numpy()
    chance = expit(offset.detach().numpy() + (x * mean).sum(1))
    covariance = np.linalg.inv(posterior.precision.numpy())[user.numpy()]
    error, curvature = chance - target.numpy(), chance * (1 - chance)
    by_design = error[:, None] * mean + curvature[:, None] * np.einsum("njk,nk->nj", covariance, x)
    assert offset.grad is not None and np.allclose(offset.grad.numpy(), error, atol=1e-12)
    assert design.grad is not None and np.allclose(design.grad.numpy(), by_design, atol=1e-12)


def test_evidence_gradient_agrees_with_quadrature_where_the_mean_is_the_population() -> None:
    design, offset, target, posterior, user = posterior_of(12, 100.0)
    posterior = posterior._replace(mean=torch.zeros_like(posterior.mean))
    design.requires_grad_()
    evidence_losses(design, offset, target, posterior, user).sum().backward()  # type: ignore[no-untyped-call]
    covariance = np.linalg.inv(posterior.precision.numpy())[user.numpy()]

    def expected(x: np.ndarray) -> np.ndarray:
        variance = np.einsum("nj,njk,nk->n", x, covariance, x)
        return gauss_hermite(offset.numpy(), variance, target.numpy())

    x, step = design.detach().numpy(), 1e-5
    assert design.grad is not None
    for k in range(BASES):
        shift = step * np.eye(BASES)[k]
        numeric = (expected(x + shift) - expected(x - shift)) / (2 * step)
        assert np.allclose(design.grad.numpy()[:, k], numeric, rtol=0.05, atol=1e-5)


def test_training_step_of_our_estimator_is_the_evidence_bound_plus_priors() -> None:
    """The loss after a converged Newton start, assembled by hand from its documented parts."""
    method, batch = lore(ridge=0.3, basis_ridge=2.0, temperature=2.0), batch_of()
    method.num_train_pairs = batch.num_pairs
    for _ in range(30):  # every call moves the users by one Newton step; they end at their modes
        loss = method.loss(batch)["loss"].item()
    x, y = (batch.chosen - batch.rejected).numpy() / 2.0, batch.user_index.numpy()  # type: ignore[operator]
    v, t, weight = method.bases.detach().numpy(), targets(batch.tie).numpy(), batch.weight.numpy()
    prior = method.population_state(1).tensors["precision"][0].detach().numpy()
    total, z = 0.0, x @ v
    for user in range(USERS):
        mine = y == user
        c = weight[mine] / weight[mine].mean()  # likelihood weights of mean one within the user

        def objective(w: np.ndarray, zu: Any = z[mine], tu: Any = t[mine], c: Any = c) -> float:
            margin, away = zu @ w, w - np.eye(BASES)[0]
            return float((c * (np.logaddexp(0, -margin) + (1 - tu) * margin)).sum() + 0.5 * away @ prior @ away)

        mode = minimize(objective, np.eye(BASES)[0], method="BFGS", options={"gtol": 1e-10}).x
        chance = expit(z[mine] @ mode)
        hessian = z[mine].T @ (z[mine] * (c * chance * (1 - chance))[:, None]) + prior
        variance = np.einsum("nj,jk,nk->n", z[mine], np.linalg.inv(hessian), z[mine])
        margin = z[mine] @ mode
        losses = np.logaddexp(0, -margin) + (1 - t[mine]) * margin + 0.5 * chance * (1 - chance) * variance
        total += float((weight[mine] * losses).sum())
    penalty = 0.5 * (0.3 * (v[:, 0] ** 2).sum() + 2.0 * (v[:, 1:] ** 2).sum())
    assert loss == pytest.approx((total + penalty) / batch.num_pairs, abs=1e-6)


def test_report_counts_the_directions_in_which_users_differ() -> None:
    """Against the singular values of the users' reward directions less their mean; none at all with one basis."""
    method = lore(BASES)
    method.bases.data, method.weights.data = draw(DIM, BASES), draw(USERS, BASES, seed=1)
    rewards = (method.weights @ method._bases().T).detach().numpy()
    variance = np.linalg.svd(rewards - rewards.mean(0), compute_uv=False) ** 2
    assert method.report() == {"effective_bases": pytest.approx(variance.sum() ** 2 / (variance**2).sum())}
    method.weights.data = method.weights[:1].expand(USERS, -1) + draw(USERS, 1) * draw(1, BASES)
    assert method.report()["effective_bases"] == pytest.approx(1.0)
    method.weights.data = method.weights[:1].expand(USERS, -1).clone()
    assert method.report()["effective_bases"] == 0.0
    assert lore(1).report() == {}


def test_one_base_is_no_direction_in_which_users_differ() -> None:
    assert PublishedLoRe(3, 4, num_bases=1).report() == {}


def test_few_solutions_are_held_while_a_spread_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and precisions of all users at every candidate would be nine times what is stored of them."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    solve = LoRe._solve

    def counted(self: LoRe, *args: Any) -> tuple[Tensor, Tensor]:
        nonlocal most
        solved = solve(self, *args)
        alive.append(weakref.ref(solved[1]))
        most = max(most, sum(one() is not None for one in alive))
        return solved

    monkeypatch.setattr(LoRe, "_solve", counted)
    method = fit(LoRe(40, 8, num_bases=2), PlantedData(40), tmp_path, epochs=2)
    assert len(alive) >= len(PRIOR_SCALES) and most <= 4
    assert float(method.prior_scale) > 0
