"""VPL against transcriptions in NumPy, loop by loop, and its promises: swaps, evidence, episodes, collapse."""

from __future__ import annotations

import math
import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import plm.methods.vpl as vpl
from plm.functional import kl_to_prior
from plm.method.episodes import arrange, draw_episodes, response_ids, response_nodes
from plm.methods.vpl import VPL, is_collapsed, target_bound
from plm.methods.vpl.networks import (
    DECODERS,
    POSTERIORS,
    Gaussian,
    PairTokens,
    anneal_factor,
    bounded,
    on_sphere,
    pooled_attention,
    swap_guide,
)
from plm.testing import PlantedData, quiet_trainer
from plm.types import Context, PreferenceBatch, UserState
from tests.groups import method_options

USERS, DIM = 5, 6
SIZES = (1, 2, 3, 5, 8)  # pairs of each user
SMALL: dict[str, Any] = {"latent_dim": 3, "hidden_dim": 4}
PAPER = {**method_options("vpl_paper"), **SMALL}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(ties: bool = True) -> PreferenceBatch:
    """Uneven users, not sorted, in float64."""
    user = torch.repeat_interleave(torch.arange(USERS), torch.tensor(SIZES))
    order = torch.randperm(len(user), generator=torch.Generator().manual_seed(0))
    count = len(user)
    tie = torch.arange(count) % 5 == 0 if ties else torch.zeros(count, dtype=torch.bool)
    weight = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    return PreferenceBatch(draw(count, DIM, seed=1), draw(count, DIM, seed=2), user[order], weight, tie)


def context_of(batch: PreferenceBatch) -> Context:
    """The users of a batch as an unpadded-first context, built by a loop."""
    assert isinstance(batch.chosen, Tensor) and isinstance(batch.rejected, Tensor)
    longest = max(SIZES)
    context = Context(
        torch.zeros(USERS, longest, DIM).double(),
        torch.zeros(USERS, longest, DIM).double(),
        torch.zeros(USERS, longest).bool(),
        torch.zeros(USERS, longest).double(),
        tie=torch.zeros(USERS, longest).bool(),
    )
    assert context.tie is not None
    for user in range(USERS):
        rows = (batch.user_index == user).nonzero()[:, 0]
        for place, row in enumerate(rows):
            context.chosen[user, place], context.rejected[user, place] = batch.chosen[row], batch.rejected[row]
            context.mask[user, place], context.weight[user, place] = True, batch.weight[row]
            context.tie[user, place] = batch.tie[row]
    return context


def make(**options: Any) -> VPL:
    torch.manual_seed(0)
    return VPL(USERS, DIM, **{**SMALL, **options}).double()


def fit(method: VPL, data: PlantedData, folder: Path, *callbacks: L.Callback, **options: Any) -> VPL:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(folder, callbacks=list(callbacks), log_every_n_steps=1, **options)
        trainer.fit(method, datamodule=data)
    method.trainer = None  # type: ignore[assignment]
    return method


