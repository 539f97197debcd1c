from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import plm.functional
from plm.functional import (
    PairList,
    bt_losses,
    fit_gaussian,
    fit_simplex,
    fit_simplex_by_adam,
    flatten_context,
    padded_users,
    per_user_sum,
    project,
    targets,
    unit_mean_per_user,
    user_chunks,
)
from plm.types import Context

K = 4


def test_features_are_projected_column_by_column_with_the_same_values_and_gradients() -> None:
    """A product whose second factor lies as columns is what torch's derivative of a product tells apart."""
    features = torch.randn(3, 50, 7, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(7, K, dtype=torch.float64, requires_grad=True)
    projected, product = project(features, directions), features @ directions
    weight = torch.randn_like(product)
    leaves = (features, directions)
    found, expected = (torch.autograd.grad((out * weight).sum(), leaves) for out in (projected, product))
    assert torch.allclose(projected, product, rtol=1e-12)
    assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(found, expected, strict=True))


def pair_list(counts: list[int], num_weights: int = K, seed: int = 0, scale: float = 1.0) -> PairList:
    """Pairs in random order, with offsets, weights and ties; users may have none."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(counts)
    user = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    user = user[torch.randperm(total, generator=draw)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    truth = normal(len(counts), num_weights)
    design, offset = scale * normal(total, num_weights), normal(total)
    margin = (design * truth[user]).sum(-1) + offset
    flip = torch.where(torch.rand(total, generator=draw) < torch.sigmoid(margin), 1.0, -1.0).double()
    target = targets(torch.rand(total, generator=draw) < 0.2).double()
    weight = 0.2 + 2 * torch.rand(total, generator=draw, dtype=torch.float64)
    return PairList(flip[:, None] * design, flip * offset, target, weight, user, len(counts))


def take(pairs: PairList, rows: Tensor) -> PairList:
    return PairList(*(value[rows] for value in pairs[:5]), pairs.num_users)


def alone(pairs: PairList, user: int) -> PairList:
    one = take(pairs, pairs.user == user)
    return one._replace(user=torch.zeros_like(one.user), num_users=1)


def loss_of(pairs: PairList, user: int) -> Callable[[np.ndarray], float]:
    """Summed loss of one user, written out pair by pair: the transcription solvers are held against."""
    rows = (pairs.user == user).nonzero()[:, 0].tolist()

    def loss(value: np.ndarray) -> float:
        total = 0.0
        for row in rows:
            margin = float(pairs.design[row].numpy() @ value + pairs.offset[row].item())
            wins, loses = math.log1p(math.exp(-margin)), math.log1p(math.exp(margin))
            target = pairs.target[row].item()
            total += pairs.weight[row].item() * (target * wins + (1 - target) * loses)
        return total

    return loss


# ---------------------------------------------------------------------- losses and sums
def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(plm.functional)
    assert result.failed == 0 and result.attempted >= 4


def test_loss_is_the_negative_log_likelihood_and_a_tie_is_half_of_each() -> None:
    margin = torch.linspace(-5, 5, 11, dtype=torch.float64)
    wins, loses = -torch.log(torch.sigmoid(margin)), -torch.log(torch.sigmoid(-margin))
    assert torch.allclose(bt_losses(margin, torch.ones(11)), wins, atol=1e-12)
    assert torch.allclose(bt_losses(margin, torch.full((11,), 0.5)), (wins + loses) / 2, atol=1e-12)
    assert targets(torch.tensor([True, False])).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_loss_and_gradient_stay_finite_at_huge_margins(size: float) -> None:
    margin = torch.tensor([size, -size], requires_grad=True)
    losses = bt_losses(margin, torch.ones(2))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.tolist() == [0.0, pytest.approx(size)]
    assert margin.grad is not None and margin.grad.tolist() == [0.0, -1.0]


def test_sums_and_weights_by_user() -> None:
    user = torch.tensor([2, 0, 2, 2])
    values = torch.arange(8.0).view(4, 2)
    assert per_user_sum(values, user, 4).tolist() == [[2, 3], [0, 0], [10, 13], [0, 0]]
    scaled = unit_mean_per_user(torch.tensor([1.0, 7.0, 2.0, 3.0]), user, 3)
    assert scaled.tolist() == [0.5, 1.0, 1.0, 1.5]
    assert unit_mean_per_user(torch.zeros(2), torch.tensor([0, 0]), 1).tolist() == [0, 0]  # no weight anywhere


def test_a_context_is_flattened_without_its_padding() -> None:
    mask = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    chosen = torch.arange(18.0).view(3, 3, 2)
    context = Context(
        chosen, -chosen, mask, torch.tensor([[1.0, 9, 3], [9, 5, 9], [9, 9, 9]]), tie=mask & (chosen[..., 0] > 4)
    )
    difference, target, weight, user = flatten_context(context)
    assert difference.tolist() == [[0, 2], [8, 10], [16, 18]]
    assert user.tolist() == [0, 0, 1] and target.tolist() == [1, 1, 0.5]
    assert weight.tolist() == [0.5, 1.5, 1.0]
    assert flatten_context(context._replace(tie=None))[1].tolist() == [1, 1, 1]


# ---------------------------------------------------------------------- users in chunks
@pytest.mark.parametrize("most", [1, 60, 400, 10**6])
def test_chunks_are_bounded_and_hold_every_user_and_pair_once(most: int) -> None:
    draw = torch.Generator().manual_seed(most)
    counts = (40 * torch.rand(60, generator=draw) ** 4).long().tolist()
    user, width, own = pair_list([*counts, 300, 0]).user, 3, 2
    chunks = list(user_chunks(user, 62, width, own, most))
    users, rows = torch.cat([chunk.users for chunk in chunks]), torch.cat([chunk.rows for chunk in chunks])
    assert users.sort().values.tolist() == list(range(62)) and rows.sort().values.tolist() == list(range(len(user)))
    longest = [0]
    for chunk in chunks:
        assert torch.equal(chunk.users[chunk.user], user[chunk.rows])
        assert (chunk.users.diff() > 0).all() and (chunk.user.diff() >= 0).all()
        assert (chunk.rows.diff()[chunk.user.diff() == 0] > 0).all()  # each user's pairs in their order
        count = torch.bincount(chunk.user, minlength=len(chunk.users))
        assert len(count) == 1 or len(count) * (max(1, int(count.max())) * width + own) <= most
        assert int(count.min()) >= longest[-1]
        longest.append(int(count.max()))
    if most == 10**6:
        assert len(chunks) == 1 and torch.equal(chunks[0].rows, torch.argsort(user, stable=True))


def test_padded_parts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 users with a pair and one with 400: side by side they would be 400,400 rows of K numbers."""
    pairs = pair_list([1] * 500 + [400] + [1] * 500)
    monkeypatch.setattr(plm.functional, "MAX_CELLS", 2_000)
    parts = list(padded_users(pairs))
    assert sum(len(part.users) for part in parts) == 1_001
    assert max(part.design.numel() for part in parts) == 400 * K
    assert all(len(part.users) * (part.design[0].numel() + K * K) <= 2_000 for part in parts if len(part.users) > 1)


