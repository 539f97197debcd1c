"""Methods on live backbones: the same as on cached features while nothing is trained, and trained as far as asked."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from plm.backbones import CausalLM, HFBackbone
from plm.checkpoint import load_method
from plm.cli import main
from plm.data.datamodule import PreferenceDataModule
from plm.data.sources.synthetic import SyntheticPairs
from plm.method.live import LiveMethod, distinct_texts
from plm.methods.pal import PAL, LivePAL
from plm.methods.vpl import VPL
from plm.methods.vpl.live import LiveVPL
from plm.testing import PlantedData, quiet_trainer
from plm.testing.texts import PlantedTexts, tiny_causal_lm
from plm.types import Context, PreferenceBatch, Tokens, UserState

Folder = Callable[[str], Path]
PAIRS = [("Tea?", " Yes, please.", " No."), ("Tea?", " No.", " Perhaps later."), ("Or cake", " why not", " Yes")]
OWN: dict[type[LiveMethod], dict[str, Any]] = {
    LivePAL: {"num_prototypes": 3, "projector": "mlp1-gelu-dropout0"},
    LiveVPL: {"latent_dim": 4, "hidden_dim": 8},
}


def make(cls: type[LiveMethod], lm: CausalLM, train_backbone: str = "none", **options: Any) -> Any:
    """A method on two users; of full adapters, so that they matter."""
    torch.manual_seed(0)
    given = {"num_users": 2, "feature_dim": lm.feature_dim, "backbone": lm.spec(), "rank": 2, **OWN[cls], **options}
    method = cls(train_backbone=train_backbone, **given)  # type: ignore[arg-type]
    method.configure_model()
    if method.adapter is not None:
        method.adapter.data.normal_(0, 0.1)
    return method


def batch_of(sides: tuple[Any, Any], prompt: Any = None) -> PreferenceBatch:
    count = len(PAIRS)
    return PreferenceBatch(*sides, torch.tensor([0, 1, 1]), torch.ones(count), torch.arange(count) == 2, prompt=prompt)


def token_sides(lm: CausalLM) -> tuple[Tokens, Tokens]:
    prompts = [prompt for prompt, _, _ in PAIRS]
    return tuple(lm.represent(prompts, [pair[side] for pair in PAIRS]) for side in (1, 2))  # type: ignore[return-value]


def context_of(batch: PreferenceBatch) -> Context:
    """One user with the first two pairs, one with the third."""
    mask, row = torch.tensor([[True, True], [True, False]]), torch.tensor([[0, 1], [2, 2]])

    def gathered(side: Any) -> Any:
        if isinstance(side, Tokens):
            return side.map(lambda value: value[row] * mask[..., None])
        return None if side is None else side[row] * mask[..., None]

    sides = (gathered(batch.chosen), gathered(batch.rejected))
    return Context(*sides, mask, mask.float(), gathered(batch.prompt), batch.tie[row] & mask)


# ---------------------------------------------------------------------- nothing is trained
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("cls", "options"), [(LivePAL, {}), (LivePAL, {"variant": "B", "head": "angle"}), (LiveVPL, {})], ids=str
)
def test_a_frozen_backbone_gives_the_margins_of_cached_features(
    causal_lm: Folder, kind: str, cls: type[LiveMethod], options: dict[str, Any]
) -> None:
    """Rewards, margins and adapted users are those of the method on what `HFBackbone` caches of the same texts."""
    lm = CausalLM(str(causal_lm(kind)), append_eos=False)
    cached = HFBackbone(lm.model, kind="causal_lm", pooling="last", template="response")
    method = make(cls, lm, **options).eval()
    torch.manual_seed(1)
    on_features = PAL if cls is LivePAL else VPL
    plain = on_features(2, lm.feature_dim, **{**OWN[cls], **options}, **({"users": "table"} if cls is LivePAL else {}))
    plain.load_state_dict(method.state_dict())
    for one in (method, plain.eval()):
        if options:
            one.trained_on_prompts.fill_(True)
        one.feature_scale.fill_(0.7)
    asked = [prompt for prompt, _, _ in PAIRS] if options else None
    tokens = batch_of(token_sides(lm), None if asked is None else lm.represent_prompts(asked))
    sides = tuple(cached.encode([pair[0] + pair[side] for pair in PAIRS]) for side in (1, 2))
    features = batch_of(sides, None if asked is None else cached.encode(asked))  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(method.features(tokens.chosen), features.chosen, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(method.margin(tokens), plain.margin(features), atol=1e-5, rtol=1e-5)
        users = plain.user_states(tokens.user_index)
        given = [{"prompt_features": batch.prompt} for batch in (tokens, features)]
        rewards = method.score(tokens.chosen, users, **given[0]), plain.score(features.chosen, users, **given[1])
        torch.testing.assert_close(*rewards, atol=1e-5, rtol=1e-5)
    states = method.adapt(context_of(tokens)), plain.adapt(context_of(features))
    assert states[0].num_pairs.tolist() == [2, 1]
    for name, value in states[0].tensors.items():
        torch.testing.assert_close(value, states[1].tensors[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"target_rule": "rest", "decoder": "bilinear"}])
def test_a_fit_on_a_frozen_backbone_is_the_fit_on_its_features(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feature scale, episodes, latents and what is told of them; by the response rule, equal texts must be known."""
    monkeypatch.setattr(VPL, "before_first_step", lambda method: None)  # a live method knows no Bradley-Terry model
    lm, texts = tiny_causal_lm(), PlantedTexts(4, num_unseen=2, pairs_per_user=6, num_shots=3, num_test=3)
    reader = make(LiveVPL, lm)
    cached = PlantedData(4, num_unseen=2, pairs_per_user=6, num_shots=3, num_test=3)
    for name in ("train_batch", "val_batch", "test_batch", "unseen_batch"):
        setattr(cached, name, reader.featured(getattr(texts, name)))
    found = []
    for data, cls in ((texts, LiveVPL), (cached, VPL)):
        torch.manual_seed(0)
        live: dict[str, Any] = {"backbone": lm.spec(), "train_backbone": "none"} if cls is LiveVPL else {}
        live |= {"lr": 0.03, "calibrate": False}
        method = cls(num_users=4, feature_dim=lm.feature_dim, **OWN[LiveVPL], **options, **live)
        method.configure_model()
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_trainer(tmp_path, max_epochs=8).fit(method, datamodule=data)
        method.trainer = None
        with torch.no_grad():
            found.append((method.state_dict(), method.evaluate(data.unseen_batch), method.report()))
    (live_state, live_facts, live_report), (state, facts, report) = found
    assert live_state.keys() == state.keys() and float(state["feature_scale"]) != 1
    for name, value in state.items():
        if not name.startswith("bradley_terry"):  # what a run on cached features is compared with
            torch.testing.assert_close(live_state[name], value, atol=1e-4, rtol=1e-4, msg=name)
    torch.testing.assert_close(live_facts, {name: facts[name] for name in live_facts}, atol=1e-4, rtol=1e-4)
    assert live_report == pytest.approx(report, abs=1e-4, nan_ok=True)


