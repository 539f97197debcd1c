"""LoRADPO where it is used in earnest: precision, recomputation, odd batches and users, and what it refuses."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from plm.backbones import CausalLM, HashingBackbone, Policy
from plm.checkpoint import load_method
from plm.methods.lora_dpo import LoRADPO
from plm.testing.contract import quiet_trainer, saved
from plm.types import Context, PreferenceBatch, Tokens
from tests.loaders import Loader

Folder = Callable[[str], Path]
PAIRS = [
    ("what is this?", " a cat", " nothing at all"),
    ("hello", " to you", " no"),
    ("count", " one", " two three"),
    ("why", " so", " because"),
]


def make(folder: Path, num_users: int = 3, **options: Any) -> LoRADPO:
    common = {"rank": 2, "alpha": 4.0, "lr": 1e-2, "warmup": 0.0, "schedule": "constant"}
    method = LoRADPO(
        num_users=num_users, feature_dim=16, backbone=CausalLM(str(folder)).spec(), **{**common, **options}
    )
    method.configure_model()
    return method


def batch_of(method: LoRADPO, users: list[int], pairs: int = len(PAIRS)) -> PreferenceBatch:
    rows = PAIRS[:pairs]
    sides = [method.causal_lm.represent([row[0] for row in rows], [row[side] for row in rows]) for side in (1, 2)]
    tie = torch.zeros(pairs, dtype=torch.bool)
    return PreferenceBatch(sides[0], sides[1], torch.tensor(users), torch.ones(pairs), tie)


def fit(method: LoRADPO, batches: list[PreferenceBatch], tmp_path: Path, **options: Any) -> list[float]:
    """Losses of a fit over these batches."""
    losses: list[float] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(tmp_path, **{"max_epochs": 1, "callbacks": [Keep()], **options})
        trainer.fit(method, train_dataloaders=Loader(batches))
    method.trainer = None
    return losses


# ---------------------------------------------------------------------- precision and recomputation
MODES: dict[str, dict[str, Any]] = {
    "shared": {},
    "per_user": {"mode": "per_user"},
    "basis": {"mode": "basis", "num_bases": 2},
    "prefix": {"adapter": "prefix", "mode": "per_user"},
    "full": {"adapter": "full", "lr": 1e-3},
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("case", MODES)
def test_half_precision_trains_towards_the_same(causal_lm: Folder, kind: str, case: str, tmp_path: Path) -> None:
    found = []
    for one in ("32-true", "bf16-mixed"):
        method = make(causal_lm(kind), **MODES[case])
        found.append(fit(method, [batch_of(method, [0, 0, 1, 2])] * 4, tmp_path, precision=one))
    assert found[0][-1] < found[0][0] - 0.01
    # bf16 keeps three digits of log-probabilities of some 20 nats; beta is 0.1
    assert found[1] == pytest.approx(found[0], abs=0.1)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_checkpointed_blocks_run_again_and_give_the_same(
    causal_lm: Folder, kind: str, share_prompts: bool, adapter: str, tmp_path: Path
) -> None:
    results, runs = [], []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing, "share_prompts": share_prompts, "adapter": adapter}
        method = make(causal_lm(kind), mode="per_user", **options)
        count = [0]

        def add(*_: Any, count: list[int] = count) -> None:
            count[0] += 1

        [block, *_] = [m for m in method.policy.network.modules() if type(m).__name__.endswith("Attention")]
        block.register_forward_pre_hook(add)
        fit(method, [batch_of(method, [0, 0, 1, 2])] * 3, tmp_path)
        results.append(method.adapters.detach().clone())
        runs.append(count[0])
    assert torch.equal(results[0], results[1])
    assert runs[1] == runs[0] + 3, "once more in each of three backward passes"


def test_a_reference_that_moves_is_the_mix_of_the_weights_so_far(causal_lm: Folder, tmp_path: Path) -> None:
    """TR-DPO: after every second of five steps 0.6 of the policy's weights and 0.4 of its own."""
    method = make(causal_lm("llama"), adapter="full", lr=1e-3, ref_model_sync_steps=2)
    seen = [copied(method.policy)]

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(copied(method.policy))

    fit(method, [batch_of(method, [0, 0, 1, 2])] * 5, tmp_path, callbacks=[Keep()])
    found = copied(method._moving[0])
    for name, start in seen[0].items():
        expected = 0.6 * seen[4][name] + 0.4 * (0.6 * seen[2][name] + 0.4 * start)
        assert torch.allclose(found[name], expected, rtol=0, atol=5e-7)
    moved = max(float((seen[4][name] - start).abs().max()) for name, start in seen[0].items())
    assert moved > 1e-3


