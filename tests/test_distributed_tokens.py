"""Language models trained by two processes (DDP, FSDP2; gloo) end as those trained by one with the same batches."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from plm.backbones import CausalLM, FreshCausalLM, Policy
from plm.callbacks import PreferenceMetrics, SaveUserStates
from plm.checkpoint import load_method
from plm.data.datamodule import PreferenceDataModule
from plm.data.schema import PairTable
from plm.data.sources.synthetic import SyntheticPairs
from plm.method.policy import PolicyMethod
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.lora_dpo import LoRADPO
from plm.methods.sft import SFT
from plm.testing import quiet_trainer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")
LM = {"vocab_size": 300, "width": 16, "num_layers": 2, "num_heads": 2, "max_positions": 96, "max_prompt_length": 48}
TEXTS = ["Sure. First, relax.", "No."]
BATCH = 8  # pairs of all processes


class Report(NamedTuple):
    """What a fit leaves behind."""

    losses: list[float]
    """Mean over the processes at every step, as logged."""
    numbers: dict[str, float]
    """Of the test of the best checkpoint."""
    best: str
    """Its path."""


class Losses(L.Callback):
    """Remembers what is logged, and checks it against the mean of what the processes train on."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(trainer.callback_metrics["train/loss"].item())
        mean = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        if trainer.accumulate_grad_batches == 1:  # else batches weigh by their pairs or tokens
            assert mean.item() == pytest.approx(self.values[-1], rel=1e-6)


@cache
def _folder() -> Path:
    """Of the language model; lives as long as the process."""
    holder = tempfile.TemporaryDirectory()
    _HELD.append(holder)
    return Path(holder.name)


_HELD: list[Any] = []


class Everyone(SyntheticPairs):
    """The pairs of one user, as of a corpus of running text."""

    def load(self) -> PairTable:
        table = super().load()
        return replace(table, user_ids=["everyone"], user=np.zeros_like(table.user))


def data_for(world_size: int, pairs_per_user: int | None, name: str = "") -> PreferenceDataModule:
    source = Everyone if name == "sft_everyone" else SyntheticPairs
    return PreferenceDataModule(
        source(num_users=8, pairs_per_user=12),
        FreshCausalLM(str(_folder() / "model"), **LM),  # type: ignore[arg-type]
        cache_dir=str(_folder() / "cache"),
        unseen_users=0.0 if source is Everyone else 0.3,
        batch_size=BATCH // world_size,
        pairs_per_user=pairs_per_user,
        shots=[],
    )


def lora_dpo(data: PreferenceDataModule, **options: Any) -> LoRADPO:
    return LoRADPO(
        num_users=data.num_users,
        feature_dim=data.feature_dim,
        backbone=data.backbone_spec,
        rank=2,
        alpha=4,
        lr=1e-2,
        adapt_steps=2,
        **options,
    )


def sft(data: PreferenceDataModule, save_to: str | None = None) -> SFT:
    return SFT(
        num_users=data.num_users, feature_dim=data.feature_dim, backbone=data.backbone_spec, lr=1e-2, save_to=save_to
    )


METHODS: dict[str, tuple[Callable[[PreferenceDataModule], PolicyMethod], int | None]] = {
    "sft": (sft, None),
    "sft_everyone": (sft, None),
    "sft_saved": (lambda data: sft(data, str(_folder() / "saved")), None),
    "shared": (lora_dpo, None),
    "full": (lambda data: lora_dpo(data, adapter="full"), None),
    "moving": (lambda data: lora_dpo(data, adapter="full", ref_model_sync_steps=2), None),
    "per_user": (lambda data: lora_dpo(data, mode="per_user"), 2),
    "per_user_by_pair": (lambda data: lora_dpo(data, mode="per_user"), None),
    "shared_and_user": (lambda data: lora_dpo(data, mode="shared_and_user"), 2),
    "basis": (lambda data: lora_dpo(data, mode="basis", num_bases=2), 2),
}


def strategy_of(name: str) -> tuple[Any, int]:
    return {
        "one": ("auto", 1),
        "ddp": ("ddp", 2),
        "fsdp2": (ModelParallelStrategy(save_distributed_checkpoint=False), 2),
    }[name]


