"""PAL's heads, losses, learners and projectors against independent transcriptions and numbers derived by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plm.methods.pal import PAL
from plm.methods.pal.geometry import Distinct, Geometry, distinct_pairs, distinct_rows
from plm.methods.pal.heads import (
    FLOOR,
    HEADS,
    bound_penalty,
    head_reward,
    logit_scale,
    pair_losses,
    start_logit_scale,
)
from plm.methods.pal.projectors import Projectors, parse_projector
from plm.optimizer import RowAdam
from plm.types import PreferenceBatch

USERS, DIM, K = 5, 6, 3
LEARNERS = ("Pw", "f(Pw)", "f(P)w", "|f(P)|w")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(count: int = 30, prompts: bool = False) -> PreferenceBatch:
    return PreferenceBatch(
        chosen=draw(count, DIM, seed=1),
        rejected=draw(count, DIM, seed=2),
        user_index=torch.arange(count) ** 2 % USERS,
        weight=torch.ones(count, dtype=torch.float64),
        tie=torch.arange(count) % 7 == 0,
        prompt=draw(3, DIM, seed=3)[torch.arange(count) % 3] if prompts else None,
    )


def pal(**options: Any) -> PAL:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"num_prototypes": K, "users": "table", "projector": "mlp1-gelu-dropout0"}
    method = PAL(USERS, DIM, **{**defaults, **options}).double()
    method.logits.data = draw(USERS, K, seed=4)
    method.num_train_pairs = 1
    return method


def reference_reward(head: str, item: np.ndarray, point: np.ndarray, scale: float) -> float:
    """The head by its definition, on plain vectors."""
    cosine = item @ point / np.linalg.norm(item) / np.linalg.norm(point)
    return {
        "dot": 2 * item @ point,
        "dist": -np.linalg.norm(item - point),
        "dist_squared": -(np.linalg.norm(item - point) ** 2),
        "dist_normalization": -np.linalg.norm(item / np.linalg.norm(item) - point / np.linalg.norm(point)),
        "dist_logistic": -scale * np.linalg.norm(item - point),
        "angle": scale * cosine,
        "angle_hinge": scale * cosine,
    }[head]


# ---------------------------------------------------------------------- heads
@pytest.mark.parametrize("head", HEADS)
def test_head_is_its_definition_and_prefers_what_is_closer(head: str) -> None:
    items, point, scale = draw(20, 4), draw(4, seed=1), torch.tensor(7.0).double()
    reward = head_reward(head, items @ point, items.square().sum(-1), point @ point, torch.zeros(()).double(), scale)
    expected = np.array([reference_reward(head, item, point.numpy(), 7.0) for item in items.numpy()])
    margins = expected[:-1] - expected[1:]
    assert reward.shape == (20,)
    np.testing.assert_allclose((reward[:-1] - reward[1:]).numpy(), margins, atol=1e-9)
    towards = torch.stack([point, -point])  # an item at the ideal point beats the opposite one
    closer = head_reward(
        head, towards @ point, towards.square().sum(-1), point @ point, torch.zeros(()).double(), scale
    )
    assert closer[0] > closer[1]


@pytest.mark.parametrize("head", HEADS)
def test_gradient_of_head_moves_the_preferred_item_closer(head: str) -> None:
    """The published dist_logistic had the opposite sign."""
    chosen, point = draw(4).requires_grad_(), draw(4, seed=1)
    other = draw(4, seed=2)
    scale, zero = torch.tensor(2.0).double(), torch.zeros(()).double()

    def reward(item: Tensor) -> Tensor:
        return head_reward(head, item @ point, item @ item, point @ point, zero, scale)

    loss = pair_losses("logistic", reward(chosen) - reward(other), torch.ones(()).double())
    loss.backward()
    with torch.no_grad():
        assert reward(chosen - 0.01 * chosen.grad) > reward(chosen)  # type: ignore[operator]


def test_heads_are_finite_where_points_cancel_or_coincide() -> None:
    for head in HEADS:
        dot = torch.zeros(2, requires_grad=True)
        one = torch.ones(2)
        reward = head_reward(head, dot + torch.tensor([0.0, 1.0]), one, torch.tensor([0.0, 1.0]), one, one)
        reward.sum().backward()  # type: ignore[no-untyped-call]
        assert reward.isfinite().all() and dot.grad is not None and dot.grad.isfinite().all(), head


def test_angle_fades_out_only_for_short_mixtures() -> None:
    """A point as long as its prototypes loses (1 + FLOOR^2)^-1/2; one of 1 % of their length nearly all."""
    one = torch.ones((), dtype=torch.float64)
    full = head_reward("angle", one, one, one, one, one)
    short = head_reward("angle", 0.01 * one, one, 1e-4 * one, one, one)
    assert full.item() == pytest.approx((1 + FLOOR**2) ** -0.5, abs=1e-9)
    assert short.item() == pytest.approx(0.01 / math.sqrt(1e-4 + FLOOR**2), abs=1e-6)


def test_logit_scale_starts_at_clip_and_never_sticks() -> None:
    start = start_logit_scale().double()
    assert logit_scale(start).item() == pytest.approx(1 / 0.07, rel=1e-5)
    far = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    logit_scale(far).backward()  # type: ignore[no-untyped-call]
    assert 99 < logit_scale(far).item() < 100 and far.grad is not None and far.grad > 0


# ---------------------------------------------------------------------- losses
def test_losses_by_hand() -> None:
    z, won = torch.tensor([1.0, 0.0, -1.0, -100.0]), torch.ones(4)
    assert pair_losses("hinge", z, won).tolist() == [0.0, 1.0, 2.0, 101.0]
    assert pair_losses("smooth_hinge", z, won).tolist() == [0.0, 0.5, 1.5, 100.5]
    assert pair_losses("logistic", z, won)[3].item() == pytest.approx(100.0)  # log(sigmoid) would overflow
    torch.testing.assert_close(pair_losses("smooth_hinge", z, won, 5.0)[1], torch.tensor(0.1))


@pytest.mark.parametrize("kind", ["logistic", "cross_entropy", "hinge", "smooth_hinge"])
def test_losses_treat_sides_alike(kind: str) -> None:
    z = draw(9)
    torch.testing.assert_close(pair_losses(kind, z, torch.ones(9)), pair_losses(kind, -z, torch.zeros(9)))
    tie = torch.full((9,), 0.5)
    torch.testing.assert_close(pair_losses(kind, z, tie), pair_losses(kind, -z, tie))


def test_cross_entropy_is_the_logistic_loss_of_the_margin() -> None:
    rewards, label = draw(9, 2), torch.zeros(9, dtype=torch.long)
    published = torch.nn.functional.cross_entropy(rewards, label, reduction="none")
    margin = rewards[:, 0] - rewards[:, 1]
    torch.testing.assert_close(pair_losses("cross_entropy", margin, torch.ones(9).double()), published)
    torch.testing.assert_close(pair_losses("logistic", margin, torch.ones(9).double()), published)


def test_bound_by_hand() -> None:
    assert bound_penalty(torch.tensor([36.0, 9.0]), 4.0).sum().item() == pytest.approx(2.0)


def test_inverse_frequency_weights_are_the_macro_weights_of_the_data() -> None:
    """The published 1 / count(user), renormalised in the batch, is what ``data.macro`` gives: each user sums alike."""
    method, batch = pal(loss="hinge", head="dist"), batch_of()
    count = torch.bincount(batch.user_index, minlength=USERS)[batch.user_index].double()
    macro = (1 / count) / (1 / count).mean()
    losses = pair_losses("hinge", method.margin(batch), torch.where(batch.tie, 0.5, 1.0).double())
    published = (losses / count).sum() / (1 / count).sum()
    torch.testing.assert_close(method.loss(batch._replace(weight=macro))["nll"], published)


# ---------------------------------------------------------------------- learners
def reference_point(method: PAL, weights: np.ndarray, learner: str) -> np.ndarray:
    """Ideal point of one user by the paper's table of learners."""
    geometry = method.geometry
    prototypes = geometry.prototypes.detach().numpy()  # type: ignore[union-attr]

    def f(rows: np.ndarray) -> np.ndarray:
        out = geometry.projector(torch.from_numpy(rows)[None] if rows.ndim == 1 else torch.from_numpy(rows))
        return out[0].detach().numpy().reshape(rows.shape)

    if learner == "Pw":
        return weights @ prototypes
    if learner == "f(Pw)":
        return f(weights @ prototypes)
    points = f(prototypes)
    if learner == "|f(P)|w":
        points = points / np.linalg.norm(points, axis=1, keepdims=True)
    return weights @ points