def test_a_reference_that_moved_is_held_once_and_by_a_fit_alone(causal_lm: Folder, tmp_path: Path) -> None:
    """A fit that goes on takes it out of the checkpoint, at the value it had; who loads the method keeps none."""
    options: dict[str, Any] = {"adapter": "full", "lr": 1e-3, "ref_model_sync_steps": 1}
    method = make(causal_lm("gpt2"), **options)
    method.user_ids = ["a", "b", "c"]
    batch = batch_of(method, [0, 0, 1, 2])
    fit(method, [batch] * 2, tmp_path)
    with saved(method) as path:
        loaded = load_method(path)
        assert isinstance(loaded, LoRADPO) and loaded._saved_reference is None and not loaded._moving
        resumed = make(causal_lm("gpt2"), **options)
        resumed.trainer = SimpleNamespace(training=True)  # type: ignore[assignment]
        resumed.on_load_checkpoint(torch.load(path, weights_only=True))
        resumed.trainer = None
    assert resumed._saved_reference is not None
    found, expected = copied(resumed.loss_reference()), copied(method.loss_reference())
    assert resumed._saved_reference is None and found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def copied(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: value.detach().double().clone() for name, value in policy.network.named_parameters()}


def test_only_the_loss_is_by_a_reference_that_moves(causal_lm: Folder, tmp_path: Path) -> None:
    """A reference that is the policy leaves every step at log 2; rewards are those over the untrained network."""
    options = {"adapter": "full", "lr": 1e-3, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    method = make(causal_lm("gpt2"), **options)
    batch = batch_of(method, [0, 0, 1, 2])
    assert fit(method, [batch] * 3, tmp_path) == pytest.approx([math.log(2)] * 3, abs=1e-5)
    rewards, loaded = method.score(batch.chosen), make(causal_lm("gpt2"), adapter="full")
    loaded.load_state_dict(method.state_dict(), strict=False)
    assert rewards.abs().max() > 1e-3 and torch.allclose(rewards, loaded.eval().score(batch.chosen), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_gives_the_same(causal_lm: Folder, tmp_path: Path) -> None:
    results = []
    for compiled in (False, True):
        method = make(causal_lm("llama"), mode="per_user", compile_network=compiled)
        batches = [batch_of(method, [0, 0, 1, 1]), batch_of(method, [0, 0], 2), batch_of(method, [2, 1, 1], 3)]
        fit(method, batches, tmp_path)
        results.append(method.adapters.detach().clone())
    assert torch.allclose(results[0], results[1], atol=1e-5)
    from torch._dynamo.utils import counters

    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


@pytest.mark.parametrize("case", ["shared", "basis", "full"])
def test_accumulated_batches_are_one_batch(causal_lm: Folder, case: str, tmp_path: Path) -> None:
    """And users who take steps of their own refuse it.

    A bias of all keys shifts the scores of a query alike, so attention does not feel it: its gradient is rounding, and
    Adam makes a whole step of that. Such entries are left out.
    """
    whole, parts = (make(causal_lm("gpt2"), **MODES[case]) for _ in range(2))
    start = [value.detach().clone() for value in whole.parameters()]
    batch = batch_of(whole, [0, 1, 2, 0])
    fit(whole, [batch], tmp_path)
    fit(parts, [take(batch, [0, 1]), take(batch, [2, 3])], tmp_path, accumulate_grad_batches=2)
    assert (
        max((one - before).detach().abs().max() for before, one in zip(start, whole.parameters(), strict=True)) > 5e-4
    )
    for (name, one), two in zip(whole.named_parameters(), parts.parameters(), strict=True):
        felt = torch.ones_like(one, dtype=torch.bool)
        if name.endswith("c_attn.bias") and one.grad is not None:
            felt[16:32] = False  # queries, keys, values of width 16
            assert one.grad[~felt].abs().max() < 1e-8 < one.grad[felt].abs().max()
        assert torch.allclose(one[felt], two[felt], atol=1e-5), name
    with pytest.raises(ValueError, match=r"accumulate_grad_batches: expected 1 .*per_user.*pairs_per_user"):
        fit(make(causal_lm("gpt2"), mode="per_user"), [batch], tmp_path, accumulate_grad_batches=2)


def take(batch: PreferenceBatch, rows: list[int]) -> PreferenceBatch:
    index = torch.tensor(rows)
    assert isinstance(batch.chosen, Tokens) and isinstance(batch.rejected, Tokens)
    chosen, rejected = batch.chosen.take(index).trimmed(), batch.rejected.take(index).trimmed()
    return PreferenceBatch(chosen, rejected, batch.user_index[index], batch.weight[index], batch.tie[index])


# ---------------------------------------------------------------------- odd batches and users
@pytest.mark.parametrize("case", MODES)
def test_one_pair_of_one_user(causal_lm: Folder, case: str, tmp_path: Path) -> None:
    method = make(causal_lm("llama"), num_users=1, **MODES[case])
    losses = fit(method, [batch_of(method, [0], 1)] * 4, tmp_path)
    assert losses[-1] < losses[0]


def test_ties_and_weights(causal_lm: Folder) -> None:
    """A tie is the mean of both orders; without weight a pair does not count; each user's weights are shares."""
    method = make(causal_lm("gpt2"), mode="per_user", beta=0.7)
    with torch.no_grad():
        method.adapters += 0.2 * torch.randn(method.adapters.shape, generator=torch.Generator().manual_seed(0))
    batch = batch_of(method, [0, 0, 1, 2])
    losses = [loss_of(method, take(batch, [row])) for row in range(4)]
    swapped = batch._replace(chosen=batch.rejected, rejected=batch.chosen)
    backwards = loss_of(method, take(swapped, [1]))
    tie = torch.tensor([False, True, False, False])
    weight = torch.tensor([1.0, 3.0, 0.0, 5.0])
    expected = (losses[0] + 3 * (losses[1] + backwards) / 2) / 4 + losses[3]
    assert loss_of(method, batch._replace(tie=tie, weight=weight)) == pytest.approx(expected, abs=1e-5)
    nothing = batch._replace(weight=torch.zeros(4))
    method.loss(nothing)["loss"].backward()  # type: ignore[no-untyped-call]
    assert method.adapters.grad is not None and method.adapters.grad.to_dense().abs().max() == 0


def loss_of(method: LoRADPO, batch: PreferenceBatch) -> float:
    return float(method.loss(batch)["loss"].detach())


def test_a_user_without_pairs_stays_fresh(causal_lm: Folder, tmp_path: Path) -> None:
    """In training, where decay and momentum move nobody who is absent; unseen, such a user is the population."""
    method = make(causal_lm("gpt2"), mode="per_user", weight_decay=0.5, adapt_steps=2)
    fit(method, [batch_of(method, [0, 0, 2, 2]), batch_of(method, [0, 0, 0, 0])], tmp_path)
    moved = (method.adapters - method.fresh).detach().abs().amax(1)
    assert moved[1] == 0 and moved[0] > 1e-3 and moved[2] > 1e-3
    empty = torch.zeros(2, 0, 5, dtype=torch.long)
    nothing = Tokens(empty, empty.bool(), empty.bool())
    none = torch.zeros(2, 0)
    state = method.adapt(Context(nothing, nothing, none.bool(), none))
    assert torch.equal(state.tensors["adapter"], method.population.expand(2, -1)) and state.num_pairs.tolist() == [0, 0]
    basis = make(causal_lm("gpt2"), mode="basis", num_bases=3)
    assert torch.allclose(
        basis.adapt(Context(nothing, nothing, none.bool(), none)).tensors["weights"], torch.ones(2, 3) / 3
    )


PERSONAL: dict[str, dict[str, Any]] = {
    "per_user": {"mode": "per_user"},
    "prefix": {"mode": "per_user", "adapter": "prefix", "lr": 0.1},
    "shared_and_user": {"mode": "shared_and_user"},
    "basis": {"mode": "basis", "num_bases": 2},
}


def swapped(batch: PreferenceBatch) -> PreferenceBatch:
    return batch._replace(chosen=batch.rejected, rejected=batch.chosen)


def joined(batches: list[PreferenceBatch]) -> PreferenceBatch:
    sides = [Tokens.cat([getattr(batch, side) for batch in batches]) for side in ("chosen", "rejected")]
    return PreferenceBatch(
        *sides, *(torch.cat(values) for values in zip(*(batch[2:5] for batch in batches), strict=True))
    )


@pytest.mark.parametrize("case", PERSONAL)
def test_users_who_want_the_same_gain_nothing_and_opposite_users_all(
    causal_lm: Folder, case: str, tmp_path: Path
) -> None:
    """The population is what users have in common, not what nobody has learned; a checkpoint keeps it."""
    for opposite in (False, True):
        method = make(causal_lm("gpt2"), num_users=2, **PERSONAL[case])
        pairs = [batch_of(method, [user] * 4) for user in (0, 1)]
        batch = joined([pairs[0], swapped(pairs[1]) if opposite else pairs[1]])
        fit(method, [batch], tmp_path, max_epochs=25)
        found = method.evaluate(batch)
        own, population = found["margin"], found["population_margin"]
        assert own.mean() > 0.05 and (own > 0).float().mean() >= 0.75
        assert method.seen().num_pairs.tolist() == [4, 4], "what plm users list shows"
        if opposite:
            assert (population > 0).sum() == (population < 0).sum() and population.mean().abs() < 1e-4
        else:
            torch.testing.assert_close(population, own, atol=1e-4, rtol=1e-3)
        with saved(method) as path, torch.no_grad():
            again = load_method(path)
            with pytest.warns(UserWarning, match="unknown users are treated as the population"):
                assert again.find_users is not None
                unknown = again.find_users(["nobody"] * 8)
                assert again.find_users(["0"]).num_pairs.tolist() == [4] and not unknown.num_pairs.any()
            torch.testing.assert_close(again.margin(batch, unknown), population, atol=1e-5, rtol=1e-4)


def test_a_rank_above_the_width_trains_all_the_same(causal_lm: Folder, tmp_path: Path) -> None:
    method = make(causal_lm("llama"), rank=40, alpha=40.0)
    losses = fit(method, [batch_of(method, [0, 1, 2, 0])] * 3, tmp_path)
    assert losses[-1] < losses[0]


def test_evaluation_agrees_with_margins_and_reads_adapters_by_row(causal_lm: Folder) -> None:
    """Whatever the mode, its own evaluation is what the base class would do with copies of every adapter."""
    for options in ({}, {"mode": "per_user"}, {"mode": "shared_and_user"}, {"mode": "basis", "num_bases": 2}):
        method = make(causal_lm("gpt2"), **options)
        torch.manual_seed(0)
        with torch.no_grad():
            for name in ("shared", "adapters", "bases", "weight_logits"):
                if (value := getattr(method, name, None)) is not None:
                    value.add_(0.3 * torch.randn_like(value))
        batch = batch_of(method, [0, 2, 1, 1])._replace(other_index=torch.tensor([1, 0, 2, 0]))
        found = method.evaluate(batch)
        with torch.no_grad():
            expected = super(LoRADPO, method).evaluate(batch)
        controls = {"population_margin", "other_margin"} if options else set()
        assert found.keys() == expected.keys() == {"margin"} | controls
        for name, value in found.items():
            assert torch.allclose(value, expected[name], atol=1e-5)
        shown = method.loss(batch)["rewards/margins"]
        assert found["margin"].mean().item() == pytest.approx(shown.item(), abs=1e-5)


# ---------------------------------------------------------------------- what is refused
REFUSED = {
    "beta": ({"beta": 0.0}, "model.beta: expected a number > 0, got 0.0"),
    "rank": ({"rank": 0}, "model.rank: expected at least 1, got 0"),
    "bases": ({"mode": "basis", "num_bases": 0}, "model.num_bases: expected at least 1, got 0"),
    "tokens": ({"adapter": "prefix", "num_virtual_tokens": 0}, "model.num_virtual_tokens: expected at least 1"),
    "full": ({"adapter": "full", "mode": "per_user"}, "model.mode: expected shared with model.adapter 'full', got"),
    "prefix": ({"adapter": "prefix", "mode": "basis"}, "model.mode: expected shared or per_user with model.adapter"),
    "wpo": ({"mode": "basis", "use_weighting": True}, "model.use_weighting: expected false with model.mode 'basis'"),
    "moving": ({"ref_model_sync_steps": 2}, "model.ref_model_sync_steps: expected null with model.adapter 'lora'"),
    "mixing": (
        {"adapter": "full", "ref_model_sync_steps": 0, "ref_model_mixup_alpha": 0.0},
        r"mixup_alpha: expected above 0 and at most 1, got 0.0(.|\n)*sync_steps: expected an integer >= 1, got 0",
    ),
    "mixing what stays": (
        {"adapter": "full", "ref_model_mixup_alpha": 0.5},
        "model.ref_model_mixup_alpha acts only with model.ref_model_sync_steps, .* got 0.5",
    ),
    "moving unread": (
        {"adapter": "full", "loss_type": ["sft"], "ref_model_sync_steps": 4},
        "model.ref_model_sync_steps: expected null with model.loss_type sft alone, which reads no reference, got 4",
    ),
    "steps": ({"adapt_steps": -1}, "model.adapt_steps: expected at least 0, got -1"),
    "warmup": ({"warmup": 1.0}, r"model.warmup: expected a share in \[0, 1\), got 1.0"),
    "targets": ({"target_modules": ["q_proj"]}, r"expected names of linear maps .* got \['q_proj'\]; it has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(causal_lm: Folder, case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(causal_lm("gpt2"), **options)


def test_features_are_no_language_model() -> None:
    with pytest.raises(ValueError, match=r"LoRADPO needs data.backbone to be a plm.backbones.CausalLM, got Hashing"):
        LoRADPO(num_users=2, feature_dim=16, backbone=HashingBackbone(16).spec()).configure_model()
    with pytest.raises(ValueError, match=r"LoRADPO needs a language model: set data.backbone to a CausalLM"):
        LoRADPO(num_users=2, feature_dim=16)


def test_an_endless_fit_has_no_schedule(causal_lm: Folder, tmp_path: Path) -> None:
    method = make(causal_lm("gpt2"), schedule="linear")
    with pytest.raises(ValueError, match=r"model.schedule 'linear' .* needs to know the end of the fit; set trainer"):
        fit(method, [batch_of(method, [0] * 4)], tmp_path, max_epochs=-1)


class Recurrent(torch.nn.Module):
    """A block that lets what was read before seep through, whatever the mask."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


def test_a_network_that_cannot_share_prompts_says_so(causal_lm: Folder) -> None:
    method = make(causal_lm("gpt2"))
    method.policy.network.base_model.ln_f = Recurrent()
    method.policy._head_is_whole = True
    with pytest.raises(ValueError, match=r"attention 'sdpa' cannot read both .*; set model.share_prompts to false"):
        method.loss(batch_of(method, [0] * 4))


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_pairs_longer_than_the_window_are_read_apart(causal_lm: Folder, kind: str) -> None:
    losses = []
    for share_prompts in (False, True):
        method = make(causal_lm(kind), share_prompts=share_prompts)
        assert method.policy.window is not None
        torch.manual_seed(0)
        method.shared.data += 0.1 * torch.randn_like(method.shared)
        batch = batch_of(method, [0] * 4)
        assert batch.chosen.attention_mask.sum(-1).max() > method.policy.window
        losses.append(float(method.loss(batch)["loss"].detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and abs(losses[0] - math.log(2)) > 1e-3


# ---------------------------------------------------------------------- checkpoints
@pytest.fixture
def bases(causal_lm: Folder, tmp_path: Path) -> Iterator[dict[str, Path]]:
    """One model in two places, another in a third, and the first after it was trained further."""
    here = causal_lm("gpt2")
    moved, trained = tmp_path / "moved", tmp_path / "trained"
    shutil.copytree(here, moved)
    policy = Policy(CausalLM(str(here)))
    with torch.no_grad():
        next(policy.network.parameters()).mul_(1.01)
    policy.save(trained)
    yield {"here": here, "moved": moved, "other": causal_lm("llama"), "trained": trained}


def test_adapters_load_over_their_own_base_alone(bases: dict[str, Path]) -> None:
    """Wherever it is now; and other settings of the texts make no other model."""
    method = make(bases["here"], mode="per_user")
    with torch.no_grad():
        method.adapters += 0.1

    def over(folder: Path, **options: Any) -> Callable[[dict[str, Any]], None]:
        spec = CausalLM(str(folder), **options).spec()
        return lambda checkpoint: checkpoint["hyper_parameters"].update(backbone=spec)

    batch = batch_of(method, [0, 1, 2, 0])
    for change in (over(bases["moved"]), over(bases["moved"], max_length=50, append_eos=False)):
        with saved(method, change) as path, torch.no_grad():
            assert torch.equal(load_method(path).margin(batch), method.margin(batch))
    for name in ("other", "trained"):
        with saved(method, over(bases[name])) as path:
            with pytest.raises(ValueError, match=rf"another language model .*{bases[name].name}.*; set data.backbone"):
                load_method(path)
