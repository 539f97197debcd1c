"""A fit that is interrupted in the middle of an epoch and resumed ends like one that was not: bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from plm.backbones import FreshCausalLM, HashingBackbone
from plm.callbacks import BestCheckpoint, PreferenceMetrics
from plm.cli import main
from plm.data.datamodule import PreferenceDataModule
from plm.data.sources.synthetic import SyntheticPairs
from plm.method import PersonalizationMethod
from plm.method.policy import PolicyMethod
from plm.methods.bradley_terry import BradleyTerry
from plm.methods.lora_dpo import LoRADPO
from plm.methods.lore import LoRe
from plm.methods.sft import SFT
from plm.testing import quiet_trainer
from plm.types import Tokens
from tests.marks import slow_but

EVERY = 3  # steps between checkpoints
LM = {"vocab_size": 300, "width": 16, "num_layers": 2, "num_heads": 2, "max_positions": 96, "max_prompt_length": 48}


class Diary(L.Callback):
    """Writes down every step: epoch, batch, loss, learning rate, tokens so far, and which texts were read."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        chosen = batch.chosen.input_ids if isinstance(batch.chosen, Tokens) else batch.chosen
        read = sorted(chosen.sum(-1).tolist())
        tokens = trainer.callback_metrics.get("train/num_tokens", torch.zeros(())).item()
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.steps.append((trainer.current_epoch, batch_idx, float(outputs["loss"]), rate, tokens, read))


class Stop(L.Callback):
    """Raises an error when so many batches have been trained on, or in the middle of the one after them."""

    def __init__(self, step: int, error: type[BaseException], within_step: bool = False) -> None:
        self.step, self.error, self.within_step = step, error, within_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.within_step and trainer.fit_loop.total_batch_idx + 1 == self.step:
            raise self.error("stop")

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: torch.Tensor) -> None:
        if self.within_step and trainer.fit_loop.total_batch_idx == self.step:
            raise self.error("stop")