@pytest.mark.parametrize(("learner", "head"), list(itertools.product(LEARNERS, HEADS)))
def test_margins_of_variant_a(learner: str, head: str) -> None:
    loss = "hinge" if head == "angle_hinge" else "logistic"
    method, batch = pal(user_learner=learner, head=head, loss=loss, residual="bradley_terry"), batch_of()
    method.geometry.logit_scale.data.fill_(-2.0)
    method.base.data = draw(DIM, seed=6)
    scale = logit_scale(method.geometry.logit_scale).item()
    weights = torch.softmax(method.logits, -1).detach().numpy()
    margin = method.margin(batch).detach().numpy()
    assert margin.shape == (30,)
    for row in range(30):
        point = reference_point(method, weights[batch.user_index[row]], learner)
        sides = [
            method.geometry.projector(side[row : row + 1])[0, 0].detach().numpy()
            for side in (batch.chosen, batch.rejected)
        ]  # type: ignore[index]
        expected = reference_reward(head, sides[0], point, scale) - reference_reward(head, sides[1], point, scale)
        expected += float((batch.chosen[row] - batch.rejected[row]) @ method.base.detach())  # type: ignore[index,operator]
        assert margin[row] == pytest.approx(
            expected, abs=0.02 * abs(expected) + 0.02 if "angle" in head or "norm" in head else 1e-8
        ), (learner, head)
    out = method.loss(batch)["loss"]
    out.backward()  # type: ignore[no-untyped-call]
    assert method.logits.grad is not None and method.logits.grad.to_dense().abs().sum() > 0
    assert method.geometry.prototypes.grad.isfinite().all()  # type: ignore[union-attr]


