"""FastWeights against arithmetic by hand, loops over pairs, gradients and the ridge limit; and planted users."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from plm.functional import PairList, bt_losses, fit_gaussian
from plm.methods.fast_weights import FastWeights, siblings
from plm.testing import PlantedData
from plm.types import Context, PreferenceBatch
from tests.parity.planted_rivals import accuracies, fitted, opposite_users

DIM = 5


def plain() -> FastWeights:
    """Keys and queries are the features, no population, no pull, unit gain."""
    method = FastWeights(1, 2, num_keys=None, conditioning="none").double()
    with torch.no_grad():
        method.raw_pull.fill_(-torch.inf)
    return method.eval()


def context_of(difference: list[list[float]], tie: list[bool] | None = None) -> Context:
    """One user, whose rejected responses are zero."""
    chosen = torch.tensor([difference], dtype=torch.float64)
    ones = torch.ones(chosen.shape[:2], dtype=torch.float64)
    return Context(chosen, 0 * chosen, ones.bool(), ones, tie=None if tie is None else torch.tensor([tie]))


def random_method(value: str = "constant", tied: bool = False) -> FastWeights:
    torch.manual_seed(1)
    method = FastWeights(3, DIM, num_keys=3, tied=tied, value=value).double()  # type: ignore[arg-type]
    with torch.no_grad():
        method.bradley_terry.normal_()
        method.feature_scale.fill_(1.7)
        method.log_gain.fill_(0.4)
    method.num_train_pairs = 1
    return method.eval()


def random_context(users: int = 3, pairs: int = 6) -> Context:
    draw = torch.Generator().manual_seed(2)
    chosen, rejected = (torch.randn(users, pairs, DIM, generator=draw, dtype=torch.float64) for _ in range(2))
    return Context(chosen, rejected, torch.ones(users, pairs).bool(), torch.ones(users, pairs, dtype=torch.float64))


def flipped(context: Context) -> Context:
    return context._replace(chosen=context.rejected, rejected=context.chosen)


def test_two_pairs_by_hand() -> None:
    """d = (1, 0), (0, 2): s = (1, 2), n = 2, the reward of (1, 1) is 1.5; with the second pair swapped -0.5."""
    method, response = plain(), torch.ones(1, 2, dtype=torch.float64)
    state = method.adapt(context_of([[1, 0], [0, 2]]))
    assert state.tensors["write"].tolist() == [[1, 2]] and state.tensors["evidence"].tolist() == [2]
    assert method.score(response, state).item() == 1.5
    assert method.score(response, method.adapt(context_of([[1, 0], [0, -2]]))).item() == -0.5


def test_a_tie_adds_nothing() -> None:
    method = plain()
    with_tie = method.adapt(context_of([[1, 0], [5, 5], [0, 2]], [False, True, False]))
    without = method.adapt(context_of([[1, 0], [0, 2]]))
    assert all(torch.equal(with_tie.tensors[name], without.tensors[name]) for name in ("write", "evidence"))
    assert with_tie.num_pairs.item() == 3


@pytest.mark.parametrize("tied", [True, False])
def test_reversed_labels_reverse_the_personal_part(tied: bool) -> None:
    """``z_flip + z = 2 z_global`` for every response; values of surprise are not even, and break it."""
    responses, context = random_context().chosen[:, 0], random_context()
    for value in ("constant", "surprise"):
        method = random_method(value, tied)
        own, reverse = (method.score(responses, method.adapt(one)) for one in (context, flipped(context)))
        twice = 2 * method.score(responses, method.population_state(3))
        assert torch.allclose(own + reverse, twice, atol=1e-9) == (value == "constant")
        assert not torch.allclose(own, reverse, atol=1e-2)


def test_states_add_up_and_a_pair_leaves_no_trace() -> None:
    """A user read in two parts, in another order, and with one pair taken away again."""
    method, context = random_method(), random_context()

    def read(*pairs: int) -> dict[str, Tensor]:
        rows = list(pairs)
        part = context._replace(
            chosen=context.features[0][:, rows],
            rejected=context.features[1][:, rows],
            mask=context.mask[:, rows],
            weight=context.weight[:, rows],
        )
        return method.adapt(part).tensors

    whole, first, second, other = read(0, 1, 2, 3, 4, 5), read(0, 1), read(2, 3, 4, 5), read(5, 3, 1, 4, 2, 0)
    without, last = read(0, 1, 2, 3, 4), read(5)
    for name, value in whole.items():
        assert torch.allclose(first[name] + second[name], value, atol=1e-12)
        assert torch.allclose(other[name], value, atol=1e-12)
        assert torch.allclose(value - last[name], without[name], atol=1e-12)


def test_unequal_weights_are_divided_by_their_mean_so_that_sums_do_not_add_up() -> None:
    """Weights 1 and 3 of (1, 0), (0, 2): 1/2 and 3/2; the first pair alone weighs 1, not the half that it added."""
    method, pairs = plain(), context_of([[1, 0], [0, 2]])
    both = method.adapt(pairs._replace(weight=torch.tensor([[1.0, 3.0]], dtype=torch.float64))).tensors
    assert both["write"].tolist() == [[0.5, 3.0]] and both["evidence"].tolist() == [2]
    alone = method.adapt(context_of([[1, 0]])).tensors
    assert alone["write"].tolist() == [[1.0, 0.0]] and alone["evidence"].tolist() == [1]


def test_a_write_is_a_step_of_gradient_descent_and_the_limit_of_the_ridge() -> None:
    """``bt'(0) = -1/2``: s is -2 times the gradient at zero, and ``2 lambda w*(lambda) -> s`` for a strong ridge."""
    method, context = random_method(), random_context()
    keys = (method._key(context.difference)).detach()
    written = method.adapt(context).tensors["write"]
    weights = torch.zeros_like(written, requires_grad=True)
    loss = bt_losses(torch.einsum("usk,uk->us", keys, weights), torch.ones(6, dtype=torch.float64)).sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert torch.allclose(-2 * gradient, written, atol=1e-12)
    strength, ones = 1e6, torch.ones(18, dtype=torch.float64)
    user = torch.arange(3).repeat_interleave(6)
    pairs = PairList(keys.flatten(0, 1) / strength**0.5, 0 * ones, ones, ones, user, 3)
    fit = fit_gaussian(pairs).mean / strength**0.5
    assert torch.allclose(2 * strength * fit, written, rtol=1e-4, atol=1e-4)


