"""PAL's users: the posterior of their logits against SciPy, few shots, fits, and what a planted world gives back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, softmax
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from plm.backbones import HashingBackbone
from plm.data.datamodule import PreferenceDataModule
from plm.data.sources.synthetic import SyntheticPairs
from plm.functional import PairList, expected_losses, fit_gaussian, fit_simplex
from plm.methods.pal import PAL
from plm.methods.pal.geometry import Points, as_double, cache_of
from plm.methods.pal.measures import mean_kl, prototype_usage
from plm.methods.pal.seen import PRIOR_SCALES
from plm.methods.pal.solver import fit_deviations, linearised
from plm.methods.pal.users import Prior, Solvable, centre_step, solve_around, solve_logits
from plm.testing import PlantedData, quiet_trainer, saved
from plm.types import Context, PreferenceBatch
from tests.marks import slow_but

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
    state = method.adapt(Context(chosen, -chosen, mask, torch.ones(6, 2)))
    weights = method._served(state.tensors["weights"], state.num_pairs)
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
    prior = float(method.population_state(1).tensors["log_precision"][0].trace())
    assert all(float(state.tensors["log_precision"][0].trace()) > prior for state in states)


# ---------------------------------------------------------------------- what a fit says of itself
def test_usage_of_prototypes_by_hand() -> None:
    """Six users: three, two and one are nearest to the first three of four prototypes."""
    weights = torch.eye(4)[torch.tensor([0, 0, 0, 1, 1, 2])]
    entropy = -sum(share * np.log(share) for share in (3 / 6, 2 / 6, 1 / 6))
    usage = prototype_usage(weights)
    assert usage == pytest.approx(
        {"effective_prototypes": np.exp(entropy), "dead_prototypes": 1.0, "assignment_entropy": 0.0}, rel=1e-5
    )
    alike = prototype_usage(torch.full((5, 4), 0.25))
    assert alike == pytest.approx(
        {"effective_prototypes": 1.0, "dead_prototypes": 3.0, "assignment_entropy": np.log(4)}, rel=1e-5
    )
    assert all(np.isnan(value) for value in prototype_usage(torch.zeros(0, 4)).values())


def test_kl_of_users_is_that_of_torch() -> None:
    root, deviation, scale = draw(5, K, K), draw(5, K, seed=1), torch.tensor(0.7).double()
    precision = root @ root.mT + torch.eye(K)
    posterior = MultivariateNormal(deviation, precision_matrix=precision)
    prior = MultivariateNormal(torch.zeros(K).double(), scale_tril=scale * torch.eye(K).double())
    expected = kl_divergence(posterior, prior).mean()
    assert mean_kl(deviation, precision, scale) == pytest.approx(float(expected), rel=1e-9)
    assert mean_kl(deviation * 0, (torch.eye(K) / scale**2).expand(5, K, K), scale) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("options", slow_but([{}, {"users": "table", "lr": 0.1}], {}))
def test_report_tells_personal_users_from_shuffled_ones(options: dict[str, Any], tmp_path: Path) -> None:
    reports = []
    for shuffle in (False, True):
        data = PlantedData(num_users=60, pairs_per_user=30, num_test=20, shuffle_users=shuffle)
        torch.manual_seed(0)
        method = fit(PAL(60, 8, num_prototypes=4, residual="bradley_terry", **options), data, tmp_path)
        reports.append(method.report())
        again = PAL(60, 8, num_prototypes=4, residual="bradley_terry", **options)
        again.load_state_dict(method.state_dict())
        assert again.report() == method.report()
    assert reports[0].keys() == {"kl", "effective_prototypes", "dead_prototypes", "assignment_entropy"}
    assert reports[0]["kl"] > 1.0 and reports[0]["effective_prototypes"] > 2
    if not options:
        assert reports[1]["kl"] < 0.1


# ---------------------------------------------------------------------- fits
@pytest.mark.slow
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
    with pytest.raises(ValueError, match="residual reference needs a backbone with a reward head"):
        fit(PAL(12, 8, residual="reference"), data, tmp_path, epochs=1)
    data.reference_head = data.directions[0]
    options: dict[str, Any] = {"users": "table", "freeze": ["base"], "head": "dist_squared", "conditioning": "none"}
    method = fit(PAL(12, 8, residual="reference", **options), data, tmp_path, epochs=1)
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
    users = method.user_states(batch.user_index)
    with pytest.raises(ValueError, match="prompt_features: true, or give score the prompts"):
        method.score(batch.chosen, users)
    assert isinstance(batch.chosen, Tensor) and isinstance(batch.rejected, Tensor)
    with torch.no_grad():
        sides = (method.score(side, users, prompt_features=prompt) for side in (batch.chosen, batch.rejected))
        torch.testing.assert_close(torch.stack(list(sides)).diff(dim=0)[0], -method.margin(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
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


# ---------------------------------------------------------------------- what users do to it
MODES: dict[str, dict[str, Any]] = {
    "posterior": {"residual": "bradley_terry"},
    "table": {
        "users": "table",
        "head": "dist",
        "loss": "hinge",
        "user_learner": "f(Pw)",
        "projector": "mlp1-relu-dropout0-batchnorm",
    },
    "B": {"variant": "B", "head": "angle", "projector": "mlp1-gelu-dropout5"},
}


@pytest.mark.parametrize("mode", MODES)
def test_resuming_a_fit_changes_nothing(mode: str, tmp_path: Path) -> None:
    """Interrupted after six of twelve epochs and resumed from the checkpoint: the same bits as without a break."""

    class Break(L.Callback):
        def __init__(self, at: int) -> None:
            self.at = at

        def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            torch.manual_seed(trainer.current_epoch)  # of what is drawn in an epoch

        def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.current_epoch == self.at:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                trainer.should_stop = True

    data, states = PlantedData(num_users=6), []
    for at, path in ((-1, None), (5, None), (-1, tmp_path / "half.ckpt")):
        torch.manual_seed(len(states))
        method = PAL(6, 8, num_prototypes=3, **MODES[mode])
        if not states:
            start = method.state_dict()
            start = {name: value.clone() for name, value in start.items()}
        method.load_state_dict(start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = quiet_trainer(tmp_path, max_epochs=12, check_val_every_n_epoch=3, callbacks=[Break(at)])
            trainer.fit(method, datamodule=data, ckpt_path=path)
        states.append({name: value.clone() for name, value in method.state_dict().items()})
    full, half, resumed = states
    assert all(torch.equal(full[name], value) for name, value in resumed.items())
    assert not all(torch.equal(full[name], value) for name, value in half.items())


@pytest.mark.parametrize("mode", MODES)
def test_features_of_another_precision(mode: str, tmp_path: Path) -> None:
    """Half-precision features are read in the precision of the method; so do fits under bfloat16 autocast work."""
    data = PlantedData(num_users=5)
    torch.manual_seed(0)
    method = fit(PAL(5, 8, num_prototypes=3, **MODES[mode]), data, tmp_path, epochs=4, precision="bf16-mixed")
    batch, context = data.test_batch, data.context
    users = method.user_states(batch.user_index)
    assert (
        isinstance(batch.chosen, Tensor) and isinstance(context.chosen, Tensor) and isinstance(context.rejected, Tensor)
    )
    with torch.no_grad():
        expected = method.score(batch.chosen, users)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            found = method.score(batch.chosen.to(dtype), users)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
            state = method.adapt(context._replace(chosen=context.chosen.to(dtype), rejected=context.rejected.to(dtype)))
            assert all(value.dtype == torch.float32 for value in state.tensors.values())


@pytest.mark.parametrize("mode", MODES)
def test_small_worlds(mode: str, tmp_path: Path) -> None:
    """One user; one pair per user; more prototypes than users; one prototype; ties alone; the same response twice."""
    options = MODES[mode]
    alone = PlantedData(num_users=1, num_unseen=1)
    short = PlantedData(num_users=2, pairs_per_user=1, num_test=1, num_unseen=2, num_shots=1)
    tied = PlantedData(num_users=3)
    tied.train_batch = tied.train_batch._replace(tie=torch.ones_like(tied.train_batch.tie))
    same = PlantedData(num_users=3)
    same.train_batch = same.train_batch._replace(rejected=same.train_batch.chosen)
    for data, num_prototypes in ((alone, 3), (short, 2), (tied, 20), (same, 2), (PlantedData(num_users=3), 1)):
        torch.manual_seed(0)
        method = fit(PAL(data.num_users, 8, num_prototypes=num_prototypes, **options), data, tmp_path, epochs=4)
        with torch.no_grad():
            facts = [method.evaluate(batch) for batch in (data.test_batch, data.unseen_batch)]
        assert all(value.isfinite().all() for fact in facts for value in fact.values())
        assert np.isfinite(list(method.report().values())).all()
        if num_prototypes == 1:
            assert torch.equal(facts[1]["margin"], facts[1]["population_margin"])


def test_new_users_are_as_far_from_the_population_as_their_pairs_show() -> None:
    """The mode is SciPy's, weights of pairs are scaled to mean one, and the evidence is Laplace's with the curvature
    of the tangent; ``users: table`` is served the mode, as published."""
    torch.manual_seed(0)
    data = PlantedData(num_users=4, num_unseen=3, num_shots=6, spread=2.0)
    context = data.context._replace(weight=torch.rand(3, 6) + 0.2)
    centre = torch.tensor([0.3, -0.2, 0.1]).double()
    for users in ("posterior", "table"):
        method = PAL(4, 8, num_prototypes=K, users=users, temperature=1.0).double()  # type: ignore[arg-type]
        method.prior_centre.copy_(centre)
        method.prior_scale.fill_(0.7)
        state = method.adapt(context)
        pairs = method._solvable(context.pairs)
        for user in range(3):
            rows = pairs.row == user
            weight = (pairs.weight[rows] / pairs.weight[rows].mean()).double().numpy()
            cache = cache_of(as_double(pairs.cache), rows.nonzero()[:, 0])

            def margins(logits: Tensor, method: Any = method, cache: Any = cache, count: int = len(weight)) -> Tensor:
                return method._logit_margins(cache, logits.expand(count, -1))

            def objective(v: np.ndarray, margins: Any = margins, weight: np.ndarray = weight) -> float:
                logits = centre + 0.7 * torch.from_numpy(v)
                return float(weight @ np.logaddexp(0, -margins(logits).detach().numpy()) + 0.5 * v @ v)

            best = minimize(objective, np.zeros(K), method="BFGS", options={"gtol": 1e-9}).x
            logits = centre + 0.7 * torch.from_numpy(best)
            slopes = torch.autograd.functional.jacobian(margins, logits).numpy() * 0.7
            chance = expit(margins(logits).detach().numpy())
            hessian = slopes.T @ (slopes * (weight * chance * (1 - chance))[:, None]) + np.eye(K)
            differs = expit(objective(np.zeros(K)) - objective(best) - np.linalg.slogdet(hessian)[1] / 2)
            share = differs if users == "posterior" else 1.0
            expected = softmax(centre.numpy() + share * 0.7 * best)
            np.testing.assert_allclose(state.tensors["weights"][user].numpy(), expected, atol=2e-4)
            assert 0.05 < differs < 0.95


def test_a_user_the_checkpoint_does_not_know_starts_at_its_prior(tmp_path: Path) -> None:
    data = PlantedData(num_users=8)
    for options in ({}, {"users": "table", "lr": 0.1}):
        method = fit(PAL(8, 8, num_prototypes=3, **options), data, tmp_path)  # type: ignore[arg-type]
        other = PAL(2, 8, num_prototypes=3, **options)  # type: ignore[arg-type]
        other.user_ids = ["newcomer", data.user_ids[3]]
        with saved(method) as path, pytest.warns(UserWarning, match="1 of 2 users are not in the checkpoint"):
            checkpoint = torch.load(path, weights_only=True)
            other.on_load_checkpoint(checkpoint)
        other.load_state_dict(checkpoint["state_dict"])
        with torch.no_grad():
            state, prior = other.user_states(torch.tensor([0])), other.population_state(1)
        for name, value in prior.tensors.items():
            torch.testing.assert_close(state.tensors[name], value)


def test_variant_b_without_prompts_warns(tmp_path: Path) -> None:
    method = PAL(12, 8, num_prototypes=2, variant="B", head="angle", projector="mlp0-linear-dropout0")
    with pytest.warns(UserWarning, match=r"set data\.prompt_features: true"):
        quiet_trainer(tmp_path, max_epochs=1).fit(method, datamodule=PlantedData())


# ---------------------------------------------------------------------- the centre of the prior
def test_one_step_finds_the_centre_of_normal_users() -> None:
    """Users who say N(m_u, 1 / a_u) have modes (a m + c / s^2) / (a + 1 / s^2), and are normal around c with variance
    1 / a + s^2; c is normal around 0 with variance 1: c = sum_u w m / (1 + sum_u w) with w = 1 / (1 / a + s^2), from
    whatever centre, and where the spread is small, too."""
    told, mean = torch.tensor([0.5, 2.0, 8.0]).double(), torch.tensor([1.0, -2.0, 3.0]).double()
    for number in (1e-3, 0.3, 2.0):
        scale, centre = torch.tensor(number).double(), torch.tensor([7.0]).double()
        precision = told + 1 / scale**2
        mode = (told * mean + centre / scale**2) / precision
        step = centre_step(centre, (mode - centre)[:, None], precision[:, None, None], scale)
        weight = 1 / (1 / told + scale**2)
        assert float(centre + step) == pytest.approx(float((weight * mean).sum() / (1 + weight.sum())), rel=1e-6)
    nobody = centre_step(centre, mode[:0, None], precision[:0, None, None], scale)
    assert float(centre + nobody) == pytest.approx(0.0)


def bent(num_won: int, start: float) -> list[float]:
    """Users of whom each prefers so many of 20 pairs, whose margin is 6 tanh of their logits' difference / 0.6.

    Returns:
        Their common margin at the centre that is found at one spread after another.
    """
    target, user, ones = (torch.arange(400) % 20 < num_won).double(), torch.arange(400) // 20, torch.ones(400).double()

    def margins(cache: Any, logits: Tensor) -> Tensor:
        return 6 * cache.base * (torch.softmax(logits / 0.3, -1) @ torch.tensor([1.0, -1.0]).double())

    pairs = Solvable(Points(ones[:, None], ones[:, None], ones), target, ones, user)

    def evidence(prior: Prior, logits: Tensor, precision: Tensor) -> float:
        losses = np.logaddexp(0, ((1 - 2 * target) * margins(pairs.cache, logits[user])).numpy()).sum()
        squares = ((logits - prior.centre) / prior.scale).square().sum() + prior.centre.square().sum()
        return float(-losses - squares / 2 - torch.logdet(precision * prior.scale**2).sum() / 2)

    prior = Prior(torch.tensor([start, -start]).double(), torch.tensor(1.0).double())
    logits, found = prior.centre.expand(20, -1), []
    for scale in PRIOR_SCALES:
        logits, _, prior = solve_around(
            lambda prior, start: solve_logits(margins, pairs, prior, start),
            evidence,
            prior._replace(scale=torch.tensor(scale).double()),
            logits,
            user.bincount() > 0,
        )
        found.append(float(margins(pairs.cache, prior.centre.expand(400, -1))[0]))
    return found


@pytest.mark.parametrize("num_won", [11, 13, 15])
@pytest.mark.parametrize("start", [-4.0, -0.5, -0.3, -0.2, 0.3, 0.8, 4.0])
def test_the_centre_is_not_lost_where_no_pair_says_anything(num_won: int, start: float) -> None:
    """Newton's steps on a tanh lead to its ends, where it is flat; 11 of 20 are likeliest at log(11 / 9), which is
    found from everywhere before the last spread."""
    assert bent(num_won, start)[-1] == pytest.approx(float(np.log(num_won / (20 - num_won))), abs=0.15)


def test_the_centre_stays_where_users_can_differ(tmp_path: Path) -> None:
    """Near their prototypes, at a low temperature, the steps of a fit led the centre to 203 for good."""
    torch.manual_seed(0)
    method = fit(
        PAL(30, 8, num_prototypes=2, temperature=0.3),
        PlantedData(30, feature_dim=8, pairs_per_user=20),
        tmp_path,
        epochs=12,
        check_val_every_n_epoch=1,
    )
    assert method.prior_centre.abs().max() < 2 and method.logits.std(0).max() > 0.01


def test_the_evidence_of_all_pairs_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per user -loss - |v|^2 / 2 - log det(H) / 2 with deviation v and precision H in units of the spread, and the
    centre's own density; whoever has no pairs adds nothing."""
    data = PlantedData(6, feature_dim=8, pairs_per_user=5)
    torch.manual_seed(0)
    method = fit(PAL(7, 8, num_prototypes=K), data, tmp_path, epochs=2)
    monkeypatch.setattr(method, "sum_over_processes", lambda values: 2 * values)  # two processes that say the same
    batch = next(iter(data.train_dataloader()))
    batch = batch._replace(weight=1.0 + torch.arange(len(batch.weight)) % 3)
    train, prior = [method._solvable(batch)], Prior(draw(K) / 5, torch.tensor(0.7).double())
    with torch.no_grad():
        logits, precision = solve_logits(method._logit_margins, train[0], prior, prior.centre.expand(7, -1))
        margins = method._logit_margins(as_double(train[0].cache), logits[batch.user_index]).numpy()
        found = method._evidence(train, prior, logits, precision)
    expected, user = -0.5 * float(prior.centre.square().sum()), batch.user_index.numpy()
    for row in range(6):
        own = batch.weight.numpy()[user == row] / batch.weight.numpy()[user == row].mean()
        v, h = ((logits[row] - prior.centre) / 0.7).numpy(), (precision[row] * 0.49).double().numpy()
        expected -= own @ np.logaddexp(0, -margins[user == row]) + v @ v / 2 + np.linalg.slogdet(h)[1] / 2
    assert found == pytest.approx(2 * expected, rel=1e-5)


def test_the_population_is_where_seen_users_are(tmp_path: Path) -> None:
    """Features of unequal length pull everybody's logits one way, which the prior's centre follows."""
    data = PlantedData(20, feature_dim=8, pairs_per_user=20)
    data.change(lambda chosen, rejected: (chosen + 4, rejected + 4))
    torch.manual_seed(0)
    method = fit(PAL(20, 8, num_prototypes=3, head="dist_squared", conditioning="none"), data, tmp_path, epochs=15)
    assert method.prior_centre.abs().max() > 0.1
    torch.testing.assert_close(method.logits.mean(0), method.prior_centre, atol=0.02, rtol=0)