@pytest.mark.parametrize(("learner", "head"), list(itertools.product(LEARNERS[2:], HEADS)))
def test_margins_of_variant_b(learner: str, head: str) -> None:
    """z = sum_k w_k g_k(c), reward of f(x) for z by the head: each prompt mixes prototypes of its own."""
    method = pal(variant="B", head=head, user_learner=learner, loss="hinge" if head == "angle_hinge" else "logistic")
    method.trained_on_prompts.fill_(True)
    method.geometry.logit_scale.data.fill_(-2.0)
    batch = batch_of(prompts=True)
    margin = method.margin(batch).detach()
    assert margin.shape == (30,)
    geometry, weights = method.geometry, torch.softmax(method.logits, -1)
    scale = logit_scale(geometry.logit_scale)
    for row in range(30):
        points = geometry.user_projectors(batch.prompt[row : row + 1])[:, 0]  # type: ignore[misc,index]
        assert points.shape == (K, DIM)
        points = points / points.norm(dim=1, keepdim=True) if learner == "|f(P)|w" else points
        point = weights[batch.user_index[row]] @ points
        size = points.square().sum(1).mean()
        reward = []
        for item in (geometry.projector(side[row : row + 1])[0, 0] for side in (batch.chosen, batch.rejected)):  # type: ignore[index]
            cosine = point @ item / (point @ point + FLOOR**2 * size).sqrt() / item.norm()
            reward.append(
                {
                    "dot": 2 * item @ point,
                    "dist": -(item - point).norm(),
                    "dist_squared": -(item - point).square().sum(),
                    "dist_normalization": -(2 - 2 * cosine).sqrt(),
                    "dist_logistic": -scale * (item - point).norm(),
                    "angle": scale * cosine,
                    "angle_hinge": scale * cosine,
                }[head]
            )
        assert margin[row].item() == pytest.approx((reward[0] - reward[1]).item(), abs=1e-7)
    method.loss(batch)["loss"].backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in geometry.user_projectors.parameters())  # type: ignore[union-attr]


def test_variant_b_reads_prompts_as_in_training() -> None:
    method, batch = pal(variant="B", head="angle"), batch_of(prompts=True)
    assert isinstance(batch.prompt, Tensor)
    with torch.no_grad():  # what training did not see is not read
        torch.testing.assert_close(method.margin(batch), method.margin(batch._replace(prompt=None)))
    method.trained_on_prompts.fill_(True)
    for prompt, got in (
        (None, "none"),
        (batch.prompt[1:], r"shape \(29, 6\)"),
        (batch.prompt[:, 1:], r"shape \(30, 5\)"),
    ):
        with pytest.raises(ValueError, match=rf"with prompts: expected .* \(30, 6\), got {got}; set data.prompt"):
            method.margin(batch._replace(prompt=prompt))