def _fit(name: str, strategy: str, folder: Path, options: dict[str, Any]) -> None:
    """Train and test, and leave the report on disk."""
    plan, world_size = strategy_of(strategy)
    make, pairs_per_user = METHODS[name]
    torch.manual_seed(0)
    data, losses = data_for(world_size, pairs_per_user, name), Losses()
    best = ModelCheckpoint(folder, "best", monitor="val/seen/log_loss")
    steps = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = quiet_trainer(
        folder,
        max_epochs=1,
        devices=world_size,
        strategy=plan,
        callbacks=[PreferenceMetrics(10), losses, best, steps, SaveUserStates()],
        enable_checkpointing=True,
        gradient_clip_val=0.05,  # a norm that most gradients exceed
        num_sanity_val_steps=0,
        **{key: value for key, value in options.items() if key != "ckpt_path"},
    )
    method = make(data)
    trainer.fit(method, data, ckpt_path=options.get("ckpt_path"), weights_only=True)
    found = trainer.test(method, data, ckpt_path=best.best_model_path, weights_only=True, verbose=False)
    if trainer.is_global_zero:
        numbers = {key: value for part in found for key, value in part.items()}
        torch.save(Report(losses.values, numbers, best.best_model_path)._asdict(), folder / "report.pt")


def _process(rank: int, port: int, name: str, strategy: str, folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    # as on a GPU: many parameters in one call
    vars(sys.modules["torch.optim.adam"])["_default_to_fused_or_foreach"] = lambda *_, **__: (False, True)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        warnings.simplefilter("ignore")
        _fit(name, strategy, folder, options)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def fit(name: str, strategy: str, **options: Any) -> Report:
    """A fit in processes of its own: they are forked, since what they import takes longer than the fit."""
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    data_for(1, None).prepare_data()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_process, args=(rank, port, name, strategy, folder, options))
        for rank in range(strategy_of(strategy)[1])
    ]
    for process in ranks:
        process.start()
    end = time.monotonic() + 300
    while any(process.is_alive() for process in ranks) and time.monotonic() < end:
        if any(process.exitcode for process in ranks):  # the other waits for it forever
            break
        time.sleep(0.05)
    for process in ranks:
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [0] * len(ranks)
    return Report(**torch.load(folder / "report.pt", weights_only=True))


@cache
def in_one_process(name: str) -> Report:
    return fit(name, "one")


def assert_equivalent(two: Report, one: Report, numbers: float = 1e-4) -> None:
    """The same losses, test metrics, and scores of what is loaded."""
    assert two.losses == pytest.approx(one.losses, abs=1e-4)
    assert two.numbers == pytest.approx(one.numbers, abs=numbers, nan_ok=True)
    methods = [load_method(report.best) for report in (two, one)]
    assert methods[0].user_ids == methods[1].user_ids
    for user_id in methods[0].user_ids[:2]:
        scores = [method.score(TEXTS, user_id=user_id, prompts="How do I sleep?") for method in methods]
        torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
        assert scores[0].abs().sum() > 0


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("per_user", "ddp"),
        ("sft", "fsdp2"),
        pytest.param("shared", "ddp", marks=SLOW),
        pytest.param("shared", "fsdp2", marks=SLOW),
        pytest.param("sft_everyone", "ddp", marks=SLOW),
        pytest.param("sft_everyone", "fsdp2", marks=SLOW),
        pytest.param("sft", "ddp", marks=SLOW),
        pytest.param("full", "ddp", marks=SLOW),
        pytest.param("basis", "ddp", marks=SLOW),
        pytest.param("shared_and_user", "ddp", marks=SLOW),
        pytest.param("per_user_by_pair", "ddp", marks=SLOW),
        pytest.param("full", "fsdp2", marks=SLOW),
        pytest.param("moving", "fsdp2", marks=SLOW),
        pytest.param("basis", "fsdp2", marks=SLOW),
        pytest.param("per_user", "fsdp2", marks=SLOW),
        pytest.param("shared_and_user", "fsdp2", marks=SLOW),
    ],
)
def test_two_processes_end_as_one(name: str, strategy: str) -> None:
    # who is unseen has an adapter of few Adam steps from zero: rounding errors of what is shared come out larger there
    assert_equivalent(fit(name, strategy), in_one_process(name), 2e-3 if name == "shared_and_user" else 1e-4)


@SLOW
@pytest.mark.parametrize(
    ("name", "strategy"),
    [("sft", "ddp"), ("sft", "fsdp2"), ("shared", "ddp"), ("shared", "fsdp2"), ("basis", "ddp")],
)
def test_accumulated_gradients(name: str, strategy: str) -> None:
    options = {"accumulate_grad_batches": 2}
    assert_equivalent(fit(name, strategy, **options), fit(name, "one", **options))


@SLOW
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["sft", "moving", "per_user"])
def test_a_fit_goes_on_with_another_number_of_processes(name: str, strategy: str) -> None:
    """From a checkpoint within an epoch: one process goes on where two were, and the other way round."""
    one, two = in_one_process(name), fit(name, strategy)
    for first, then in ((one, strategy), (two, "one"), (two, strategy)):
        rest = fit(name, then, ckpt_path=str(Path(first.best).parent / "step=3.ckpt"))
        assert rest.losses == pytest.approx(one.losses[3:], abs=1e-4)