# ---------------------------------------------------------------------- NumPy transcriptions
def linear(layer: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    out: np.ndarray = x @ layer.weight.detach().numpy().T
    return out if layer.bias is None else out + layer.bias.detach().numpy()


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    out: np.ndarray = e / e.sum()
    return out


def published_posterior(method: VPL, pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Section 1.2 of the published model for one user: pair network, every query's attention, mean, clamped heads."""
    net, attention = method.encoder.net, method.set_encoder
    tokens = []
    for chosen, rejected in pairs:
        hidden = leaky(linear(net[0], np.concatenate([chosen, rejected])))  # type: ignore[arg-type]
        tokens.append(linear(attention.token, leaky(linear(net[2], hidden))))  # type: ignore[arg-type]
    queries, keys, values = (
        [linear(getattr(attention, name), token) for token in tokens] for name in ("query", "key", "value")
    )
    attended = [
        sum(s * v for s, v in zip(softmax(np.array([q @ k for k in keys]) / np.sqrt(len(q))), values, strict=True))
        for q in queries
    ]
    pooled = np.mean(attended, axis=0)
    mean, log_var = (linear(getattr(attention, name), pooled) for name in ("mean", "log_var"))
    return mean.clip(-1, 1), log_var.clip(-1, 1)


def published_reward(method: VPL, response: np.ndarray, latent: np.ndarray) -> float:
    """A network on response and latent side by side."""
    decoder = method.decoder
    both = np.concatenate([decoder.response.weight.detach(), decoder.latent.weight.detach()], 1)  # type: ignore[union-attr]
    hidden = leaky(both @ np.concatenate([response, latent]) + decoder.response.bias.detach().numpy())  # type: ignore[union-attr]
    return float(linear(decoder.out, leaky(linear(decoder.hidden, hidden)))[0])  # type: ignore[union-attr, arg-type]


def scaled_pairs(method: VPL, context: Context, user: int) -> list[tuple[np.ndarray, np.ndarray]]:
    scale = DIM**0.5 / float(method.feature_scale)
    rows = context.mask[user].nonzero()[:, 0]
    return [(scale * context.chosen[user, row].numpy(), scale * context.rejected[user, row].numpy()) for row in rows]


def test_the_published_set_encoder_equals_a_loop_over_users_and_queries() -> None:
    method = make(**PAPER)
    for parameter in method.parameters():
        parameter.data *= 3  # so that some numbers reach the clamps
    context = context_of(batch_of(ties=False))._replace(weight=torch.ones(USERS, max(SIZES)).double())
    state = method.adapt(context)
    clamped = 0
    for user in range(USERS):
        mean, log_var = published_posterior(method, scaled_pairs(method, context, user))
        np.testing.assert_allclose(state.tensors["mean"][user], mean, atol=1e-12)
        np.testing.assert_allclose(state.tensors["log_var"][user], log_var, atol=1e-12)
        clamped += int((np.abs(mean) == 1).sum())
    assert 0 < clamped < USERS * 3


def test_the_published_loss_equals_its_transcription(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One target per user, a latent on the sphere, Bradley-Terry plus annealed KL of the clamped posterior."""
    method = make(**{**PAPER, "kl_weight": 0.7})
    method.trainer = quiet_trainer(tmp_path)
    batch = batch_of(ties=False)._replace(weight=torch.ones(sum(SIZES)).double())
    assert isinstance(batch.chosen, Tensor) and isinstance(batch.rejected, Tensor)
    torch.manual_seed(3)
    loss = {name: value.item() for name, value in method.loss(batch).items()}
    torch.manual_seed(3)
    batch, of_user, _ = arrange(batch, with_nodes=False)
    context, rows = draw_episodes(of_user, None, "any", 2, 8, 1)
    sizes = torch.bincount(of_user).tolist()
    noise = torch.randn(USERS, 1, 3, dtype=torch.float64).numpy()
    nll = kl = 0.0
    scale = DIM**0.5 / float(method.feature_scale)
    chosen, rejected = (side.numpy() * scale for side in batch.features)
    for user in range(USERS):
        mine = [int(row) for row in context if of_user[row] == user]
        assert len(mine) == min(len(mine), 8) and len(mine) >= min(2, sizes[user])
        mean, log_var = published_posterior(method, [(chosen[row], rejected[row]) for row in mine])
        latent = mean + np.exp(log_var / 2) * noise[user, 0]
        latent *= np.sqrt(3) / np.linalg.norm(latent)
        (row,) = [int(row) for row in rows if of_user[row] == user]
        margin = published_reward(method, chosen[row], latent) - published_reward(method, rejected[row], latent)
        share = sizes[user] / sum(sizes)  # every pair of the split weighs the same
        nll += share * np.log1p(np.exp(-margin))
        kl += share * -0.5 * (1 + log_var - mean**2 - np.exp(log_var)).sum()
    total = nll + 0.7 * 0.1 * kl  # the first step of the annealing
    assert loss["nll"] == pytest.approx(nll, abs=1e-12)
    assert loss["kl"] == pytest.approx(kl, abs=1e-12)
    assert loss["loss"] == pytest.approx(total, abs=1e-12)


def test_the_published_latent_is_on_the_sphere_in_training_and_the_mean_in_use() -> None:
    method = make(**PAPER)
    users = UserState({"mean": draw(2, 3), "log_var": draw(2, 3)}, torch.ones(2).long())
    responses = draw(2, DIM, seed=1)
    scale = DIM**0.5
    expected = [
        published_reward(method, scale * responses[row].numpy(), users.tensors["mean"][row].numpy()) for row in (0, 1)
    ]
    np.testing.assert_allclose(method.score(responses, users).detach(), expected, atol=1e-12)
    both = make(**{**PAPER, "latent_map": "sphere"})
    expected = [
        published_reward(both, scale * responses[row].numpy(), on_sphere(users.tensors["mean"][row]).numpy())
        for row in (0, 1)
    ]
    np.testing.assert_allclose(both.score(responses, users).detach(), expected, atol=1e-12)


def test_decoders_equal_their_formulas() -> None:
    responses, latent = draw(4, DIM, seed=1), draw(4, 3, seed=2)
    for name, decoder in ((name, cls(DIM, 4, 3).double()) for name, cls in DECODERS.items()):
        for row in range(4):
            x, z = responses[row].numpy(), latent[row].numpy()
            if name == "bilinear":
                decoder.population.data = draw(DIM, seed=3)  # type: ignore[union-attr, assignment]
                expected = decoder.population.detach().numpy() @ x + z @ decoder.bases.detach().numpy() @ x  # type: ignore[union-attr]
            elif name == "film":
                scale, shift = np.split(linear(decoder.modulation, z), 2)  # type: ignore[union-attr, arg-type]
                expected = float(linear(decoder.out, leaky((1 + scale) * linear(decoder.hidden, x) + shift))[0])  # type: ignore[arg-type]
                path = decoder.linear
                path.population.data = draw(DIM, seed=3)  # type: ignore[union-attr, assignment]
                expected += path.population.detach().numpy() @ x + z @ path.bases.detach().numpy() @ x  # type: ignore[union-attr]
            else:
                holder = make(decoder="concat")
                holder.decoder = decoder
                expected = published_reward(holder, x, z)
            got = decoder.reward(decoder.prepare(responses[row : row + 1]), latent[row : row + 1])  # type: ignore[operator]
            assert got.item() == pytest.approx(float(expected), abs=1e-12), name


# ---------------------------------------------------------------------- posterior
def test_evidence_adds_up() -> None:
    """``precision = 1 + sum gain``, ``mean = sum gain * vote / precision``; weights of mean one; a tie has no vote."""
    method = make()
    torch.nn.init.normal_(method.set_encoder.gain.weight)  # type: ignore[arg-type]
    context = context_of(batch_of())
    assert context.tie is not None
    state = method.adapt(context)
    net, head = method.encoder.net, method.set_encoder
    for user in range(USERS):
        precision, total = np.ones(3), np.zeros(3)
        weight = context.weight[user][context.mask[user]].numpy()
        tie = context.tie[user][context.mask[user]].numpy()
        for (chosen, rejected), w, t in zip(
            scaled_pairs(method, context, user), weight / weight.mean(), tie, strict=True
        ):
            half = (chosen - rejected) / 2
            one, two = (leaky(linear(net[2], leaky(linear(net[0], side)))) for side in (half, -half))  # type: ignore[arg-type]
            gain = w * np.log1p(np.exp(linear(head.gain, one + two)))  # type: ignore[arg-type]
            vote = 4 * np.tanh(linear(head.vote, one - two) / 4)  # type: ignore[arg-type]
            precision, total = precision + gain, total + gain * vote * (not t)
        np.testing.assert_allclose(state.tensors["mean"][user], total / precision, atol=1e-12)
        np.testing.assert_allclose(state.tensors["log_var"][user], -np.log(precision), atol=1e-12)


@pytest.mark.parametrize("posterior", ["product", "attention"])
def test_swapped_pairs_say_the_opposite(posterior: str) -> None:
    context = context_of(batch_of(ties=False))
    swapped = context._replace(chosen=context.rejected, rejected=context.chosen)
    for pair_features, opposite in (("odd_even", True), ("concat", False)):
        method = make(posterior=posterior, pair_features=pair_features)
        if posterior == "product":
            torch.nn.init.normal_(method.set_encoder.gain.weight)  # type: ignore[arg-type]
        own, other = method.adapt(context).tensors, method.adapt(swapped).tensors
        assert torch.allclose(own["mean"], -other["mean"], atol=1e-12) is opposite
        assert torch.allclose(own["log_var"], other["log_var"], atol=1e-12) is opposite
        guide = swap_guide(Gaussian(**own), Gaussian(**other))
        assert (float(guide) < 1e-12) is opposite


@pytest.mark.parametrize("pair_features", ["odd_even", "concat"])
def test_only_the_product_counts_evidence(pair_features: str) -> None:
    """The same pairs twice: attention cannot tell, the product's variance falls; and it falls with every pair."""
    context = context_of(batch_of())
    twice = Context(**{k: torch.cat([v, v], 1) for k, v in context._asdict().items() if v is not None})
    attention, product = (make(posterior=name, pair_features=pair_features) for name in ("attention", "product"))
    once, again = attention.adapt(context), attention.adapt(twice)
    for name in ("mean", "log_var"):
        assert torch.allclose(once.tensors[name], again.tensors[name], atol=1e-12)
    assert (product.adapt(twice).tensors["log_var"] < product.adapt(context).tensors["log_var"]).all()
    variances = [
        product.adapt(context._replace(mask=context.mask & (torch.arange(max(SIZES)) < shots))).tensors["log_var"][-1]
        for shots in range(max(SIZES) + 1)
    ]
    assert (torch.stack(variances).diff(dim=0) < 0).all() and (variances[0] == 0).all()


def test_a_tie_is_half_of_each_order() -> None:
    batch = batch_of(ties=False)
    rows = torch.tensor([0, 3])
    for pair_features in ("odd_even", "concat"):
        method = make(pair_features=pair_features)
        own = method._tokens(batch, rows)
        swapped = method._tokens(batch._replace(chosen=batch.rejected, rejected=batch.chosen), rows)
        tied = method._tokens(batch._replace(tie=torch.ones_like(batch.tie)), rows)
        for one, two, tie in zip(own, swapped, tied, strict=True):
            assert torch.allclose((one + two) / 2, tie, atol=1e-12)


def test_pooled_attention_ignores_padding() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False]])
    share = pooled_attention(draw(2, 3, 4), draw(2, 3, 4, seed=1), mask)
    assert torch.allclose(share.sum(-1), torch.tensor([1.0, 0.0]).double()) and share[0, 2] == 0