class Die(L.Callback):
    """Kills its process after a step, as a machine that is lost does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def data_in(folder: Path, pairs_per_user: int | None) -> PreferenceDataModule:
    """Six users with seven training pairs each: seven batches by pair in an epoch."""
    return PreferenceDataModule(
        SyntheticPairs(num_users=6, pairs_per_user=12),
        FreshCausalLM(str(folder / "model"), **LM),  # type: ignore[arg-type]
        cache_dir=str(folder / "cache"),
        unseen_users=0.0,
        batch_size=6,
        pairs_per_user=pairs_per_user,
        shots=[],
    )


def fit(
    make: Callable[[PreferenceDataModule], PersonalizationMethod],
    data: PreferenceDataModule,
    folder: Path,
    *callbacks: L.Callback,
    ckpt_path: Path | None = None,
    accumulate: int = 1,
    **limits: Any,
) -> tuple[PersonalizationMethod, list[tuple[Any, ...]], dict[str, Any]]:
    """The method, its diary, and the optimizer's state of a fit of two epochs."""
    torch.manual_seed(0)
    data.prepare_data()
    method, diary = make(data), Diary()
    kept = ModelCheckpoint(
        folder,
        "{step}",
        every_n_train_steps=EVERY,
        save_top_k=-1,
        save_on_exception=True,
        save_on_train_epoch_end=False,
    )
    trainer = quiet_trainer(
        folder,
        max_epochs=2,
        callbacks=[diary, kept, *callbacks],
        enable_checkpointing=True,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        accumulate_grad_batches=accumulate,
        **limits,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*dataloader is not resumable.*")
        trainer.fit(method, data, ckpt_path=ckpt_path, weights_only=True)
    return method, diary.steps, trainer.optimizers[0].state_dict()


def lora_dpo(data: PreferenceDataModule, **options: Any) -> LoRADPO:
    return LoRADPO(
        num_users=data.num_users,
        feature_dim=data.feature_dim,
        backbone=data.backbone_spec,
        rank=2,
        alpha=4,
        lr=1e-2,
        **options,
    )


METHODS: dict[str, tuple[Callable[[PreferenceDataModule], PolicyMethod], int | None]] = {
    "sft": (
        lambda data: SFT(num_users=data.num_users, feature_dim=data.feature_dim, backbone=data.backbone_spec, lr=1e-2),
        None,
    ),
    "shared": (lora_dpo, None),
    "per_user": (lambda data: lora_dpo(data, mode="per_user"), 2),
    "shared_and_user": (lambda data: lora_dpo(data, mode="shared_and_user"), 2),
    "basis": (lambda data: lora_dpo(data, mode="basis", num_bases=2), None),
    "moving": (lambda data: lora_dpo(data, adapter="full", ref_model_sync_steps=4), None),
}


def assert_equal(one: Any, two: Any) -> None:
    """Two nested states are the same to the last bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


@pytest.mark.parametrize("name", slow_but(METHODS, "sft", "shared_and_user", "basis"))
def test_a_fit_stopped_within_an_epoch_ends_as_if_it_had_not_been(name: str, folder: Path, tmp_path: Path) -> None:
    make, pairs_per_user = METHODS[name]
    data = data_in(folder, pairs_per_user)
    method, steps, optimizer = fit(make, data, tmp_path / "whole")
    assert {epoch for epoch, *_ in steps} == {0, 1} and len(steps) == 14
    stopped = tmp_path / "stopped"
    with pytest.raises(RuntimeError, match="stop"):
        fit(make, data_in(folder, pairs_per_user), stopped, Stop(10, RuntimeError))  # in the second epoch of seven
    resumed, rest, its_optimizer = fit(
        make, data_in(folder, pairs_per_user), tmp_path / "resumed", ckpt_path=stopped / "step=9.ckpt"
    )
    assert rest == steps[9:], "the batches, losses, learning rates and counts that are left"
    assert_equal(dict(resumed.state_dict()), dict(method.state_dict()))
    assert_equal(its_optimizer, optimizer)


@pytest.mark.parametrize("within_step", [True, False], ids=["within a step", "after a step"])
def test_a_checkpoint_of_the_moment_of_an_error_neither_repeats_nor_skips(
    within_step: bool, folder: Path, tmp_path: Path
) -> None:
    done = 10
    make, _ = METHODS["shared"]
    method, steps, _ = fit(make, data_in(folder, None), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stop"):
        fit(make, data_in(folder, None), tmp_path / "stopped", Stop(done, RuntimeError, within_step))
    saved = tmp_path / "stopped" / f"step={done}.ckpt"
    resumed, rest, _ = fit(make, data_in(folder, None), tmp_path / "resumed", ckpt_path=saved)
    for again, once in zip(rest, steps[done:], strict=True):  # of a failed step, the tokens have been read nonetheless
        assert (*again[:4], again[5]) == (*once[:4], once[5]) and (again[4] > once[4]) is within_step
    assert_equal(dict(resumed.state_dict()), dict(method.state_dict()))


def test_accumulated_steps_go_on_as_well(folder: Path, tmp_path: Path) -> None:
    """Seven batches are four steps of two batches, the last of one; step 6 is two steps into the second epoch."""
    make, _ = METHODS["shared"]
    method, steps, _ = fit(make, data_in(folder, None), tmp_path / "whole", accumulate=2)
    again, rest, _ = fit(
        make, data_in(folder, None), tmp_path / "again", ckpt_path=tmp_path / "whole" / "step=6.ckpt", accumulate=2
    )
    assert rest == steps[11:]
    assert_equal(dict(again.state_dict()), dict(method.state_dict()))


def test_a_fit_stopped_after_an_epoch_goes_on_with_the_next(folder: Path, tmp_path: Path) -> None:
    make, _ = METHODS["shared"]
    after = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    judged = ModelCheckpoint(tmp_path, "judged-{epoch}", mode="max", save_top_k=-1, save_on_train_epoch_end=False)
    method, steps, _ = fit(make, data_in(folder, None), tmp_path / "whole", after, judged)
    for saved in ("epoch=0.ckpt", "judged-epoch=0.ckpt"):
        again, rest, _ = fit(make, data_in(folder, None), tmp_path / saved[:-5], ckpt_path=tmp_path / saved)
        assert rest == steps[7:], saved
        assert_equal(dict(again.state_dict()), dict(method.state_dict()))


@pytest.mark.parametrize("kind", slow_but([BradleyTerry, LoRe], BradleyTerry))
def test_on_features_a_fit_stopped_within_an_epoch_goes_on_as_well(
    kind: type[PersonalizationMethod], tmp_path: Path
) -> None:
    """Batches of whole users, in another order every epoch: step 9 is two batches into the second epoch of seven."""

    def data() -> PreferenceDataModule:
        source = SyntheticPairs(num_users=7, pairs_per_user=12)
        return PreferenceDataModule(
            source, HashingBackbone(dim=16), str(tmp_path / "cache"), unseen_users=0.0, batch_size=6, shots=[]
        )

    def make(data: PreferenceDataModule) -> PersonalizationMethod:
        return kind(data.num_users, data.feature_dim, lr=1e-2)

    method, steps, optimizer = fit(make, data(), tmp_path / "whole")
    assert len(steps) == 14 and steps[7][-1] != steps[0][-1]
    again, rest, its_optimizer = fit(make, data(), tmp_path / "again", ckpt_path=tmp_path / "whole" / "step=9.ckpt")
    assert rest == steps[9:]
    assert_equal(dict(again.state_dict()), dict(method.state_dict()))
    assert_equal(its_optimizer, optimizer)


@pytest.mark.parametrize(
    ("done", "limit"),
    [(3, {"max_steps": 3}), (1, {"max_time": timedelta(microseconds=1)})],
    ids=["steps", "time"],
)
def test_a_fit_goes_on_where_its_budget_ended(folder: Path, tmp_path: Path, done: int, limit: dict[str, Any]) -> None:
    def make(data: PreferenceDataModule) -> SFT:
        options = {"lr": 1e-2, "warmup": 0.0, "schedule": "constant"}
        return SFT(num_users=data.num_users, feature_dim=data.feature_dim, backbone=data.backbone_spec, **options)

    def best(name: str) -> list[L.Callback]:
        where = {"dirpath": tmp_path / name, "filename": "best", "monitor": "val/seen/log_loss"}
        return [PreferenceMetrics(10), BestCheckpoint(**where, save_on_train_epoch_end=False)]

    method, steps, _ = fit(make, data_in(folder, None), tmp_path / "whole", *best("whole"))
    _, first, _ = fit(make, data_in(folder, None), tmp_path / "first", *best("first"), **limit)
    assert first == steps[:done]
    for name in ("best.ckpt", "last.ckpt"):
        again, rest, _ = fit(
            make, data_in(folder, None), tmp_path / "rest", *best("rest"), ckpt_path=tmp_path / "first" / name
        )
        assert first + rest == steps, name
        assert_equal(dict(again.state_dict()), dict(method.state_dict()))


def test_what_was_best_before_is_remembered_in_another_folder(tmp_path: Path) -> None:
    before = BestCheckpoint(dirpath=tmp_path / "one", monitor="loss", filename="best")
    before.best_model_score = before.kth_value = torch.tensor(0.5)
    before.best_model_path = before.kth_best_model_path = str(tmp_path / "one" / "best.ckpt")
    before.best_k_models = {before.best_model_path: torch.tensor(0.5)}
    after = BestCheckpoint(dirpath=tmp_path / "two", monitor="loss", filename="best")
    after.load_state_dict(before.state_dict())
    assert after.dirpath == str(tmp_path / "two")
    assert after.best_model_score == 0.5 and after.best_model_path == before.best_model_path
    assert not after.check_monitor_top_k(quiet_trainer(tmp_path), torch.tensor(0.6))
    assert after.check_monitor_top_k(quiet_trainer(tmp_path), torch.tensor(0.4))


# ---------------------------------------------------------------------- from the command line
def write_recipe(folder: Path, name: str, *callbacks: dict[str, Any]) -> str:
    recipe = {
        "defaults": [{"trainer": "tokens"}, {"logger": "csv"}],
        "data": {
            "source": {"class_path": "SyntheticPairs", "init_args": {"num_users": 6, "pairs_per_user": 12}},
            "backbone": {"class_path": "FreshCausalLM", "init_args": {"model": str(folder / "model"), **LM}},
            "cache_dir": str(folder / "cache"),
            "unseen_users": 0.0,
            "batch_size": 6,
            "pairs_per_user": 2,
            "shots": [],
        },
        "model": {
            "class_path": "plm.methods.lora_dpo.LoRADPO",
            "init_args": {"mode": "per_user", "rank": 2, "alpha": 4, "lr": 0.01},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 3,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"filename": "last", "every_n_train_steps": EVERY, "enable_version_counter": False},
                },
                *callbacks,
            ],
        },
    }
    path = folder / name
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.mark.slow
def test_a_killed_command_is_resumed_by_ckpt_path(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dying = write_recipe(folder, "dying.yaml", {"class_path": f"{__name__}.Die", "init_args": {"step": 11}})
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "plm", "fit", "--config", dying, "--name", "dying"]
    killed = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = tmp_path / "runs/dying/checkpoints/last.ckpt"
    recipe = write_recipe(folder, "recipe.yaml")
    assert main(["fit", "--config", recipe, "--ckpt_path", str(last), "--name", "resumed"]) == 0
    assert main(["fit", "--config", recipe, "--name", "whole"]) == 0  # in one go
    assert "Traceback" not in capfd.readouterr().err
    resumed, whole = (tmp_path / "runs" / name for name in ("resumed", "whole"))
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (resumed, whole))
    assert one["seen"] == pytest.approx(two["seen"], nan_ok=True, abs=0)
    saved = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (resumed, whole)]
    assert saved[0]["global_step"] == saved[1]["global_step"] == 21  # the last of every third
    for key in ("state_dict", "optimizer_states", "plm"):
        assert_equal(*(one[key][0] if isinstance(one[key], list) else one[key] for one in saved))


def test_a_command_that_ends_within_an_epoch_is_validated_and_tested(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(folder, "budget.yaml")
    assert main(["fit", "--config", recipe, "--trainer.max_steps", "2", "--trainer.callbacks", "[]"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "metrics.json").read_text())["seen"]["accuracy"] >= 0
    Path("texts.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    for path in (str(run / "checkpoints" / name) for name in ("best.ckpt", "last.ckpt")):
        assert torch.load(path, weights_only=True)["global_step"] == 2
        assert main(["score", "--ckpt_path", path, "--responses", "texts.jsonl", "--output", f"{path}.csv"]) == 0
