"""PAL on tokens: the supervised window and live backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from plm.methods.pal import LivePAL
from plm.methods.pal.tokens import last_tokens, token_losses, token_weights, token_window
from plm.testing import PlantedData, quiet_trainer, tiny_causal_lm
from plm.types import PreferenceBatch, Tokens

USERS, DIM, K = 3, 16, 2


def tokens(rows: list[list[int]], pad: int = 0, length: int | None = None) -> Tokens:
    """Rows of token ids, padded on the right."""
    length = length or max(len(row) for row in rows)
    mask = torch.tensor([[place < len(row) for place in range(length)] for row in rows])
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    return Tokens(ids, mask, mask)


CHOSEN = [[5, 6, 7, 8, 9], [5, 6, 9], [5, 6, 7, 7]]
REJECTED = [[5, 6, 8, 8], [5, 6, 9, 4, 4, 3], [5, 6, 7, 7]]
PROMPTS = [[11, 12], [13], [11, 12, 14]]


def batch_of(pad: int = 0, length: int = 6) -> PreferenceBatch:
    return PreferenceBatch(
        tokens(CHOSEN, pad, length),
        tokens(REJECTED, pad, length),
        torch.arange(3),
        torch.ones(3),
        torch.zeros(3, dtype=torch.bool),
        prompt=tokens(PROMPTS, pad),
    )


def live(**options: Any) -> LivePAL:
    torch.manual_seed(1)
    defaults: dict[str, Any] = {"num_prototypes": K, "users": "table", "projector": "mlp1-gelu-dropout0"}
    defaults |= {"backbone": tiny_causal_lm("llama").spec(), "train_backbone": "none"}
    method = LivePAL(num_users=USERS, feature_dim=DIM, **{**defaults, **options})
    method.configure_model()
    method.logits.data = torch.randn(USERS, K, generator=torch.Generator().manual_seed(2))
    method.trained_on_prompts.fill_(method.variant == "B")
    method.num_train_pairs = 1
    return method


# ---------------------------------------------------------------------- window and weights
@pytest.mark.parametrize("pad", [0, 1, 49])
def test_window_runs_from_the_first_difference_to_the_longer_end(pad: int) -> None:
    """By hand: differ at 2, ends 5 and 4; differ at 3 where the shorter ends, end 6; equal rows: their last token."""
    window = token_window(tokens(CHOSEN, pad, 8), tokens(REJECTED, pad, 8))
    expected = [[False] * 2 + [True] * 3 + [False] * 3, [False] * 3 + [True] * 3 + [False] * 2]
    assert window.tolist() == [*expected, [False] * 3 + [True] + [False] * 4]


def test_a_response_may_hold_the_padding_token_itself() -> None:
    window = token_window(tokens([[5, 0, 0]], 0, 5), tokens([[5, 0]], 0, 5))
    assert window.tolist() == [[False, False, True, False, False]]


def test_token_weights_by_hand() -> None:
    window = torch.tensor([[False, True, True, True], [True, False, False, False]])
    assert (token_weights(window, "cumulative") * 6).tolist() == [[0, 1, 2, 3], [6, 0, 0, 0]]
    assert token_weights(window, "last").tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    torch.testing.assert_close(token_weights(window, "mean")[0, 1:], torch.full((3,), 1 / 3))


@pytest.mark.parametrize("kind", ["logistic", "cross_entropy", "hinge", "smooth_hinge"])
@pytest.mark.parametrize("weighting", ["mean", "cumulative", "last"])
def test_token_loss_is_the_loop_over_tokens(kind: str, weighting: str) -> None:
    margin = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    margin[0, 5] = torch.nan  # outside the window
    margin.requires_grad_()
    window = token_window(tokens(CHOSEN, 0, 6), tokens(REJECTED, 0, 6))
    found = token_losses(margin, torch.tensor([1.0, 0.5, 1.0]), window, weighting, kind)
    elementary = {
        "logistic": lambda z: torch.nn.functional.softplus(-z),
        "cross_entropy": lambda z: torch.nn.functional.softplus(-z),
        "hinge": lambda z: (1 - z).clamp_min(0),
        "smooth_hinge": lambda z: 0 * z if z >= 1 else ((1 - z) ** 2 / 2 if z >= 0 else 0.5 - z),
    }[kind]
    for row, target in enumerate([1.0, 0.5, 1.0]):
        values = [target * elementary(z) + (1 - target) * elementary(-z) for z in margin[row][window[row]]]
        count = len(values)
        weights = {
            "mean": [1 / count] * count,
            "cumulative": [(j + 1) / (count * (count + 1) / 2) for j in range(count)],
            "last": [0.0] * (count - 1) + [1.0],
        }[weighting]
        expected = sum(w * value for w, value in zip(weights, values, strict=True))
        torch.testing.assert_close(found[row], expected)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert margin.grad is not None and margin.grad.isfinite().all() and margin.grad[0, 5] == 0


def test_a_row_that_has_ended_repeats_its_last_token() -> None:
    assert last_tokens(tokens([[5, 6], [7, 8, 9]], 0, 4)).tolist() == [[0, 1, 1, 1], [0, 1, 2, 2]]


# ---------------------------------------------------------------------- live backbones
def test_live_loss_of_variant_a_by_loops() -> None:
    method, batch = live(head="dist", loss="hinge", user_learner="f(Pw)"), batch_of()
    weights = torch.softmax(method.logits, -1)
    assert isinstance(batch.chosen, Tokens) and isinstance(batch.rejected, Tokens)
    window, geometry, total = token_window(batch.chosen, batch.rejected), method.geometry, torch.zeros(())
    for row in range(3):
        point = geometry.projector((weights[row] @ geometry.raw_points())[None])[0, 0]
        values = []
        for place in window[row].nonzero()[:, 0].tolist():
            distance = []
            for ids in (CHOSEN[row], REJECTED[row]):
                hidden = method.policy.network.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
                item = geometry.projector(hidden[min(place, len(ids) - 1)][None])[0, 0]
                distance.append((item - point).norm())
            values.append((1 - (distance[1] - distance[0])).clamp_min(0))
        ranks = torch.arange(1, len(values) + 1)
        total = total + (torch.stack(values) * ranks).sum() / ranks.sum() / 3
    torch.testing.assert_close(method.loss(batch)["nll"], total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"variant": "B", "head": "angle"}, {"variant": "B", "head": "angle", "alignment": "token"}]
)
def test_padding_changes_nothing(options: dict[str, Any]) -> None:
    method = live(**options)
    loss = method.loss(batch_of(0, 6))["loss"]
    for pad, length in ((1, 6), (0, 9), (49, 12)):
        torch.testing.assert_close(method.loss(batch_of(pad, length))["loss"], loss, atol=1e-5, rtol=1e-5)
    uneven = batch_of()._replace(chosen=tokens(CHOSEN, 3), rejected=tokens(REJECTED, 7))  # as batches come
    torch.testing.assert_close(method.loss(uneven)["loss"], loss, atol=1e-5, rtol=1e-5)


def test_token_alignment_pairs_places_and_pooling_reads_the_whole_prompt() -> None:
    """With a causal backbone, response tokens up to place 5 see prompt tokens up to place 5, pooling sees all eight."""
    rows = [[11, 12, 13, 14, 15, 16, 17, 18]] * 3
    batch = batch_of()._replace(prompt=tokens(rows))
    late = batch._replace(prompt=tokens([[*row[:6], 40, 41] for row in rows]))
    early = batch._replace(prompt=tokens([[40, *row[1:]] for row in rows]))
    loss = {}
    for alignment in ("pooled", "token"):
        method = live(variant="B", head="angle", alignment=alignment)
        loss[alignment] = method.loss(batch)["loss"]
        assert not torch.allclose(method.loss(early)["loss"], loss[alignment])
        assert torch.allclose(method.loss(late)["loss"], loss[alignment]) is (alignment == "token")
        short = batch._replace(prompt=tokens([[11]] * 3))  # one token: both read the same
        loss[alignment + " short"] = method.loss(short)["loss"]
    assert not torch.allclose(loss["pooled"], loss["token"])
    torch.testing.assert_close(loss["pooled short"], loss["token short"])


@pytest.mark.parametrize("kind", ["none", "lora", "full"])
def test_backbone_is_trained_as_far_as_it_is_asked_for(kind: str, tmp_path: Path) -> None:
    data = PlantedData(num_users=USERS, feature_dim=DIM)
    data.view = "tokens"
    data.train_batch = data.val_batch = batch_of()  # type: ignore[assignment]
    method = live(lr=0.05, train_backbone=kind, backbone_lr=0.01, rank=2)
    before = {name: value.clone() for name, value in method.named_parameters()}
    assert ("backbone" in {group["name"] for group in method.param_groups()}) is (kind != "none")
    trainer = quiet_trainer(tmp_path, max_epochs=3)
    trainer.fit(method, datamodule=data)
    moved = {name for name, value in method.named_parameters() if not torch.equal(value, before[name])}
    network = {name for name in moved if name.startswith("policy.")}
    assert ("adapter" in moved) is (kind == "lora")
    assert bool(network) is (kind == "full") and (kind != "full" or any("embed_tokens" in name for name in network))
    state = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)["state_dict"]
    kept = {name for name in state if name.startswith("policy.")}
    assert ("adapter" in state) is (kind == "lora") and (len(kept) > 10 if kind == "full" else not kept)


def test_clipping_bounds_each_user_apart_and_all_else_together() -> None:
    """By hand: users' gradients of lengths 2 and 0.5, and others of joint length 5, under the limit 1."""
    method = live(projector="identity")
    points, table = method.geometry.prototypes, method.logits
    assert points is not None and isinstance(table, torch.nn.Parameter)
    points.grad = torch.zeros_like(points)
    points.grad[0, 0], points.grad[1, 3] = 3.0, 4.0
    table.grad = torch.sparse_coo_tensor(
        torch.tensor([[0, 2]]), torch.tensor([[2.0, 0.0], [0.3, 0.4]]), table.shape, check_invariants=True
    )
    method.configure_gradient_clipping(torch.optim.SGD([points]), 1.0)
    torch.testing.assert_close(points.grad[[0, 1], [0, 3]], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(table.grad.to_dense()[[0, 2]], torch.tensor([[1.0, 0.0], [0.3, 0.4]]))


def test_live_margins_are_those_of_last_token_features() -> None:
    method, batch = live(), batch_of()
    assert isinstance(batch.chosen, Tokens)
    with torch.no_grad():
        features = torch.stack(
            [method.policy.network.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in CHOSEN]
        )
        torch.testing.assert_close(method.features(batch.chosen), features, atol=1e-5, rtol=1e-5)
        users = method.user_states(batch.user_index)
        torch.testing.assert_close(method.score(batch.chosen, users), method.score(features, users), atol=1e-4, rtol=0)
        margin = method.score(batch.chosen, users) - method.score(batch.rejected, users)
        torch.testing.assert_close(method.margin(batch), margin, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="table"):
        live(users="posterior")