# ---------------------------------------------------------------------- the bound
def test_kl_equals_torch_distributions() -> None:
    posterior = Gaussian(draw(4, 3), draw(4, 3, seed=1))
    expected = kl_divergence(Normal(posterior.mean, (posterior.log_var / 2).exp()), Normal(0.0, 1.0))
    assert torch.allclose(kl_to_prior(*posterior), expected)


def test_samples_have_the_posteriors_moments() -> None:
    posterior = Gaussian(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, -2.0]]))
    torch.manual_seed(0)
    samples = posterior.sample(40_000)[0]
    assert torch.allclose(samples.mean(0), posterior.mean[0], atol=0.03)
    assert torch.allclose(samples.std(0), torch.tensor([1.0, np.exp(-1)]).float(), atol=0.02)


def test_the_bound_is_the_joint_likelihood_of_each_user() -> None:
    margin, user = draw(5, 3), torch.tensor([1, 0, 1, 1, 0])
    target, weight = torch.tensor([1, 1, 0.5, 1, 1]).double(), torch.ones(5).double()
    got = target_bound(margin, target, weight, user, 3)
    for row, pairs in ((0, (1, 4)), (1, (0, 2, 3))):
        likelihood = []
        for sample in range(3):
            chance = {t: 1 / (1 + np.exp(-float(margin[t, sample]))) for t in pairs}
            logs = [float(target[t]) * np.log(p) + (1 - float(target[t])) * np.log(1 - p) for t, p in chance.items()]
            likelihood.append(np.exp(sum(logs)))
        assert float(got[row]) == pytest.approx(-np.log(np.mean(likelihood)), abs=1e-12)
    assert float(got[2]) == pytest.approx(0.0, abs=1e-12)  # no targets
    single = torch.stack([target_bound(margin[:, [m]], target, weight, user, 3) for m in range(3)])
    assert (got <= single.mean(0) + 1e-12).all()  # more samples, a tighter bound (Jensen)