# ---------------------------------------------------------------------- reading
def test_equal_texts_are_one_whatever_stands_in_their_padding() -> None:
    ids = torch.tensor([[4, 5, 9], [4, 5, 7], [4, 5, 0], [0, 4, 5]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
    texts, row = distinct_texts(Tokens(ids, mask, mask))
    assert texts.num_rows == 3 and row[0] == row[1] and len(set(row.tolist())) == 3
    assert torch.equal(texts.take(row).attention_mask, mask)


def test_padding_on_either_side_changes_no_feature(causal_lm: Folder) -> None:
    for kind in ("gpt2", "llama"):
        method = make(LiveVPL, CausalLM(str(causal_lm(kind)))).eval()
        ids = torch.tensor([[40, 41, 42]])
        whole, nothing = torch.ones_like(ids).bool(), torch.zeros_like(ids).bool()
        right = Tokens(torch.cat([ids, ids], 1), torch.cat([whole, nothing], 1), torch.cat([whole, nothing], 1))
        left = right.map(lambda value: value.flip(1))._replace(input_ids=torch.cat([ids, ids], 1))
        features = [method.features(one) for one in (Tokens(ids, whole, whole), right, left)]
        for one in features[1:]:
            torch.testing.assert_close(one, features[0], atol=1e-5, rtol=1e-5)


def test_a_text_is_read_once_until_the_backbone_changes(causal_lm: Folder) -> None:
    method = make(LivePAL, CausalLM(str(causal_lm("llama"))), "lora").eval()
    read: list[int] = []
    method.policy.network.base_model.register_forward_hook(
        lambda module, args, kwargs, out: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    batch = batch_of(token_sides(method.causal_lm))
    one = method.features(batch.chosen)
    assert read == [3]
    with torch.no_grad():
        method.margin(batch)
        assert read == [3, 2]  # " No." is in both sides
        method.evaluate(batch)
        assert read == [3, 2]
        method.adapter.add_(0.1)
    assert not torch.allclose(method.features(batch.chosen), one) and read == [3, 2, 3]
    method.train()
    method.num_train_pairs = 6
    method.loss(batch)
    method.featured(batch)
    assert read == [3, 2, 3, 6, 5]  # with gradients: of PAL every token of every text, else of distinct texts


# ---------------------------------------------------------------------- the backbone is trained
@pytest.mark.parametrize("cls", [LivePAL, LiveVPL])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("train_backbone", ["none", "lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_what_is_trained_and_are_the_slopes(
    causal_lm: Folder, cls: type[LiveMethod], kind: str, train_backbone: str, checkpointing: bool
) -> None:
    """Along its own gradient the loss rises by the gradient's squared length, by finite differences."""
    rule = {"target_rule": "rest"} if cls is LiveVPL else {}  # episodes that do not hang on the features themselves
    method = make(cls, CausalLM(str(causal_lm(kind))), train_backbone, gradient_checkpointing=checkpointing, **rule)
    method.trainer, method.num_train_pairs = quiet_trainer("."), 6
    batch = batch_of(token_sides(method.causal_lm))
    batch = PreferenceBatch(  # each user has all pairs
        *(Tokens.cat([side, side]) for side in (batch.chosen, batch.rejected)),  # type: ignore[list-item]
        user_index=torch.arange(6) // 3,
        weight=torch.ones(6),
        tie=torch.zeros(6).bool(),
    )

    def loss() -> Tensor:
        torch.manual_seed(3)  # episodes and latents
        out: Tensor = method.loss(batch)["loss"]
        return out

    loss().backward()
    trained = method.backbone_parameters()
    others = [p for p in method.policy.parameters() if p.requires_grad and all(p is not one for one in trained)]
    assert not others and all(p.grad is None for p in method.policy.parameters() if not p.requires_grad)
    assert bool(trained) is (train_backbone != "none")
    if not trained:
        return
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert sum(bool(p.grad.any()) for p in trained) == len(trained)
    square = sum(float(p.grad.square().sum()) for p in trained)
    step, values = 1e-4 / square**0.5, []
    for sign in (1, -2):
        with torch.no_grad():
            for p in trained:
                p.add_(p.grad, alpha=sign * step)
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(square, rel=0.05)


def test_checkpoints_hold_what_is_trained_alone(tmp_path: Path) -> None:
    lm = tiny_causal_lm("llama")
    for cls in (LivePAL, LiveVPL):
        on_features = PAL if cls is LivePAL else VPL
        bare = on_features(2, lm.feature_dim, **OWN[cls], **({"users": "table"} if cls is LivePAL else {}))
        size = sum(value.numel() for value in bare.state_dict().values())
        for train_backbone in ("none", "lora", "full"):
            method = make(cls, lm, train_backbone)
            added = sum(value.numel() for value in method.state_dict().values()) - size
            network = method.policy.network
            expected = {"none": 0, "lora": method.policy.lora and method.policy.lora.num_parameters}
            expected["full"] = sum(value.numel() for value in network.base_model.parameters())
            tied = network.get_output_embeddings().weight.numel()  # the same tensor under a second name
            assert added == expected[train_backbone] + (tied if train_backbone == "full" else 0)


# ---------------------------------------------------------------------- what cannot work says so
def test_wrong_options_are_refused(causal_lm: Folder, tmp_path: Path) -> None:
    lm = CausalLM(str(causal_lm("gpt2")))
    with pytest.raises(ValueError, match=r"train_backbone.*\n.*model.rank.*\n.*backbone_lr"):
        make(LiveVPL, lm, "some", rank=0, backbone_lr=-1.0)
    with pytest.raises(ValueError, match="LiveVPL needs a language model"):
        LiveVPL(num_users=2, feature_dim=16)
    with pytest.raises(ValueError, match=r"needs data.backbone to be a plm.backbones.CausalLM, got HFBackbone"):
        spec = HFBackbone(lm.model).spec()
        LiveVPL(num_users=2, feature_dim=16, backbone=spec).configure_model()
    source = SyntheticPairs(num_users=6, pairs_per_user=8)
    data = PreferenceDataModule(source, CausalLM(lm.model, max_prompt_length=16), cache_dir=str(tmp_path), batch_size=1)
    for cls, options, message in (
        (LiveVPL, {}, "set data.pairs_per_user"),
        (LivePAL, {"residual": "reference"}, "residual bradley_terry"),
    ):
        method = cls(num_users=data.num_users, feature_dim=16, backbone=data.backbone_spec, **options)
        with pytest.raises(ValueError, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_trainer(tmp_path, max_epochs=1).fit(method, datamodule=data)


# ---------------------------------------------------------------------- from a recipe to new users
@pytest.mark.filterwarnings("ignore:posterior collapse|a latent without use")
@pytest.mark.parametrize("name", ["pal.live.LivePAL", "vpl.live.LiveVPL"])
def test_from_a_recipe_to_rewards_of_texts_and_new_users(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"vocab_size": 300, "width": 16, "num_layers": 1, "num_heads": 2, "max_positions": 96}
    backbone = {"model": "lm", "max_prompt_length": 48, **small}
    own = {"variant": "B", "head": "angle"} if "pal" in name else {"latent_dim": 4}
    recipe = {
        "data": {
            "source": {
                "class_path": "plm.data.sources.synthetic.SyntheticPairs",
                "init_args": {"num_users": 8, "pairs_per_user": 8},
            },
            "backbone": {"class_path": "plm.backbones.FreshCausalLM", "init_args": backbone},
            "cache_dir": "cache",
            "batch_size": 16,
            "pairs_per_user": 4,
            "prompt_features": "pal" in name,
            "shots": [0, 2],
            "repeats": 1,
        },
        "model": {"class_path": f"plm.methods.{name}", "init_args": {"train_backbone": "lora", "rank": 2, **own}},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["fit", "--config", "recipe.yaml"]) == 0
    (ckpt,) = Path("runs").rglob("best.ckpt")
    method = load_method(ckpt)
    assert isinstance(method, LiveMethod) and "policy" not in str(list(method.state_dict()))
    prompts, texts, lm = ["Tea or coffee?", "Why?"], [" Tea, please.", " Because."], method.causal_lm
    user = method.user_ids[1]
    assert method.find_users is not None
    users = method.find_users([user, user])
    asked = lm.represent_prompts(prompts)
    with torch.no_grad():
        expected = method.score(lm.represent(prompts, texts), users, prompt_features=asked)
        found = method.score(texts, user_id=user, prompts=prompts)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    pairs = [
        {"user_id": "anna", "prompt": prompts[0], "chosen": texts[0], "rejected": texts[1]},
        {"user_id": "anna", "prompt": prompts[1], "chosen": texts[0], "rejected": " No."},
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    assert main(["adapt", "--ckpt_path", str(ckpt), "--pairs", "pairs.jsonl"]) == 0
    anna = load_method(ckpt)
    assert anna.find_users is not None
    state = anna.find_users(["anna"])
    assert isinstance(anna, LiveMethod) and state.num_pairs.tolist() == [2]
    _assert_adapted(anna, state, pairs)
    capsys.readouterr()
    assert main(["query", "--ckpt_path", str(ckpt), "--user", "anna", "--pool", "pairs.jsonl", "--num_pairs", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert 0 <= json.loads(line)["chance"] <= 1 and json.loads(line)["information"] >= 0


@pytest.mark.slow
def test_processes_share_the_work_and_nothing_else_changes(tmp_path: Path) -> None:
    """One process, two of them, and two that share the weights train the same users, to rounding."""
    init = {"model": str(tmp_path / "lm"), "architecture": "llama", "vocab_size": 300, "width": 16, "num_layers": 2}
    recipe = {
        "data": {
            "source": {
                "class_path": "plm.data.sources.synthetic.SyntheticPairs",
                "init_args": {"num_users": 12, "pairs_per_user": 12},
            },
            "backbone": {
                "class_path": "plm.backbones.FreshCausalLM",
                "init_args": {**init, "num_heads": 2, "max_positions": 128, "max_prompt_length": 48},
            },
            "cache_dir": str(tmp_path / "cache"),
            "pairs_per_user": 4,
            "shots": [],
        },
        "model": {
            "class_path": "plm.methods.pal.live.LivePAL",
            "init_args": {"train_backbone": "full", "backbone_lr": 0.003, "num_prototypes": 3, "lr": 0.05},
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 3, "enable_progress_bar": False, "gradient_clip_val": 1.0},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    sharded = "lightning.pytorch.strategies.ModelParallelStrategy"
    found = []
    for devices, strategy in (
        (1, ["auto"]),
        (2, ["ddp"]),
        (2, [sharded, "--trainer.strategy.save_distributed_checkpoint", "false"]),
    ):
        folder = tmp_path / f"run{len(found)}"
        folder.mkdir()
        command = [sys.executable, "-m", "plm", "fit", "--config", "../recipe.yaml", "--trainer.devices", str(devices)]
        command += ["--data.batch_size", str(16 // devices), "--trainer.strategy", *strategy]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        (ckpt,) = folder.rglob("best.ckpt")
        found.append(torch.load(ckpt, weights_only=True)["state_dict"])
    for state in found[1:]:
        assert state.keys() == found[0].keys()
        for name, value in state.items():
            torch.testing.assert_close(value, found[0][name], atol=2e-3, rtol=2e-3, msg=lambda text, n=name: n + text)


def _assert_adapted(method: LiveMethod, state: UserState, pairs: list[dict[str, str]]) -> None:
    """Fail unless the state is what the tokens of the pairs give."""
    prompts = [pair["prompt"] for pair in pairs]
    lm = method.causal_lm

    def one_user(tokens: Tokens) -> Tokens:
        return tokens.map(lambda value: value[None])

    sides = [one_user(lm.represent(prompts, [pair[side] for pair in pairs])) for side in ("chosen", "rejected")]
    mask, asked = torch.ones(1, len(pairs)), one_user(lm.represent_prompts(prompts))
    found = method.adapt(Context(sides[0], sides[1], mask.bool(), mask, asked))
    for name, value in state.tensors.items():
        torch.testing.assert_close(found.tensors[name], value, atol=1e-5, rtol=1e-5)