def test_an_affine_projector_commutes_with_mixing() -> None:
    """Weights sum to one, so f(Pw) = f(P)w for an affine f, in K dimensions; not for a nonlinear one."""
    batch = batch_of()
    for projector, same in (("mlp2-linear-dropout0", True), ("mlp1-relu-dropout0", False)):
        one, two = (pal(user_learner=name, projector=projector, head="dist") for name in ("f(Pw)", "f(P)w"))
        assert torch.allclose(one.margin(batch), two.margin(batch), atol=1e-9) is same
        assert one.geometry.is_mixture is same


@pytest.mark.parametrize("variant", ["A", "B"])
def test_invariances(variant: str) -> None:
    method, batch = pal(variant=variant, head="angle", loss="cross_entropy"), batch_of(prompts=variant == "B")
    method.trained_on_prompts.fill_(variant == "B")
    margin, loss = method.margin(batch), method.loss(batch)["nll"]
    swapped = batch._replace(chosen=batch.rejected, rejected=batch.chosen)
    torch.testing.assert_close(method.margin(swapped), -margin)
    method.logits.data += torch.arange(USERS)[:, None]  # a constant per user changes nothing
    torch.testing.assert_close(method.margin(batch), margin)
    order = torch.tensor([2, 0, 1])  # neither does another order of prototypes together with their weights
    method.logits.data = method.logits.data[:, order]
    parts = [method.geometry.prototypes] if variant == "A" else list(method.geometry.user_projectors.parameters())  # type: ignore[union-attr]
    for part in parts:
        part.data = part.data[order]  # type: ignore[union-attr]
    method._train_pairs = None
    torch.testing.assert_close(method.margin(batch), margin)
    torch.testing.assert_close(method.loss(batch)["nll"], loss)


def test_one_prototype_makes_users_irrelevant() -> None:
    method = pal(num_prototypes=K)
    alone = PAL(USERS, DIM, num_prototypes=1, users="table").double()
    alone.logits.data = draw(USERS, 1)
    batch = batch_of()
    torch.testing.assert_close(alone.margin(batch), alone.margin(batch._replace(user_index=batch.user_index.flip(0))))
    assert not torch.allclose(method.margin(batch), method.margin(batch._replace(user_index=batch.user_index.flip(0))))


def test_score_is_the_margin_side_by_side() -> None:
    for options in ({"user_learner": "f(Pw)"}, {"variant": "B", "head": "angle"}, {"residual": "bradley_terry"}):
        method, batch = pal(**options), batch_of()  # type: ignore[arg-type]
        method.base.data = draw(DIM, seed=6)
        users = method.user_states(batch.user_index)
        difference = method.score(batch.chosen, users) - method.score(batch.rejected, users)
        torch.testing.assert_close(difference, method.margin(batch, users))


def test_mixing_and_partition() -> None:
    method = pal(mixing="gumbel_hard")
    logits = method.logits.detach()
    torch.manual_seed(0)
    hard = torch.stack([method._drawn(logits) for _ in range(4000)])
    assert torch.allclose(hard.max(-1).values, torch.ones(()).double())
    torch.testing.assert_close(hard.mean(0), torch.softmax(logits, -1), atol=0.03, rtol=0)  # Gumbel-max
    method.mixing = "gumbel"
    soft = method._drawn(logits)
    assert torch.allclose(soft.sum(-1), torch.ones(()).double()) and (soft.max(-1).values < 1).all()
    method = pal(partition=True)
    method.num_pairs.fill_(1)
    users, everybody = method.user_states(torch.arange(USERS)), method.population_state(USERS)
    one_hot = torch.nn.functional.one_hot(method.logits.argmax(-1), K).double()
    assert torch.equal(method._served(users.tensors["weights"], users.num_pairs), one_hot)
    shared = everybody.tensors["weights"]
    assert torch.equal(method._served(shared, everybody.num_pairs), shared) and shared.max() < 0.5
    with torch.no_grad():
        assert method.loss(batch_of())["loss"].isfinite()


def test_temperature_sharpens_and_stays_positive() -> None:
    cold, warm = pal(temperature=0.5), pal(temperature=2.0, learn_temperature=True)
    assert (cold._weights(cold.logits).max(-1).values > warm._weights(warm.logits).max(-1).values).all()
    warm.loss(batch_of())["loss"].backward()  # type: ignore[no-untyped-call]
    assert warm.log_temperature.grad is not None and warm.log_temperature.grad.abs() > 0
    assert not pal().log_temperature.requires_grad