def test_smooth_bounds_leave_a_gradient_where_clamps_do_not() -> None:
    value = torch.tensor([-30.0, 0.0, 7.0], dtype=torch.float64, requires_grad=True)
    smooth = bounded(value, -4.0, 4.0, "smooth")
    (gradient,) = torch.autograd.grad(smooth.sum(), value)
    assert (gradient > 0).all() and gradient[1] == 1 and smooth.abs().max() <= 4
    (gradient,) = torch.autograd.grad(bounded(value, -4.0, 4.0, "clamp").sum(), value)
    assert gradient.tolist() == [0.0, 1.0, 0.0]


def test_annealing_shapes() -> None:
    assert [round(anneal_factor(t, 10_000, "cosine", True), 3) for t in (0, 1000, 2500, 5000, 7500, 9999)] == [
        0.1, 0.122, 0.232, 0.55, 0.868, 1.0,
    ]  # fmt: skip
    assert anneal_factor(10_000, 10_000, "cosine", True) == pytest.approx(0.1)
    assert anneal_factor(10_000, 10_000, "cosine", False) == anneal_factor(99_999, 10_000, "linear", False) == 1.0
    assert anneal_factor(25, 100, "linear", False) == pytest.approx(0.1 + 0.9 * 0.25)
    assert anneal_factor(50, 100, "logistic", False) == pytest.approx(0.55)
    assert anneal_factor(0, 100, "none", True) == 1.0