@pytest.mark.parametrize("cells", [1, 300])
def test_users_are_solved_alike_in_chunks_and_at_once(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pair_list([0, 7, 1, 60, 3, 0, 12, 30, 1, 2] * 3)
    together = [*fit_gaussian(pairs), *fit_simplex(pairs, CENTRE, 0.1)]
    monkeypatch.setattr(plm.functional, "MAX_CELLS", cells)
    solved = [*fit_gaussian(pairs), *fit_simplex(pairs, CENTRE, 0.1)]
    # Newton stops for all users of a part at once, and its Hessian is the one before the last step
    for whole, parts, tolerance in zip(together, solved, (1e-9, 3e-5, 1e-6, 1e-6), strict=True):
        assert torch.allclose(parts, whole, rtol=0, atol=tolerance)
        assert torch.equal(parts[[0, 5]], whole[[0, 5]])  # nothing is known of them


# ---------------------------------------------------------------------- the Gaussian posterior
COUNTS = [7, 0, 1, 40, 3]


def test_mode_is_scipys_optimum_and_precision_the_hessian() -> None:
    pairs = pair_list(COUNTS)
    fitted = fit_gaussian(pairs)
    for user in range(len(COUNTS)):
        loss = loss_of(pairs, user)
        best = minimize(lambda value: loss(value) + 0.5 * value @ value, np.zeros(K), tol=1e-14)  # noqa: B023
        assert np.allclose(fitted.mean[user].numpy(), best.x, atol=1e-6)

        one = alone(pairs, user)

        def objective(value: Tensor, one: PairList = one) -> Tensor:
            margin = one.design @ value + one.offset
            return (one.weight * bt_losses(margin, one.target)).sum() + 0.5 * value.square().sum()

        hessian = torch.autograd.functional.hessian(objective, fitted.mean[user])  # type: ignore[no-untyped-call]
        assert torch.allclose(fitted.precision[user], hessian, atol=1e-9)
    assert fitted.mean[1].tolist() == [0] * K and torch.equal(fitted.precision[1], torch.eye(K).double())


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_newton_converges_from_anywhere(scale: float) -> None:
    pairs = pair_list(COUNTS, scale=scale)
    fitted = fit_gaussian(pairs, num_steps=200)
    for seed in range(3):
        start = 100 * torch.randn(len(COUNTS), K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(fitted.mean, fit_gaussian(pairs, start=start, num_steps=400).mean, atol=1e-7)
    probability = torch.sigmoid((pairs.design * fitted.mean[pairs.user]).sum(-1) + pairs.offset)
    gradient = fitted.mean + per_user_sum(
        (pairs.weight * (probability - pairs.target))[:, None] * pairs.design, pairs.user, len(COUNTS)
    )
    assert gradient.abs().max() < 1e-4 * scale


def test_no_step_raises_an_objective() -> None:
    pairs = pair_list(COUNTS, scale=30.0)
    values = [fit_gaussian(pairs, num_steps=steps).mean for steps in range(12)]
    assert values[0].abs().max() == 0
    for user in range(len(COUNTS)):
        loss = loss_of(pairs, user)
        path = [loss(value[user].numpy()) + 0.5 * float(value[user] @ value[user]) for value in values]
        assert all(after <= before + 1e-9 for before, after in pairwise(path))


def test_gaussian_user_alone_equals_the_user_in_the_crowd() -> None:
    pairs = pair_list([5] * 50 + [0, 90, 2])
    crowd = fit_gaussian(pairs)
    for user in (0, 17, 50, 51, 52):
        one = fit_gaussian(alone(pairs, user))
        assert torch.allclose(one.mean[0], crowd.mean[user], atol=1e-7)
        assert torch.allclose(one.precision[0], crowd.precision[user], atol=1e-6)
    order = torch.randperm(len(pairs.user))
    assert torch.allclose(fit_gaussian(take(pairs, order)).mean, crowd.mean, atol=1e-12)


def test_single_precision_in_and_out() -> None:
    pairs = pair_list(COUNTS)
    single = PairList(*(value.float() for value in pairs[:4]), pairs.user, pairs.num_users)
    fitted = fit_gaussian(single)
    assert fitted.mean.dtype == fitted.precision.dtype == torch.float32
    assert torch.allclose(fitted.mean.double(), fit_gaussian(pairs).mean, atol=1e-5)


@pytest.mark.parametrize("counts", [[0, 0], []])
def test_nobody_with_pairs_is_fine(counts: list[int]) -> None:
    pairs = pair_list(counts)
    assert fit_gaussian(pairs).mean.shape == (len(counts), K) and not fit_gaussian(pairs).mean.any()
    centre = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    assert torch.equal(fit_simplex(pairs, centre).mean, centre.expand(len(counts), K))


# ---------------------------------------------------------------------- the simplex
CENTRE = torch.full((K,), 1 / K, dtype=torch.float64)


def simplex_objectives(pairs: PairList, weights: Tensor, precision: float = 0.0) -> np.ndarray:
    """``(U,)`` mean loss of every user plus the pull to the centre."""
    out = []
    for user, value in enumerate(weights.numpy()):
        total = pairs.weight[pairs.user == user].sum().item()
        mean = loss_of(pairs, user)(value) / total if total else 0.0
        out.append(mean + 0.5 * precision * float(((value - CENTRE.numpy()) ** 2).sum()))
    return np.array(out)


@pytest.mark.parametrize("precision", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_simplex_weights_are_scipys_optimum(precision: float, scale: float) -> None:
    counts = [7, 1, 40, 3, 12]
    pairs = pair_list(counts, scale=scale)
    fitted = fit_simplex(pairs, CENTRE, precision)
    assert (fitted.mean >= 0).all() and torch.allclose(fitted.mean.sum(-1), torch.ones(5).double(), atol=1e-12)
    ours = simplex_objectives(pairs, fitted.mean, precision)
    for user in range(len(counts)):
        loss, total = loss_of(pairs, user), pairs.weight[pairs.user == user].sum().item()
        best = minimize(
            lambda value: loss(value) / total + 0.5 * precision * ((value - 1 / K) ** 2).sum(),  # noqa: B023
            np.full(K, 1 / K),
            method="SLSQP",
            bounds=[(0, 1)] * K,
            constraints={"type": "eq", "fun": lambda value: value.sum() - 1},
            options={"ftol": 1e-13, "maxiter": 500},
        )
        assert ours[user] <= best.fun + 1e-7
        if precision or counts[user] >= 7:  # else the optimum need not be unique
            assert np.allclose(fitted.mean[user].numpy(), best.x, atol=1e-3)


def test_simplex_beats_many_adam_steps_which_end_close() -> None:
    pairs = pair_list([30] * 6)
    exact, adam = fit_simplex(pairs, CENTRE).mean, fit_simplex_by_adam(pairs, CENTRE, num_steps=1500)
    ours, theirs = simplex_objectives(pairs, exact), simplex_objectives(pairs, adam)
    assert (ours <= theirs + 1e-9).all() and np.allclose(ours, theirs, atol=1e-3)
    assert (exact - adam).abs().max() < 0.02
    published = fit_simplex_by_adam(pairs, CENTRE)
    assert (ours <= simplex_objectives(pairs, published) + 1e-9).all()
    assert torch.allclose(published.sum(-1), torch.ones(6).double()) and (published >= 0).all()


def test_adam_takes_the_published_steps() -> None:
    """Against torch's own optimizer on one parameter per user, as published: users do not disturb each other."""
    pairs = pair_list([9, 0, 4])
    batched = fit_simplex_by_adam(pairs, CENTRE, num_steps=40)
    for user in (0, 2):
        one = alone(pairs, user)
        logits = torch.zeros(K, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(40):
            optimizer.zero_grad()
            margin = one.design @ torch.softmax(logits, 0) + one.offset
            loss = (one.weight * bt_losses(margin, one.target)).sum() / one.weight.sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        assert torch.allclose(batched[user], torch.softmax(logits.detach(), 0), atol=1e-9)
    assert torch.equal(batched[1], CENTRE)


def test_one_basis_leaves_no_choice() -> None:
    pairs = pair_list([3, 2], num_weights=1)
    assert torch.allclose(fit_simplex(pairs, torch.ones(1).double()).mean, torch.ones(2, 1).double())


def test_a_clear_favourite_gets_all_the_weight() -> None:
    """One pair that only the third basis explains: the gradient is steepest there from every point."""
    design = torch.tensor([[0.0, 0.0, 5.0]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    fitted = fit_simplex(PairList(design, 0 * one, one, one, torch.zeros(1).long(), 1), torch.full((3,), 1 / 3))
    assert torch.allclose(fitted.mean, torch.tensor([[0.0, 0.0, 1.0]]).double(), atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_simplex_user_alone_equals_the_user_in_the_crowd(count: int, scale: float) -> None:
    """Also where a few pairs leave K = 8 weights undetermined."""
    pairs = pair_list([count] * 60 + [0], num_weights=8, scale=scale)
    centre = torch.full((8,), 1 / 8, dtype=torch.float64)
    crowd = fit_simplex(pairs, centre).mean
    for user in range(0, 61, 4):
        assert torch.allclose(fit_simplex(alone(pairs, user), centre).mean[0], crowd[user], atol=1e-5)


def test_precision_without_pairs_is_that_of_the_pull() -> None:
    fitted = fit_simplex(pair_list([3, 0]), CENTRE, precision=0.7)
    assert torch.allclose(fitted.precision[1], 0.7 * torch.eye(K).double())