def test_surprise_is_a_step_from_the_population() -> None:
    """With the features as keys, s is -2 times the gradient of the user's loss at the population's direction."""
    torch.manual_seed(1)
    method, context = FastWeights(3, DIM, num_keys=None, value="surprise").double().eval(), random_context()
    method.bradley_terry.normal_()
    weights = method.bradley_terry.repeat(3, 1).requires_grad_()
    loss = bt_losses(torch.einsum("usk,uk->us", context.difference, weights), torch.ones(6, dtype=torch.float64)).sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert torch.allclose(-2 * gradient, method.adapt(context).tensors["write"], atol=1e-12)


def test_a_strong_pull_gives_the_population() -> None:
    method, context = random_method(), random_context()
    with torch.no_grad():
        method.raw_pull.fill_(1e12)
    responses = context.chosen[:, 0]
    assert torch.allclose(
        method.score(responses, method.adapt(context)), method.score(responses, method.population_state(3)), atol=1e-9
    )


def test_siblings_are_those_of_a_loop() -> None:
    """Four responses, two users, repeated pairs, swapped pairs and a pair of one response with itself."""
    draw = torch.Generator().manual_seed(0)
    responses = torch.randn(4, 3, generator=draw)
    ends, user = torch.randint(4, (40, 2), generator=draw), torch.randint(2, (40,), generator=draw)
    values = torch.randn(40, 2, generator=draw, dtype=torch.float64)
    found = siblings(responses[ends[:, 0]], responses[ends[:, 1]], user).sums(values)
    for row in range(40):
        mine = set(ends[row].tolist())
        shared = [other for other in range(40) if user[other] == user[row] and mine & set(ends[other].tolist())]
        assert torch.allclose(found[row], values[shared].sum(0), atol=1e-12)