@SLOW
@pytest.mark.parametrize("strategy", ["one", "ddp", "fsdp2"])
def test_the_best_model_is_written(strategy: str) -> None:
    report = fit("sft_saved", strategy)
    folder = _folder() / "saved"
    expected, found = load_method(report.best), Policy(CausalLM(str(folder)))
    weights = found.network.state_dict()
    assert isinstance(expected, SFT)
    for key, value in expected.policy.network.state_dict().items():
        assert torch.equal(weights[key], value), key
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


# ---------------------------------------------------------------------- from the command line
def write_recipe(folder: Path, *groups: str) -> str:
    recipe = {
        "defaults": [*({"trainer": group} for group in groups), {"logger": "csv"}],
        "data": {
            "source": {"class_path": "SyntheticPairs", "init_args": {"num_users": 8, "pairs_per_user": 12}},
            "backbone": {"class_path": "FreshCausalLM", "init_args": {"model": str(_folder() / "model"), **LM}},
            "cache_dir": str(_folder() / "cache"),
            "batch_size": BATCH // 2,
            "shots": [],
        },
        "model": {"class_path": "plm.methods.lora_dpo.LoRADPO", "init_args": {"rank": 2, "lr": 0.01}},
        "trainer": {"accelerator": "cpu", "devices": 2, "max_epochs": 2, "enable_progress_bar": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@SLOW
@pytest.mark.parametrize("group", ["ddp", "fsdp2"])
def test_trainer_groups_of_several_devices(group: str, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    recipe = write_recipe(tmp_path, "tokens", group)
    command = [sys.executable, "-m", "plm", "fit", "--config", recipe, "--name", "fitted", "--show_lightning=true"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr and "Warning" not in done.stderr
    run = tmp_path / "runs/fitted"
    assert (run / "checkpoints" / "best.users.db").is_file()
    best = str(run / "checkpoints" / "best.ckpt")
    command = [sys.executable, "-m", "plm", "test", "--config", recipe, "--ckpt_path", best, "--name", "tested"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    fitted, tested = (
        json.loads((tmp_path / "runs" / name / "metrics.json").read_text()) for name in ("fitted", "tested")
    )
    assert tested["seen"] == pytest.approx(fitted["seen"], nan_ok=True)


# ---------------------------------------------------------------------- what does not go together
class Idle(ModelParallelStrategy):
    """A strategy that has started no process."""

    def setup_environment(self) -> None:
        self.set_world_ranks()


def refusal(method: L.LightningModule, data: PreferenceDataModule, folder: Path, **options: Any) -> str:
    trainer = quiet_trainer(folder, max_epochs=1, **options)
    with pytest.raises(ValueError, match=r"trainer\.") as caught:
        trainer.fit(method, data)
    return str(caught.value)


def test_strategies_that_do_not_fit_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_for(1, None)
    data.prepare_data()
    shared = lora_dpo(data)
    assert "save_distributed_checkpoint: expected false, got true" in refusal(shared, data, tmp_path, strategy=Idle())
    for precision in ("16-true", "bf16-true", "64-true"):
        message = refusal(shared, data, tmp_path, precision=precision)
        assert f"expected 32-true, bf16-mixed or 16-mixed, got '{precision}'" in message
    features = BradleyTerry(num_users=2, feature_dim=4)
    monkeypatch.setattr(BradleyTerry, "device_mesh", "a mesh")
    assert "BradleyTerry trains no language model that could be shared out; take ddp" in refusal(
        features, data, tmp_path
    )


def test_deepspeed_is_refused() -> None:
    strategy = object.__new__(DeepSpeedStrategy)  # not installed
    data = data_for(1, None)
    data.prepare_data()
    for method in (lora_dpo(data), BradleyTerry(num_users=2, feature_dim=4)):
        method.trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"expected ddp or .* got DeepSpeed, whose checkpoints are folders"):
            method.setup("fit")


def test_weights_in_half_precision_that_a_cpu_or_trainer_cannot_use_are_refused(tmp_path: Path) -> None:
    data = data_for(1, None)
    data.prepare_data()
    spec = data.backbone_spec
    half = {**spec, "init_args": {**spec["init_args"], "dtype": "float16"}}
    method = LoRADPO(num_users=data.num_users, feature_dim=data.feature_dim, backbone=half)
    for precision in ("32-true", "bf16-mixed"):
        message = refusal(method, data, tmp_path, precision=precision)
        assert f"expected float32 or bfloat16 with trainer.precision '{precision}' on cpu, got 'float16'" in message
