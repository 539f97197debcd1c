"""PAL on tokens: the supervised window, live backbones, and the exported reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

from plm.methods.pal import PAL, LivePAL
from plm.methods.pal.tokens import last_tokens, token_losses, token_weights, token_window
from plm.testing import PlantedData, quiet_trainer
from plm.types import PreferenceBatch, Tokens

USERS, DIM, K = 3, 16, 2


def tokens(rows: list[list[int]], pad: int = 0, length: int | None = None) -> Tokens:
    """Rows of token ids, padded on the right."""
    length = length or max(len(row) for row in rows)
    mask = torch.tensor([[place < len(row) for place in range(length)] for row in rows])
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    return Tokens(ids, mask, mask)


def network(cls: Any = LlamaModel) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=1,
    )
    return cls(config).eval()


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
    method = LivePAL(num_users=USERS, feature_dim=DIM, **{**defaults, **options})
    method.logits.data = torch.randn(USERS, K, generator=torch.Generator().manual_seed(2))
    method.attach(network())
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
    assert isinstance(batch.chosen, Tokens) and isinstance(batch.rejected, Tokens) and method.network is not None
    window, geometry, total = token_window(batch.chosen, batch.rejected), method.geometry, torch.zeros(())
    for row in range(3):
        point = geometry.projector((weights[row] @ geometry.raw_points())[None])[0, 0]
        values = []
        for place in window[row].nonzero()[:, 0].tolist():
            distance = []
            for ids in (CHOSEN[row], REJECTED[row]):
                hidden = method.network(input_ids=torch.tensor([ids])).last_hidden_state[0]
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


def test_backbone_is_trained_as_far_as_it_asks_for(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    data = PlantedData(num_users=USERS, feature_dim=DIM)
    data.view = "tokens"
    data.train_batch = data.val_batch = batch_of()  # type: ignore[assignment]
    for kind in ("frozen", "lora", "full"):
        method = live(lr=0.05)
        method.network_lr = 0.01
        assert method.network is not None
        method.network.requires_grad_(kind == "full")
        if kind == "lora":
            method.attach(get_peft_model(method.network, LoraConfig(r=2, target_modules=["q_proj"])))  # type: ignore[arg-type]
        before = {name: value.clone() for name, value in method.named_parameters()}
        groups = {group["name"] for group in method.param_groups()}
        assert ("network" in groups) is (kind != "frozen")
        trainer = quiet_trainer(tmp_path, max_epochs=3)
        trainer.fit(method, datamodule=data)
        moved = {name for name, value in method.named_parameters() if not torch.equal(value, before[name])}
        in_network = {name for name in moved if name.startswith("network.")}
        assert {
            "frozen": not in_network,
            "lora": in_network and all("lora" in name for name in in_network),
            "full": "network.embed_tokens.weight" in in_network,
        }[kind]
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)["state_dict"]
        kept = {name for name in state if name.startswith("network.")}
        assert {"frozen": not kept, "lora": kept and all("lora" in name for name in kept), "full": len(kept) > 10}[kind]


def test_live_margins_are_those_of_last_token_features() -> None:
    method, batch = live(), batch_of()
    assert isinstance(batch.chosen, Tokens) and method.network is not None
    with torch.no_grad():
        features = torch.stack(
            [method.network(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in CHOSEN]
        )
        torch.testing.assert_close(method.features(batch.chosen), features, atol=1e-5, rtol=1e-5)
        users = method.user_states(batch.user_index)
        torch.testing.assert_close(method.score(batch.chosen, users), method.score(features, users), atol=1e-4, rtol=0)
        margin = method.score(batch.chosen, users) - method.score(batch.rejected, users)
        torch.testing.assert_close(method.margin(batch), margin, atol=1e-4, rtol=0)
    method.network = None
    with pytest.raises(ValueError, match="attach"):
        method.loss(batch)
    with pytest.raises(ValueError, match="table"):
        live(users="posterior")


# ---------------------------------------------------------------------- export
def pal(**options: Any) -> PAL:
    torch.manual_seed(1)
    method = PAL(USERS, DIM, num_prototypes=K, projector="mlp1-gelu-dropout0", residual="bradley_terry", **options)
    method.base.data = torch.randn(DIM)
    method.feature_scale.fill_(1.7)
    return method.eval()


@pytest.mark.parametrize("options", [{"head": "dist"}, {"user_learner": "f(Pw)"}, {"head": "angle"}])
@pytest.mark.parametrize("normalize", [False, True])
def test_exported_model_gives_the_rewards_of_the_method(options: dict[str, Any], normalize: bool) -> None:
    """As a plain Hugging Face model on token ids, for a user, a prototype and the population."""
    method = pal(**options)
    method.hparams["backbone"] = {"class_path": "x", "init_args": {"pooling": "last", "normalize": normalize}}
    given = tokens(CHOSEN)
    weights = torch.softmax(torch.randn(K), -1)
    for chosen in (weights, torch.tensor([0.0, 1.0]), None):
        model = method.export_reward_model(network(LlamaForSequenceClassification), chosen)
        assert isinstance(model, LlamaForSequenceClassification)
        with torch.no_grad():
            logits: Tensor = model(input_ids=given.input_ids, attention_mask=given.attention_mask.long()).logits
            features = torch.stack(
                [model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in CHOSEN]
            )
            features = torch.nn.functional.normalize(features, dim=-1) if normalize else features
            users = method.population_state(3)
            if chosen is not None:
                users.tensors["weights"] = chosen.expand(3, -1)
            expected = method.score(features, users)
        assert logits.shape == (3, 1)
        torch.testing.assert_close(logits[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_exported_variant_b_reads_the_prompt_apart() -> None:
    method = pal(variant="B", head="angle")
    model = method.export_reward_model(network(), torch.tensor([0.3, 0.7]))
    response, prompt = tokens(CHOSEN), tokens(PROMPTS)
    with torch.no_grad():
        logits = model(response.input_ids, response.attention_mask, prompt.input_ids, prompt.attention_mask).logits
        base = network()
        features, prompts = (
            torch.stack([base(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in rows])
            for rows in (CHOSEN, PROMPTS)
        )
        users = method.population_state(3)
        users.tensors["weights"] = torch.tensor([[0.3, 0.7]]).expand(3, -1)
        expected = method._score(features, users, prompts)
    torch.testing.assert_close(logits[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_export_refuses_what_it_cannot_express() -> None:
    method = pal()
    with pytest.raises(ValueError, match="none negative, of sum one"):
        method.export_reward_model(network(LlamaForSequenceClassification), torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match="`score` layer"):
        method.export_reward_model(network())
    method.hparams["backbone"] = {"class_path": "x", "init_args": {"pooling": "mean"}}
    with pytest.raises(ValueError, match="pooling='mean'"):
        method.export_reward_model(network(LlamaForSequenceClassification))