def pairs_of_users(monkeypatch: pytest.MonkeyPatch) -> PreferenceBatch:
    """Two users with pairs that share responses, and a third with a single pair; nothing is thinned out."""
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.tensor(0.0 if count == 10 else 1.0).expand(count))
    draw = torch.Generator().manual_seed(3)
    responses = torch.randn(8, DIM, generator=draw, dtype=torch.float64).float().double()
    left = torch.tensor([0, 1, 2, 4, 0, 2, 3, 6, 5, 0])
    right = torch.tensor([1, 2, 3, 5, 4, 3, 5, 7, 1, 7])
    user = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2])
    ones = torch.ones(10, dtype=torch.float64)
    tie = torch.arange(10) == 6
    return PreferenceBatch(responses[left], responses[right], user, ones, tie)


def test_every_pair_is_predicted_from_the_pairs_that_share_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training loss is that of ten separate adaptations; who has a single pair is predicted by the population."""
    batch, method = pairs_of_users(monkeypatch), random_method()
    chosen, rejected = batch.features
    losses = []
    for row in range(10):
        ends = torch.stack([chosen[row], rejected[row]])
        apart = [
            other
            for other in range(10)
            if batch.user_index[other] == batch.user_index[row]
            and not any(bool((side[other] == ends).all(-1).any()) for side in batch.features)
        ]
        state = method.population_state(1)
        if apart:
            ones = torch.ones(1, len(apart), dtype=torch.float64)
            support = Context(chosen[None, apart], rejected[None, apart], ones.bool(), ones, tie=batch.tie[None, apart])
            state = method._adapt(support)
        else:
            assert row == 9
        margin = method._margin(batch._replace(chosen=chosen[row : row + 1], rejected=rejected[row : row + 1]), state)
        losses.append(bt_losses(margin, torch.tensor([0.5 if batch.tie[row] else 1.0], dtype=torch.float64)))
    assert torch.allclose(method.loss(batch)["nll"], torch.cat(losses).mean(), atol=1e-9)


def test_arguments_that_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.num_keys: expected an integer >= 1, got 0"):
        FastWeights(1, 2, num_keys=0)
    with pytest.raises(ValueError, match=r"model\.tied acts only with learned keys"):
        FastWeights(1, 2, num_keys=None, tied=False)


@pytest.mark.parametrize(("num_keys", "least"), [(8, 0.85), (None, 0.68)])
def test_users_of_opposite_tastes_are_told_apart(num_keys: int | None, least: float, tmp_path: Path) -> None:
    """Half want one direction and half its opposite, so that no population is right more often than by chance.

    Learned keys find the one direction in which users differ. In all eight the mean of 10 differences has an expected
    part of about 0.75 along it and a standard error of 1 / sqrt(10) along each of the others: a cosine of about 0.67,
    which ranks ``1 - acos(0.67) / pi`` = 0.73 of the pairs as the user does.
    """
    data = opposite_users()
    method = fitted(FastWeights(data.num_users, data.feature_dim, num_keys=num_keys, lr=0.03), data, tmp_path, 60)
    accuracy = accuracies(method, data.unseen_batch)
    assert accuracy["margin"] > least and accuracy["flipped_margin"] < 1.03 - least, accuracy
    assert abs(accuracy["population_margin"] - 0.5) < 0.08, accuracy


def test_shuffled_users_get_no_personal_part(tmp_path: Path) -> None:
    data = PlantedData(60, 20, shuffle_users=True)
    method = fitted(FastWeights(60, 8, num_keys=4, lr=0.03), data, tmp_path, 60)
    assert method.report()["scale"] == 0.0
    facts = method.evaluate(data.unseen_batch)
    assert torch.equal(facts["margin"], facts["population_margin"])