def test_annealing_counts_optimizer_steps_of_training_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither validation nor the batches of an accumulated gradient move the clock."""
    steps = []

    def watched(step: int, *args: Any) -> float:
        steps.append(step)
        return anneal_factor(step, *args)

    monkeypatch.setattr(vpl, "anneal_factor", watched)
    data = PlantedData(8, feature_dim=DIM)
    twice = data.train_dataloader()
    twice.batches = twice.batches * 4
    monkeypatch.setattr(data, "train_dataloader", lambda: twice)
    fit(VPL(8, DIM, **SMALL), data, tmp_path, max_epochs=2, accumulate_grad_batches=2)
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"anneal_steps": 8},
            "ends at 0.55 of model.kl_weight: it grows over 8 .*, and the fit takes 4;",
        ),  # 0.1 + 0.9 / 2
        ({"anneal_steps": 4}, None),
        ({"anneal_steps": 8, "anneal": "none"}, None),
        ({"anneal_steps": 8, "kl_weight": 0.0}, None),
    ],
)
def test_a_fit_that_ends_before_its_annealing_warns(options: dict[str, Any], told: str | None, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(tmp_path, max_epochs=4)  # steps
        trainer.fit(VPL(8, DIM, **{**SMALL, **options}), datamodule=PlantedData(8, feature_dim=DIM))
    found = [str(one.message) for one in caught if "anneal_steps" in str(one.message)]
    assert found == [] if told is None else re.search(told, "".join(found))


def test_free_bits_cost_nothing(tmp_path: Path) -> None:
    """Below the free bits the gradient is that without a KL; above, that with it."""
    batch, gradients = batch_of(), {}
    for name, options in (
        ("free", {"free_bits": 100.0}),
        ("none", {"kl_weight": 0.0}),
        ("kl", {"free_bits": 0.0}),
        ("few", {"free_bits": 1e-9}),
    ):
        method = make(target_rule="rest", **options)
        method.trainer = quiet_trainer(tmp_path)
        torch.manual_seed(1)
        method.loss(batch)["loss"].backward()
        gradients[name] = method.set_encoder.vote.weight.grad  # type: ignore[union-attr]
    assert torch.equal(gradients["free"], gradients["none"]) and torch.equal(gradients["kl"], gradients["few"])  # type: ignore[arg-type]
    assert not torch.allclose(gradients["kl"], gradients["none"])  # type: ignore[arg-type]


def test_swap_guide_follows_its_formula_and_pulls() -> None:
    own, swapped = Gaussian(draw(4, 3), draw(4, 3, seed=1)), Gaussian(draw(4, 3, seed=2), draw(4, 3, seed=3))

    def cosine(x: Tensor, y: Tensor) -> np.ndarray:
        out: np.ndarray = ((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).numpy()
        return out

    expected = 0.5 * (1 + cosine(own.mean, swapped.mean)) + 0.05 * (1 - cosine(own.log_var, swapped.log_var))
    assert float(swap_guide(own, swapped)) == pytest.approx(expected.mean(), abs=1e-12)
    assert float(swap_guide(own, own)) == pytest.approx(1.0)


def test_swap_guide_teaches_concatenated_pairs_to_be_odd(tmp_path: Path) -> None:
    guides = []
    for strength in (0.0, 5.0):
        torch.manual_seed(0)
        data = PlantedData(12, feature_dim=DIM)
        method = VPL(12, DIM, pair_features="concat", swap_guide=strength, lr=0.02, **SMALL)
        fit(method, data, tmp_path, max_epochs=40)
        swapped = data.context._replace(chosen=data.context.rejected, rejected=data.context.chosen)
        own, other = (Gaussian(**method.adapt(context).tensors) for context in (data.context, swapped))
        guides.append(float(swap_guide(own, other)))
    assert guides[1] < 0.1 < guides[0]


# ---------------------------------------------------------------------- episodes
def responses_of_users() -> tuple[Tensor, Tensor]:
    """Users 0-3 compare all pairs of six responses, users 4-5 pairs whose responses never repeat."""
    user, pairs = [], []
    for number in range(4):
        for left in range(6):
            for right in range(left):
                user.append(number)
                pairs.append((left, right))
    for number in (4, 5):
        for place in range(10):
            user.append(number)
            pairs.append((100 + 2 * place, 101 + 2 * place))
    return torch.tensor(user), torch.tensor(pairs)


def test_targets_share_no_response_with_their_context() -> None:
    user, responses = responses_of_users()
    nodes = response_nodes(responses, user)
    seen_context = set()
    for seed in range(20):
        torch.manual_seed(seed)
        context, rows = draw_episodes(user, nodes, "response", 0, 64, 32)
        for number in range(6):
            mine = context[user[context] == number], rows[user[rows] == number]
            left, right = (set(responses[part].flatten().tolist()) for part in mine)
            assert not left & right
            if number > 3:  # without common responses no pair is left out
                assert len(mine[0]) + len(mine[1]) == 10
                seen_context.add(len(mine[0]))
    assert len(seen_context) > 7  # from none to all


@pytest.mark.parametrize("rule", ["rest", "any"])
def test_sizes_of_contexts_and_targets(rule: Any) -> None:
    user = torch.tensor([2, 0, 2, 2, 0, 2, 1, 2, 2, 2, 2, 2])  # 2, 1 and 9 pairs
    sizes = set()
    for seed in range(30):
        torch.manual_seed(seed)
        context, rows = draw_episodes(user, None, rule, 2, 5, 3)
        in_context = torch.bincount(user[context], minlength=3)
        targets = torch.bincount(user[rows], minlength=3)
        assert len(set(context.tolist())) == len(context) and len(set(rows.tolist())) == len(rows)
        assert (user[context].diff() >= 0).all() and (user[rows].diff() >= 0).all()
        if rule == "rest":
            assert not set(context.tolist()) & set(rows.tolist())
            assert in_context[:2].tolist() == [1, 0] and targets[:2].tolist() == [1, 1]
        else:
            assert in_context[:2].tolist() == [2, 1] and targets[:2].tolist() == [2, 1]
        assert targets[2] == 3
        sizes.add(int(in_context[2]))
    assert sizes == {2, 3, 4, 5}


def test_episodes_follow_the_seed_and_change_with_it() -> None:
    user, responses = responses_of_users()
    nodes = response_nodes(responses, user)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(torch.cat(draw_episodes(user, nodes, "response", 0, 64, 32)).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_responses_are_told_apart_by_all_their_features() -> None:
    items = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    items[6] = items[5]
    items[6, 99] += 1e-6
    index = torch.tensor([[0, 1], [1, 2], [5, 6], [0, 5]])
    ids = response_ids(items[index[:, 0]], items[index[:, 1]])
    assert torch.equal(ids[:, :, None, None] == ids, index[:, :, None, None] == index)


# ---------------------------------------------------------------------- training, collapse, options
def test_planted_users_are_recovered_with_shots(tmp_path: Path) -> None:
    data = PlantedData(80, num_unseen=40, feature_dim=DIM, pairs_per_user=40, num_shots=32, signal=4.0)
    torch.manual_seed(0)
    method = VPL(80, DIM, latent_dim=4, hidden_dim=16, decoder="bilinear", lr=0.03, anneal_steps=20)
    fit(method, data, tmp_path, max_epochs=120, check_val_every_n_epoch=60)
    cosines = []
    for shots in (0, 4, 32):
        few = data.context._replace(mask=data.context.mask & (torch.arange(32) < shots))
        state = method.adapt(few)
        eye = torch.eye(DIM)
        with torch.no_grad():
            direction = torch.stack([method.score(eye, state.take(torch.full((DIM,), u))) for u in range(40)])
            direction = direction - method.score(torch.zeros(40, DIM), state)[:, None]
        cosines.append(float(torch.cosine_similarity(direction, data.directions[80:]).mean()))
    assert cosines[0] < cosines[1] < cosines[2] and cosines[2] > 0.85
    report = method.report()
    assert not is_collapsed(report) and report["active_units"] >= 1
    assert report["val_accuracy"] > report["val_other_accuracy"] + 0.1
    variances = [report[f"variance@{shots}"] for shots in (1, 2, 4, 8, 16, 32)]
    assert all(later < earlier for earlier, later in pairwise(variances))


def test_collapse_is_reported_and_warned_about(tmp_path: Path) -> None:
    """A KL weight that forbids the latent."""
    data = PlantedData(12, feature_dim=DIM)
    torch.manual_seed(0)
    method = VPL(12, DIM, kl_weight=1000.0, free_bits=0.0, anneal="none", lr=0.1, **SMALL)
    assert math.isnan(method.report()["val_accuracy"])  # not known before a fit
    with pytest.warns(UserWarning, match="posterior collapse: 0 of 3 latent dimensions are active"):
        quiet_trainer(tmp_path, max_epochs=60, check_val_every_n_epoch=30).fit(method, datamodule=data)
    report = method.report()
    assert report["kl"] < 0.05 and report["active_units"] == 0 and is_collapsed(report)
    assert abs(report["val_accuracy"] - report["val_other_accuracy"]) < 0.1
    assert report["variance@1"] > 0.9 and math.isnan(report["variance@32"])  # users have 30 pairs


def test_the_report_is_that_of_its_definitions(tmp_path: Path) -> None:
    """Against loops over users; the numbers stay with the checkpoint."""
    data = PlantedData(8, feature_dim=DIM, pairs_per_user=10)
    torch.manual_seed(0)
    method = fit(VPL(8, DIM, **SMALL), data, tmp_path, max_epochs=20, check_val_every_n_epoch=20)
    batch, val, report = data.train_batch, data.val_batch, method.report()
    kl, variance = 0.0, {1: 0.0, 4: 0.0, 8: 0.0}
    for user in range(8):
        rows = (batch.user_index == user).nonzero()[:, 0]
        for shots in (10, *variance):
            few = rows[:shots]
            state = method.adapt(
                Context(batch.chosen[few][None], batch.rejected[few][None], few[None] >= 0, batch.weight[few][None])  # type: ignore[index]
            )
            if shots in variance:
                variance[shots] += float(state.tensors["log_var"].exp().mean()) / 8
            else:
                own = Normal(state.tensors["mean"], (state.tensors["log_var"] / 2).exp())
                kl += float(kl_divergence(own, Normal(0.0, 1.0)).sum()) / 8
    assert report["kl"] == pytest.approx(kl, rel=1e-4)
    for shots, value in variance.items():
        assert report[f"variance@{shots}"] == pytest.approx(value, rel=1e-4)
    assert math.isnan(report["variance@16"])
    with torch.no_grad():
        facts = method.evaluate(val)
    for name, key in (("val_accuracy", "margin"), ("val_other_accuracy", "other_margin")):
        assert report[name] == pytest.approx(float((facts[key] > 0).float().mean()), abs=1e-6)
    again = VPL(8, DIM, **SMALL)
    again.load_state_dict(method.state_dict())
    assert str(again.report()) == str(report)  # nan included


def test_without_personal_signal_nothing_is_lost(tmp_path: Path) -> None:
    """Users dealt out at random and a KL that hardly costs: the latent as trained does harm, the one in use none."""
    data = PlantedData(20, 20, pairs_per_user=5, num_shots=5, num_test=40, feature_dim=8, shuffle_users=True)
    torch.manual_seed(0)
    method = VPL(20, 8, latent_dim=3, hidden_dim=8, kl_weight=0.01, free_bits=1.0, lr=0.02)
    fit(method, data, tmp_path, max_epochs=40, check_val_every_n_epoch=40)
    losses = {}
    for scale in (float(method.latent_scale), 1.0):
        method.latent_scale.fill_(scale)
        with torch.no_grad():
            facts = method.evaluate(data.test_batch)
        own, population = (
            -torch.nn.functional.logsigmoid(facts[name]).mean() for name in ("margin", "population_margin")
        )
        losses[scale] = float(own - population)
    assert min(losses) < 0.3 and losses[min(losses)] < 0.003 and losses[1.0] > 0.03


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    with pytest.raises(ValueError) as error:
        VPL(2, 3, latent_dim=0, kl_weight=-1.0, swap_guide=0.1, min_context=2, lr=-1.0)
    for text in (
        "model.lr: expected a finite number >= 0",
        "model.latent_dim",
        "model.kl_weight",
        "model.swap_guide acts only",
        "model.min_context acts only",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match=r"at most model\.max_context = 8, got 9"):
        VPL(2, 3, **{**PAPER, "min_context": 9})


def test_the_group_holds_the_published_numbers() -> None:
    names = ("posterior", "pair_features", "bounds", "decoder")
    assert [PAPER[name] for name in names] == ["attention", "concat", "clamp", "concat"]
    paper = VPL(2, 3, **PAPER)
    assert (paper.kl_weight, paper.anneal_steps, paper.num_targets, paper.max_context) == (3e-6, 10_000, 1, 8)
    assert paper.lr == 1e-4 and VPL(2, 3).lr == 0.005


# ---------------------------------------------------------------------- what users do to it
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": PAPER,
    "bilinear": {"decoder": "bilinear", "posterior": "attention", "target_rule": "rest"},
    "guided": {"pair_features": "concat", "swap_guide": 0.1, "latent_map": "sphere", "decoder": "concat"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_features_of_another_precision(name: str, tmp_path: Path) -> None:
    """Half-precision features are read in the precision of the method; so do fits under bfloat16 autocast work."""
    data = PlantedData(5, feature_dim=DIM)
    torch.manual_seed(0)
    method = VPL(5, DIM, **{**SMALL, **VARIANTS[name]})
    fit(method, data, tmp_path, max_epochs=4, check_val_every_n_epoch=2, precision="bf16-mixed").eval()
    batch, context = data.test_batch, data.context
    users = method.user_states(batch.user_index)
    assert isinstance(batch.chosen, Tensor) and isinstance(context.chosen, Tensor)
    assert isinstance(context.rejected, Tensor)
    with torch.no_grad():
        expected = method.score(batch.chosen, users)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            found = method.score(batch.chosen.to(dtype), users)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
            state = method.adapt(context._replace(chosen=context.chosen.to(dtype), rejected=context.rejected.to(dtype)))
            assert all(value.dtype == torch.float32 for value in state.tensors.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_small_worlds(name: str, tmp_path: Path) -> None:
    """One user, who is no collapse; one pair per user; ties alone; the same response twice; no validation pairs."""
    alone = PlantedData(1, num_unseen=1, feature_dim=DIM)
    short = PlantedData(2, num_unseen=2, feature_dim=DIM, pairs_per_user=1, num_test=1, num_shots=1)
    tied, same, blind = (PlantedData(3, feature_dim=DIM) for _ in range(3))
    tied.train_batch = tied.train_batch._replace(tie=torch.ones_like(tied.train_batch.tie))
    same.train_batch = same.train_batch._replace(rejected=same.train_batch.chosen)
    blind.val_dataloader = lambda: []  # type: ignore[method-assign]
    for data in (alone, short, tied, same, blind):
        torch.manual_seed(0)
        method = VPL(data.num_users, DIM, **{**SMALL, **VARIANTS[name]})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=2).fit(method, datamodule=data)
        said = [str(warning.message) for warning in caught if "collapse" in str(warning.message)]
        assert data is not alone or not said
        assert data is not blind or not any("nan" in text for text in said)
        method.eval()
        with torch.no_grad():
            facts = [method.evaluate(batch) for batch in (data.test_batch, data.unseen_batch)]
        assert all(value.isfinite().all() for fact in facts for value in fact.values())
        assert np.isfinite([method.report()[name] for name in ("kl", "active_units", "variance@1")]).all()


@pytest.mark.parametrize("name", ["default", "paper"])
def test_resuming_a_fit_changes_nothing(name: str, tmp_path: Path) -> None:
    """Interrupted after six of twelve epochs and resumed from the checkpoint: the same bits as without a break."""

    class Break(L.Callback):
        def __init__(self, at: int) -> None:
            self.at = at

        def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            torch.manual_seed(trainer.current_epoch)  # of the episodes of an epoch

        def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.current_epoch == self.at:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                trainer.should_stop = True

    data, states = PlantedData(6, feature_dim=DIM), []
    start = VPL(6, DIM, **{**SMALL, **VARIANTS[name]}).state_dict()
    for at, path in ((-1, None), (5, None), (-1, tmp_path / "half.ckpt")):
        method = VPL(6, DIM, **{**SMALL, **VARIANTS[name]})
        method.load_state_dict(start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = quiet_trainer(tmp_path, max_epochs=12, check_val_every_n_epoch=3, callbacks=[Break(at)])
            trainer.fit(method, datamodule=data, ckpt_path=path)
        states.append({key: value.clone() for key, value in method.state_dict().items()})
    full, half, resumed = states
    assert all(torch.equal(full[key], value) for key, value in resumed.items())
    assert not all(torch.equal(full[key], value) for key, value in half.items())


def test_a_misspelt_choice_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'film'") as error:
        VPL(3, 8, decoder="flm", schedule="cosin", target_rule="respons")  # type: ignore[arg-type]
    assert all(name in str(error.value) for name in ("model.decoder", "model.schedule", "model.target_rule"))


# ---------------------------------------------------------------------- users of very different size
def test_attention_of_many_users_is_that_of_each_alone() -> None:
    """Users share padded products with others of about their size; each must be as if alone."""
    torch.manual_seed(0)
    encoder = POSTERIORS["attention"](4, 3, True, "smooth").double()
    sizes = torch.tensor([1, 7, 0, 40, 3, 8, 2])
    user = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    user = user[torch.randperm(len(user))]
    tokens, weight = PairTokens(draw(len(user), 4), draw(len(user), 4, seed=1)), torch.rand(len(user)).double()
    together = encoder(tokens, weight, user, len(sizes))
    for row in range(len(sizes)):
        own = user == row
        alone = encoder(PairTokens(tokens[0][own], tokens[1][own]), weight[own], torch.zeros(int(own.sum())).long(), 1)
        torch.testing.assert_close(together.mean[row], alone.mean[0])
        torch.testing.assert_close(together.log_var[row], alone.log_var[0])


def test_attention_reads_as_many_pairs_in_use_as_in_training() -> None:
    """Which ones depends neither on their order, nor on who won, nor on the unit of the features."""
    method = VPL(2, DIM, **SMALL, posterior="attention", max_context=8)
    difference, user = draw(30, DIM), torch.tensor([0] * 25 + [1] * 5)
    weight = torch.ones(len(user))
    kept = method._read_pairs(difference, weight, user)
    assert torch.bincount(user[kept]).tolist() == [8, 5]
    order = torch.randperm(30)
    assert torch.equal(method._read_pairs(-difference[order], weight, user[order]), kept[order])
    method.feature_scale.fill_(1024.0)
    assert torch.equal(method._read_pairs(1024 * difference, weight, user), kept)
    assert VPL(2, DIM, **SMALL)._read_pairs(difference, weight, user).all()


def test_a_batch_is_arranged_by_its_content() -> None:
    """Renamed and reordered users, other units and what pairs share leave every user in the same place."""
    batch = batch_of()
    plain = arrange(batch, with_nodes=True)
    order = torch.randperm(len(batch.weight), generator=torch.Generator().manual_seed(5))
    fields: dict[str, Any] = {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    moved = batch._replace(**{name: value[order] for name, value in fields.items()})
    moved = moved._replace(
        user_index=USERS - 1 - moved.user_index, chosen=4 * moved.chosen + 1, rejected=4 * moved.rejected + 1
    )
    other = arrange(moved, with_nodes=True)
    assert torch.equal(plain.user, other.user) and torch.equal(plain.batch.weight, other.batch.weight)
    assert plain.nodes is not None and other.nodes is not None and torch.equal(plain.nodes, other.nodes)
    torch.testing.assert_close(other.batch.difference, 4 * plain.batch.difference)