# ---------------------------------------------------------------------- projectors
@pytest.mark.parametrize(("digits", "rate"), [("0", 0.0), ("5", 0.5), ("75", 0.75), ("05", 0.05)])
def test_dropout_digits(digits: str, rate: float) -> None:
    assert parse_projector(f"mlp2-relu-dropout{digits}").dropout == rate


@pytest.mark.parametrize(
    "text",
    [
        "mlp2",
        "mlp2-tanh-dropout0",
        "mlp2-relu-dropout0-residualX",
        "mlp2-relu-dropout0-nobias-residual",
        "Identity",
        "",
    ],
)
def test_malformed_projectors_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"model\.projector: expected identity or mlp"):
        Projectors(text, 4, 4)


def test_projector_is_linear_batchnorm_dropout_activation() -> None:
    """Against torch.nn modules with the same weights; mlp2 has three linear layers."""
    mine = Projectors("mlp2-gelu-dropout0-residual-batchnorm", 4, 4).double()
    layers: list[torch.nn.Module] = []
    for weight, bias, last in zip(mine.weights, mine.biases, (False, False, True), strict=True):
        linear = torch.nn.Linear(4, 4).double()
        linear.weight.data, linear.bias.data = weight.data[0].T, bias.data[0, 0]
        layers += (
            [linear] if last else [linear, torch.nn.BatchNorm1d(4).double(), torch.nn.Dropout(0.0), torch.nn.GELU()]
        )
    theirs, rows = torch.nn.Sequential(*layers), draw(9, 4)
    torch.testing.assert_close(mine(rows)[0], rows + theirs(rows))
    torch.testing.assert_close(mine.eval()(rows)[0], rows + theirs.eval()(rows))  # same running statistics
    running = mine.train().norms[0].running_mean.clone()  # type: ignore[union-attr,operator]
    assert mine(rows[:1], running=True).isfinite().all()
    assert torch.equal(mine.norms[0].running_mean, running)  # type: ignore[arg-type]


def test_projector_sizes_and_copies() -> None:
    assert sum(p.numel() for p in Projectors("mlp2-gelu-dropout0", 512, 512).parameters()) == 787_968
    assert sum(p.numel() for p in Projectors("mlp2-gelu-dropout0-nobias", 8, 4).parameters()) == 8 * 4 + 2 * 16
    copies = Projectors("mlp1-relu-dropout0", 5, 3, copies=4)
    rows = torch.randn(7, 5)
    out = copies(rows)
    assert out.shape == (4, 7, 3)
    for copy in range(4):
        hidden = torch.relu(rows @ copies.weights[0][copy] + copies.biases[0][copy])
        torch.testing.assert_close(out[copy], hidden @ copies.weights[1][copy] + copies.biases[1][copy])
    assert torch.equal(Projectors("identity", 5, 5)(rows)[0], rows)
    with pytest.raises(ValueError, match="as many outputs as inputs, got 5 -> 3"):
        Projectors("mlp1-relu-dropout0-residual", 5, 3)


def test_dropout_comes_before_the_activation() -> None:
    """Dropout then gelu: dropped units give gelu(0) = 0, kept ones gelu(2 h), not 2 gelu(h)."""
    torch.manual_seed(0)
    net = Projectors("mlp1-gelu-dropout5", 3, 200)
    rows = torch.randn(1, 3)
    hidden = rows @ net.weights[0][0] + net.biases[0][0]
    torch.manual_seed(1)
    out = net(rows)[0]
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(hidden[None], 0.5)[0]
    expected = torch.nn.functional.gelu(dropped) @ net.weights[1][0] + net.biases[1][0]
    torch.testing.assert_close(out, expected)


# ---------------------------------------------------------------------- each response once
def test_distinct_rows_are_exact() -> None:
    rows = draw(4, DIM)[torch.tensor([0, 1, 0, 3, 1, 1])]
    distinct, index = distinct_rows(rows)
    assert len(distinct) == 3 and torch.equal(distinct[index], rows)
    pairs = distinct_pairs(rows[:3], rows[3:], draw(1, DIM).expand(3, -1))
    assert len(pairs.responses) == 3 and pairs.prompts is not None and len(pairs.prompts) == 1
    assert torch.equal(pairs.responses[pairs.rejected], rows[3:])


