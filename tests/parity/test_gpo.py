"""GPO: what attends to what, what a context may be, and planted users."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from plm.functional import bt_losses, targets
from plm.method.episodes import draw_episodes
from plm.methods.gpo import GPO, Layer
from plm.testing import PlantedData
from plm.types import Context, PreferenceBatch
from tests.parity.planted_rivals import accuracies, fitted, opposite_users

DIM = 6


def method(max_context: int = 5) -> GPO:
    """Random weights everywhere, also where training starts at zero."""
    torch.manual_seed(0)
    found = GPO(3, DIM, width=8, layers=2, heads=2, max_context=max_context, conditioning="none")
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        found.bradley_terry.normal_()
    return found.eval()


def context(users: int = 3, pairs: int = 4) -> Context:
    draw = torch.Generator().manual_seed(2)
    chosen, rejected = (torch.randn(users, pairs, DIM, generator=draw) for _ in range(2))
    return Context(chosen, rejected, torch.ones(users, pairs).bool(), torch.ones(users, pairs))


def scores(model: GPO, support: Context) -> Tensor:
    return model.score(torch.ones(3, DIM), model.adapt(support)).detach()


def test_attention_is_torchs_over_the_context_and_the_null_token() -> None:
    """Against ``scaled_dot_product_attention`` of each head, with the residual, the branches and masked tokens."""
    torch.manual_seed(0)
    layer = Layer(8, 2, 0.0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    tokens, other = (torch.randn(3, count, 8, dtype=torch.float64) for count in (4, 5))
    seen = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    found = layer(tokens, *layer.remembered(other), seen)
    for row, count in enumerate((5, 2, 0)):
        keys, values = (
            torch.cat([null[None], part[row, :count]])
            for null, part in zip((layer.null_key, layer.null_value), layer.remembered(other), strict=True)
        )
        query = layer.query(layer.norm(tokens[row]))
        heads = [
            torch.nn.functional.scaled_dot_product_attention(query[:, part], keys[:, part], values[:, part])
            for part in (slice(0, 4), slice(4, 8))
        ]
        expected = tokens[row] + layer.out(torch.cat(heads, -1))
        expected = expected + layer.network(layer.second_norm(expected))
        assert torch.allclose(found[row], expected, atol=1e-12)


def test_the_order_of_pairs_and_padding_change_nothing() -> None:
    """Padding may hold anything finite; a real pair of zeros is a pair."""
    model, support = method(), context()
    plain = scores(model, support)
    order = [2, 0, 3, 1]
    turned = Context(*(value[:, order] for value in support[:4]))  # type: ignore[arg-type, index]
    assert torch.equal(scores(model, turned), plain)
    mask = support.mask.clone()
    mask[:, 3] = False
    first = Context(*(value[:, :3] for value in support[:4]))  # type: ignore[arg-type, index]
    assert torch.equal(scores(model, support._replace(mask=mask)), scores(model, first))
    assert torch.allclose(scores(method(max_context=9), first), scores(model, first), atol=1e-5)
    zeros = torch.zeros(3, 1, DIM)
    more = Context(
        torch.cat([first.features[0], zeros], 1), torch.cat([first.features[1], zeros], 1), support.mask, support.weight
    )
    assert not torch.allclose(scores(model, more), scores(model, first), atol=1e-4)


def test_nothing_is_the_population_bit_for_bit() -> None:
    model, support = method(), context()
    empty = support._replace(mask=torch.zeros(3, 4).bool())
    alone = model.score(torch.ones(3, DIM), model.population_state(3)).detach()
    assert torch.equal(scores(model, empty), alone) and alone.isfinite().all()
    assert not torch.allclose(scores(model, support), alone, atol=1e-3)


def test_a_response_is_scored_as_if_it_were_alone() -> None:
    model, responses = method(), torch.randn(3, 7, DIM, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        memory = model.reader.remember(*context().features, torch.ones(3, 4), torch.ones(3, 4).bool())
        together = model.reader.rewards(responses, memory)
        alone = torch.cat([model.reader.rewards(responses[:, place : place + 1], memory) for place in range(7)], 1)
    assert torch.allclose(together, alone, atol=1e-5)
    responses.requires_grad_()
    (gradient,) = torch.autograd.grad(model.reader.rewards(responses, memory)[:, 2].sum(), responses)
    assert gradient[:, 2].any() and not gradient[:, [0, 1, 3, 4, 5, 6]].any()


def test_every_user_counts_as_the_user_weighs_however_many_targets_are_drawn() -> None:
    """Users of 12 and of 200 pairs with weights that sum to the same: half of the loss each, by hand from margins."""
    count = torch.tensor([12, 200])
    draw, user = torch.Generator().manual_seed(5), torch.arange(2).repeat_interleave(count)
    chosen, rejected = (torch.randn(len(user), DIM, generator=draw) for _ in range(2))
    weight = (106 / count)[user] * torch.linspace(0.5, 1.5, 212)
    batch = PreferenceBatch(chosen, rejected, user, weight, torch.arange(212) % 7 == 0)
    model = method()
    with torch.no_grad():  # the population alone, whose margins are those of the linear model
        model.reader.head.weight.zero_()
    ordered, of_pair, nodes = model._arranged(batch)
    torch.manual_seed(1)
    assert nodes is not None
    rows = draw_episodes(of_pair, nodes, "response", 0, 5, 16).targets
    torch.manual_seed(1)
    out = model.loss(batch)
    means, shares = [], []
    for person in range(2):
        own = rows[of_pair[rows] == person]
        losses = bt_losses(ordered.difference[own] @ model.bradley_terry, targets(ordered.tie[own]))
        means.append((ordered.weight[own] * losses).sum() / ordered.weight[own].sum())
        shares.append(ordered.weight[of_pair == person].sum())
    expected = (shares[0] * means[0] + shares[1] * means[1]) / (shares[0] + shares[1])
    assert len(rows) > 8 and out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out["count"].item() == pytest.approx(weight.sum().item(), rel=1e-5)


def test_a_pair_of_weight_zero_takes_no_place() -> None:
    """Neither of the pairs that are read of a long history, nor in training."""
    model, support = method(max_context=2), context(pairs=6)
    first = Context(*(value[:, :2] for value in support[:4]))  # type: ignore[arg-type, index]
    weight = torch.where(torch.arange(6) < 2, 1.0, torch.zeros(3, 6))
    assert torch.equal(scores(model, support._replace(weight=weight)), scores(model, first))
    data = PlantedData(6, 2, feature_dim=DIM)
    batch = data.train_batch._replace(weight=(torch.arange(data.train_batch.num_pairs) % 3 > 0).float())
    losses = []
    for part in (batch, batch.take(batch.weight.nonzero()[:, 0])):
        torch.manual_seed(1)
        losses.append(model.loss(part)["loss"].item())
    assert losses[0] == losses[1]


def test_a_tie_says_which_pair_but_not_who_won() -> None:
    model, support = method(), context()
    tie = torch.zeros(3, 4).bool()
    tie[:, 0] = True
    swapped = torch.arange(4)[:, None] == 0
    other = support._replace(
        chosen=torch.where(swapped, support.features[1], support.features[0]),
        rejected=torch.where(swapped, support.features[0], support.features[1]),
        tie=tie,
    )
    assert torch.allclose(scores(model, support._replace(tie=tie)), scores(model, other), atol=1e-5)
    assert not torch.allclose(scores(model, support), scores(model, other._replace(tie=None)), atol=1e-3)


def test_long_histories_are_read_in_part_whatever_their_order() -> None:
    model, support = method(max_context=2), context()
    state = model.adapt(support)
    assert state.tensors["length"].tolist() == [4, 4, 4] and state.num_pairs.tolist() == [4, 4, 4]
    turned = Context(*(value.flip(1) for value in support[:4]))  # type: ignore[union-attr]
    assert torch.equal(scores(model, turned), scores(model, support))


def test_the_number_of_weights_by_hand() -> None:
    """P 384 * 128; embedder 257 * 128 + 128 * 128 with biases; a layer 8 W^2 + 13 W; target, last norm and head."""
    width = 128
    layer = 8 * width**2 + (4 + 1 + 2) * width + 4 * width + 2 * width
    expected = 384 * width + (2 * width + 1) * width + width + width**2 + width + 4 * layer + width + 2 * width + width
    model = GPO(1, 384, width=width, layers=4)
    assert model.reader.project.weight.numel() == 49_152
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"model\.heads: expected a divisor of model\.width = 6, got 4"):
        GPO(1, 2, width=6)


def test_users_of_opposite_tastes_are_told_apart(tmp_path: Path) -> None:
    data = opposite_users()
    torch.manual_seed(0)
    small = {"width": 16, "layers": 1, "heads": 2, "max_context": 10, "num_targets": 8, "dropout": 0.0}
    model = GPO(data.num_users, data.feature_dim, **small, lr=0.01)  # type: ignore[arg-type]
    accuracy = accuracies(fitted(model, data, tmp_path, 60), data.unseen_batch)
    assert accuracy["margin"] > 0.8 and accuracy["flipped_margin"] < 0.25, accuracy
    assert abs(accuracy["population_margin"] - 0.5) < 0.1, accuracy


def test_shuffled_users_get_nothing_from_their_context(tmp_path: Path) -> None:
    data = PlantedData(60, 20, shuffle_users=True)
    torch.manual_seed(0)
    model = fitted(GPO(60, 8, width=8, layers=1, heads=2, max_context=8, lr=0.01), data, tmp_path, 20)
    facts = model.evaluate(data.unseen_batch)
    added = facts["margin"] - facts["population_margin"]
    # nothing, or next to it: a scale is kept whose gain is larger than its error, which chance gives one time in four
    assert added.abs().mean() < 0.1 * facts["population_margin"].abs().mean()