def test_sharing_responses_changes_nothing() -> None:
    torch.manual_seed(0)
    geometry = Geometry(DIM, K, "B", "f(P)w", "angle", "mlp1-relu-dropout0", None, 4, 1.0).double()
    chosen, rejected, prompt = (draw(2, DIM, seed=s)[torch.tensor([0, 1, 1, 0])] for s in range(3))
    weights = torch.softmax(draw(4, K), -1)
    row = torch.arange(4)
    apart = Distinct(torch.cat([chosen, rejected]), row, row + 4, prompt, row.repeat(2))
    one, two = (
        geometry.margins(geometry.cache(p, torch.zeros(8).double()), weights)
        for p in (apart, distinct_pairs(chosen, rejected, prompt))
    )
    torch.testing.assert_close(one, two)


# ---------------------------------------------------------------------- optimizer and groups
def test_lazy_rows_equal_one_parameter_per_user() -> None:
    """Users come and go; absent ones stand still and keep their own step count, as parameters without gradient do."""
    table = torch.nn.Parameter(draw(USERS, K))
    apart = [torch.nn.Parameter(row.clone()) for row in table.data]
    lazy = RowAdam([{"params": [table], "lr": 0.05}])
    each = torch.optim.Adam(apart, lr=0.05)
    for step in range(12):
        users = torch.tensor([(step * step) % USERS, step % 2, (step * step) % USERS])
        target = draw(3, K, seed=step)
        for optimizer in (lazy, each):
            optimizer.zero_grad()
        (torch.nn.functional.embedding(users, table, sparse=True) - target).square().sum().backward()  # type: ignore[no-untyped-call]
        (torch.stack([apart[user] for user in users]) - target).square().sum().backward()  # type: ignore[no-untyped-call]
        for user, parameter in enumerate(apart):
            parameter.grad = parameter.grad if user in users else None
        lazy.step()
        each.step()
    torch.testing.assert_close(table.data, torch.stack([p.data for p in apart]))
    assert lazy.state[table]["step"].unique().numel() > 1  # users of this test come at different rates


def test_dense_parameters_follow_torch_adamw() -> None:
    mine, theirs = (torch.nn.Parameter(draw(3, 2)) for _ in range(2))
    one = RowAdam([{"params": [mine], "lr": 0.1, "weight_decay": 0.02}])
    two = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.02)
    for step in range(6):
        for parameter, optimizer in ((mine, one), (theirs, two)):
            optimizer.zero_grad()
            (parameter * draw(3, 2, seed=step)).square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    torch.testing.assert_close(mine, theirs)


def test_every_trainable_parameter_is_in_one_group() -> None:
    method = pal(head="angle", variant="B", residual="bradley_terry", groups={"projector": {"lr": 0.5}})
    groups = {group["name"]: group for group in method.param_groups()}
    assert set(groups) == {"projector", "user_projectors", "base", "weights", "logit_scale"}
    assert groups["projector"]["lr"] == 0.5 and groups["projector"]["weight_decay"] == 0.01
    members = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    frozen = pal(freeze=["projector", "prototypes"])
    assert {group["name"] for group in frozen.param_groups()} == {"weights"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": {"projectors": {"lr": 0.1}}}, r"model\.groups: expected groups with something to train"),
        ({"groups": {"user_projectors": {"lr": 0.1}}}, r"model\.groups"),  # exists, but not in variant A
        ({"groups": {"prototypes": {"rate": 0.1}}}, r"model\.groups\.prototypes: expected lr or weight_decay"),
        ({"freeze": ["logit_scale"]}, r"model\.freeze"),  # not trained by this head
        ({"variant": "B", "user_learner": "Pw"}, r"model\.user_learner"),
        ({"head": "angle", "loss": "hinge"}, r"model\.loss"),
        ({"head": "angle_hinge"}, r"model\.loss"),
        ({"users": "posterior", "loss": "hinge", "head": "dist"}, r"no likelihood"),
        ({"users": "posterior", "mixing": "gumbel"}, r"model\.mixing"),
        ({"user_projector": "identity"}, r"model\.user_projector"),
        ({"head": "cosine", "num_prototypes": 0, "temperature": 0.0}, r"(?s)model\.head.*num_prototypes.*temperature"),
        (
            {"dim": 0, "lr": -0.1},
            r"(?s)model\.dim: expected an integer >= 1, got 0.*model\.lr: expected a finite number >= 0",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pal(**options)
