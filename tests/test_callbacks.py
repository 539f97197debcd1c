"""The callbacks in real Trainer runs of a tiny method on planted users."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader

from plm.callbacks import VALIDATION_KEYS, FewShotCurve, PreferenceMetrics, SaveUserStates, run_dir
from plm.method import PersonalizationMethod
from plm.types import Context, PreferenceBatch, UserState
from plm.users import UserStore, shared_hash, store_path

SEEN, UNSEEN, DIM, PAIRS, SHOTS, REPEATS = 12, 10, 6, 16, [0, 2, 8], 2


class TinyMethod(PersonalizationMethod):
    """Reward = (shared + own direction) . features; unseen users get their mean difference as their own direction."""

    view = "features"
    user_tables = ("own",)

    def __init__(self, num_users: int = SEEN, feature_dim: int = DIM, lr: float = 0.1) -> None:
        super().__init__(num_users, feature_dim, None, lr)
        self.shared = torch.nn.Parameter(torch.zeros(feature_dim))
        self.own = torch.nn.Parameter(torch.zeros(num_users, feature_dim))

    def loss(self, batch: PreferenceBatch) -> dict[str, torch.Tensor]:
        return {"loss": -torch.nn.functional.logsigmoid(self.margin(batch)).mean()}

    def _score(self, responses: torch.Tensor, users: UserState) -> torch.Tensor:
        return (responses * (self.shared + users.tensors["own"])).sum(-1)

    def _adapt(self, context: Context) -> UserState:
        num_pairs = context.mask.sum(1)
        mean = ((context.chosen - context.rejected) * context.mask[..., None]).sum(1) / num_pairs.clamp(min=1)[:, None]
        return UserState({"own": mean}, num_pairs)

    def report(self) -> dict[str, float]:
        return {"length": float(self.shared.norm()), "unknown": math.nan}

    def user_states(self, user_index: torch.Tensor) -> UserState:
        return UserState({"own": self.own[user_index]}, torch.full_like(user_index, PAIRS))

    def population_state(self, num_users: int) -> UserState:
        return UserState({"own": self.shared.new_zeros(num_users, DIM)}, torch.zeros(num_users, dtype=torch.long))


class Planted(L.LightningDataModule):
    """Users with directions of their own; evaluation batches hold three whole users and are dealt out to ranks."""

    view = "features"
    reference_head = None
    split_hash = "0123abcd"
    shots = SHOTS
    repeats = REPEATS

    def __init__(self, with_few_shot: bool = True) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.all_user_ids = [f"user-{row}" for row in range(SEEN + UNSEEN)]
        self.user_ids = self.all_user_ids[:SEEN]
        self.with_few_shot = with_few_shot
        direction = torch.randn(SEEN + UNSEEN, 1, DIM, generator=rng)
        a, b = torch.randn(2, SEEN + UNSEEN, 3 * PAIRS, DIM, generator=rng)
        first = (((a - b) * direction).sum(-1) > 0)[..., None]
        self.chosen, self.rejected = torch.where(first, a, b), torch.where(first, b, a)

    def eval_names(self, stage: str) -> list[str]:
        return ["seen"] if stage == "validate" else ["seen", "unseen", "few_shot"][: 3 if self.with_few_shot else 2]

    def pairs(self, rows: torch.Tensor, part: int, **fields: Any) -> PreferenceBatch:
        inside = slice(part * PAIRS, (part + 1) * PAIRS)
        user_row = rows.repeat_interleave(PAIRS)
        fields = {"user_index": torch.where(user_row < SEEN, user_row, -1)} | fields
        tie = torch.arange(len(user_row)) % PAIRS == 0
        chosen, rejected = (x[rows, inside].reshape(-1, DIM) for x in (self.chosen, self.rejected))
        return PreferenceBatch(chosen, rejected, weight=torch.ones(len(user_row)), tie=tie, user_row=user_row, **fields)

    def unseen(self, rows: torch.Tensor, shots: int | None, repeat: int) -> PreferenceBatch:
        kept = PAIRS if shots is None else shots
        context_row = torch.arange(len(rows)).repeat_interleave(PAIRS)
        inside = slice(repeat, repeat + kept)
        context = Context(
            self.chosen[rows, inside],
            self.rejected[rows, inside],
            torch.ones(len(rows), kept, dtype=torch.bool),
            torch.ones(len(rows), kept),
        )
        if shots is None:
            other_row = (context_row + 1) % len(rows)
            return self.pairs(rows, 2, context=context, context_row=context_row, other_row=other_row)
        numbers = {"num_shots": torch.full_like(context_row, shots), "repeat": torch.full_like(context_row, repeat)}
        return self.pairs(rows, 2, context=context, context_row=context_row, **numbers)

    def loader(self, batches: list[PreferenceBatch]) -> DataLoader[PreferenceBatch]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(batches[rank::world], batch_size=None)

    def train_dataloader(self) -> DataLoader[PreferenceBatch]:
        return self.loader([self.pairs(torch.arange(SEEN), 0)] * 4)

    def val_dataloader(self) -> list[DataLoader[PreferenceBatch]]:
        return [self.loader([self.pairs(rows, 1) for rows in torch.arange(SEEN).split(5)])]

    def test_dataloader(self) -> list[DataLoader[PreferenceBatch]]:
        unseen = torch.arange(SEEN, SEEN + UNSEEN).split(3)
        seen = [
            self.pairs(r, 2, other_index=((r + 1) % SEEN).repeat_interleave(PAIRS)) for r in torch.arange(SEEN).split(3)
        ]
        curve = [self.unseen(rows, k, repeat) for k in SHOTS for repeat in range(REPEATS) for rows in unseen]
        loaders = [self.loader(seen), self.loader([self.unseen(rows, None, 0) for rows in unseen]), self.loader(curve)]
        return loaders[: len(self.eval_names("test"))]


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults = {"logger": CSVLogger(folder), "enable_checkpointing": False, "max_epochs": 3, "log_every_n_steps": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{"default_root_dir": folder, **defaults, **quiet, **options}, callbacks=list(callbacks))


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> tuple[L.Trainer, dict[str, float]]:
    """A fit followed by a test of the best checkpoint, as ``plm fit`` does."""
    best = ModelCheckpoint(monitor="val/seen/log_loss", filename="{epoch}-{val/seen/log_loss:.3f}")
    stop = EarlyStopping(monitor="val/seen/log_loss", patience=50, min_delta=1e9)
    callbacks = (FewShotCurve(300), PreferenceMetrics(300, seed=1), SaveUserStates(), best, stop)
    run = trainer(tmp_path_factory.mktemp("run"), *callbacks, enable_checkpointing=True, max_epochs=8)
    method, data = TinyMethod(), Planted()
    run.fit(method, data)
    return run, dict(run.test(method, data, ckpt_path="best", verbose=False)[0])


def metrics_json(run: L.Trainer) -> dict[str, Any]:
    return json.loads((run_dir(run) / "metrics.json").read_text())


# ---------------------------------------------------------------------- validation
def test_validation_logs_only_what_training_watches(tmp_path: Path):
    run = trainer(tmp_path, PreferenceMetrics())
    logged = run.validate(TinyMethod(), Planted(), verbose=False)[0]
    assert set(logged) == {f"val/seen/{key}" for key in VALIDATION_KEYS} | {"val/method/length"}
    assert logged["val/seen/log_loss"] == pytest.approx(math.log(2))  # nothing learned: every margin is zero
    assert logged["val/seen/accuracy"] == 0.5
    assert not (run_dir(run) / "metrics.json").exists()


def test_early_stopping_and_checkpoints_read_the_value_of_the_same_epoch(tmp_path: Path):
    seen: list[float] = []

    class Recorder(ModelCheckpoint):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(trainer.callback_metrics["val/seen/log_loss"].item())
            super().on_validation_end(trainer, pl_module)

    stop = EarlyStopping(monitor="val/seen/log_loss", patience=1, min_delta=10.0)
    best = Recorder(monitor="val/seen/log_loss")
    # listed before PreferenceMetrics on purpose: the order of the list must not matter
    run = trainer(tmp_path, stop, best, PreferenceMetrics(), enable_checkpointing=True, num_sanity_val_steps=1)
    run.fit(TinyMethod(), Planted())
    assert run.current_epoch == 2  # nothing improves by ten nats: stopped after the second epoch
    assert seen[-2] > seen[-1] == pytest.approx(best.best_model_score.item())


# ---------------------------------------------------------------------- test
def test_a_test_logs_every_number(tested: tuple[L.Trainer, dict[str, float]]):
    logged = tested[1]
    intervals = {"accuracy", "accuracy_micro", "log_loss", "global_accuracy", "personal_minus_global"}
    intervals |= {"other_accuracy", "personal_minus_other", "personal_minus_bradley_terry"}
    plain = {"accuracy_p10", "accuracy_p50", "accuracy_p90", "ece", "global_log_loss", "users_helped", "users_harmed"}
    plain |= {"users_served_population"}
    plain |= {"num_users", "num_pairs", "ties", "labelled_ties", "bradley_terry_accuracy", "bradley_terry_log_loss"}
    plain |= {f"personal_minus_{control}_mde" for control in ("global", "other", "bradley_terry")}
    names = intervals | plain | {f"{name}_{end}" for name in intervals for end in ("low", "high")}
    expected = {f"test/{users}/{name}" for users in ("seen", "unseen") for name in names}
    expected |= {"test/unseen/flip_reversed"}
    expected |= {f"test/few_shot/accuracy@{shots}" for shots in SHOTS}
    assert set(logged) == expected | {"test/method/length"}  # what is not known is not logged
    assert logged["test/seen/num_users"] == SEEN
    assert logged["test/unseen/num_pairs"] == UNSEEN * (PAIRS - 1)
    assert logged["test/unseen/labelled_ties"] == UNSEEN
    assert logged["test/unseen/personal_minus_global_low"] > 0  # planted: users differ
    assert logged["test/unseen/personal_minus_other_low"] > 0
    assert logged["test/unseen/flip_reversed"] == 1.0  # a mean of differences, whose sign the labels are
    assert logged["test/few_shot/accuracy@8"] > logged["test/few_shot/accuracy@2"] > logged["test/few_shot/accuracy@0"]
    assert logged["test/few_shot/accuracy@0"] == pytest.approx(logged["test/unseen/global_accuracy"])


def test_metrics_json_holds_the_logged_numbers(tested: tuple[L.Trainer, dict[str, float]]):
    run, logged = tested
    found = metrics_json(run)
    assert {found[key] for key in ("split_hash", "num_resamples", "seed")} == {"0123abcd", 300, 1}
    length = logged["test/method/length"]
    assert found["method"] == {"name": "TinyMethod", "length": pytest.approx(length, rel=1e-6), "unknown": None}
    assert length > 0
    for users in ("seen", "unseen"):
        for name, value in found[users].items():
            assert logged[f"test/{users}/{name}"] == pytest.approx(value, rel=1e-6), name
    assert found["verdicts"]["unseen"].startswith("unseen: personalisation helps: +")
    assert found["few_shot"]["shots"] == SHOTS
    assert found["few_shot"]["num_repeats"] == REPEATS
    assert len(found["few_shot"]["accuracy_low"]) == len(SHOTS)


def test_files_of_a_test(tested: tuple[L.Trainer, dict[str, float]]):
    folder = run_dir(tested[0])
    for picture in ("histogram.png", "calibration.png", "few_shot.png"):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"
    with (folder / "per_user.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["user_id"] for row in rows] == [f"user-{row}" for row in range(SEEN + UNSEEN)]
    assert [row["split"] for row in rows] == ["seen"] * SEEN + ["unseen"] * UNSEEN
    mean = sum(float(row["gain"]) for row in rows[SEEN:]) / UNSEEN
    assert mean == pytest.approx(metrics_json(tested[0])["unseen"]["personal_minus_global"])


def test_terminal_shows_table_verdict_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer(tmp_path, PreferenceMetrics(100), FewShotCurve(100)).test(TinyMethod(), Planted(), verbose=False)
    out = capsys.readouterr().out
    verdicts = metrics_json(trainer(tmp_path, logger=CSVLogger(tmp_path, version=0)))["verdicts"]
    assert (
        out.index("95% intervals over users") < out.index(verdicts["unseen"]) < out.index("metrics.json, per_user.csv")
    )
    assert "Few-shot curve, 10 unseen users, 2 repeats" in out
    assert str(tmp_path) in out


def test_without_few_shot_batches_the_curve_is_silent(tmp_path: Path):
    run = trainer(tmp_path, PreferenceMetrics(100), FewShotCurve(100), logger=False)
    run.test(TinyMethod(), Planted(with_few_shot=False), verbose=False)
    assert "few_shot" not in metrics_json(run)
    assert sorted(file.name for file in run_dir(run).iterdir()) == [
        "calibration.png",
        "histogram.png",
        "metrics.json",
        "per_user.csv",
    ]


def test_no_curve_is_shown_of_a_method_that_serves_all_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Alike(TinyMethod):
        def _score(self, responses: torch.Tensor, users: UserState) -> torch.Tensor:
            return responses.sum(-1)

    for method, is_shown in ((Alike(), False), (TinyMethod(), True)):
        run = trainer(tmp_path / str(is_shown), FewShotCurve(100), PreferenceMetrics(100), logger=False)
        run.test(method, Planted(), verbose=False)
        assert ("Few-shot curve" in capsys.readouterr().out) is is_shown
        assert (run_dir(run) / "few_shot.png").exists() is is_shown
        accuracy = metrics_json(run)["few_shot"]["accuracy"]
        assert (len(set(accuracy)) > 1) is is_shown


def test_a_second_test_in_the_same_folder_leaves_nothing_old(tmp_path: Path):
    run = trainer(tmp_path, FewShotCurve(100), PreferenceMetrics(100), logger=False)
    run.test(TinyMethod(), Planted(), verbose=False)
    assert "few_shot" in metrics_json(run)
    run.test(TinyMethod(), Planted(with_few_shot=False), verbose=False)
    assert "few_shot" not in metrics_json(run)


def test_a_datamodule_is_asked_for(tmp_path: Path):
    with pytest.raises(ValueError, match="pass datamodule="):
        trainer(tmp_path, PreferenceMetrics()).validate(TinyMethod(), Planted().val_dataloader(), verbose=False)


def test_user_rows_are_asked_for(tmp_path: Path):
    class Rowless(Planted):
        def pairs(self, rows: torch.Tensor, part: int, **fields: Any) -> PreferenceBatch:
            return super().pairs(rows, part, **fields)._replace(user_row=None)

    with pytest.raises(ValueError, match="expected evaluation batches with user_row"):
        trainer(tmp_path, PreferenceMetrics()).validate(TinyMethod(), Rowless(), verbose=False)


# ---------------------------------------------------------------------- user states
def test_user_states_stand_beside_the_best_checkpoint(tested: tuple[L.Trainer, dict[str, float]]):
    run = tested[0]
    path = run.checkpoint_callback.best_model_path
    checkpoint = torch.load(path, weights_only=True)
    assert Path(path).is_relative_to(run_dir(run) / "checkpoints")
    store = UserStore(store_path(path), shared_hash(checkpoint["state_dict"], TinyMethod.user_tables))
    assert store.ids == [f"user-{row}" for row in range(SEEN)]
    state, known = store.get(["user-3"])
    assert known.all()
    torch.testing.assert_close(state.tensors["own"][0], checkpoint["state_dict"]["own"][3], rtol=0, atol=0)


def test_user_states_are_those_of_the_best_weights_and_the_model_keeps_its_own(tmp_path: Path):
    best = ModelCheckpoint(monitor="val/seen/log_loss", mode="max")  # the worst epoch, so that it differs from the last
    run = trainer(tmp_path, PreferenceMetrics(), SaveUserStates(), best, enable_checkpointing=True)
    method = TinyMethod()
    run.fit(method, Planted())
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]["own"]
    state, _ = UserStore(store_path(best.best_model_path)).get(method.user_ids)
    torch.testing.assert_close(state.tensors["own"], saved, rtol=0, atol=0)
    assert not torch.equal(method.own, saved)
    assert method.training


def test_without_a_checkpoint_user_states_warn(tmp_path: Path):
    with pytest.warns(UserWarning, match="this fit was never validated"):
        trainer(tmp_path, SaveUserStates(), max_epochs=1).fit(TinyMethod(), Planted())


# ---------------------------------------------------------------------- folders and loggers
@pytest.mark.parametrize("kind", ["csv", "tensorboard", "none"])
def test_run_dir_is_the_folder_of_lightnings_checkpoints(tmp_path: Path, kind: str):
    makers = {
        "csv": lambda: CSVLogger(tmp_path / "logs", name="lore"),
        "tensorboard": lambda: TensorBoardLogger(tmp_path),
    }
    logger = makers[kind]() if kind in makers else False
    checkpoint = ModelCheckpoint()
    run = trainer(tmp_path, checkpoint, logger=logger, enable_checkpointing=True, max_epochs=1, limit_val_batches=0)
    run.fit(TinyMethod(), Planted())
    folder = Path(checkpoint.best_model_path).parent.parent
    assert run_dir(run) == (tmp_path / "run" if kind == "none" else folder)


def test_tensorboard_gets_the_pictures(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, PreferenceMetrics(100), FewShotCurve(100), logger=logger).test(
        TinyMethod(), Planted(), verbose=False
    )
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert set(events.Tags()["images"]) == {"test/histogram", "test/calibration", "test/few_shot"}
    assert "test/unseen/personal_minus_global" in events.Tags()["scalars"]


def test_wandb_gets_the_users_and_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="p", version="abc", group="planted")
    run = trainer(tmp_path, PreferenceMetrics(100), FewShotCurve(100), logger=logger)
    run.test(TinyMethod(), Planted(), verbose=False)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert run_dir(run) == tmp_path / "p" / "abc"
    assert (summary["test/users"]["ncols"], summary["test/users"]["nrows"]) == (8, SEEN + UNSEEN)
    assert (
        summary["test/histogram"]["count"]
        == summary["test/calibration"]["count"]
        == summary["test/few_shot"]["count"]
        == 1
    )
    assert summary["test/unseen/num_users"] == UNSEEN


# ---------------------------------------------------------------------- processes
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes_report_the_numbers_of_one(tmp_path: Path):
    reports = []
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        torch.manual_seed(0)
        method, folder = TinyMethod(), tmp_path / str(devices)
        with torch.no_grad():
            method.own.normal_()
        callbacks = PreferenceMetrics(200), FewShotCurve(200)
        run = trainer(
            folder, *callbacks, logger=False, devices=devices, strategy=strategy, use_distributed_sampler=False
        )
        run.test(method, Planted(), verbose=False)
        reports.append(metrics_json(run))
    one, two = reports
    assert one["verdicts"] == two["verdicts"]
    for group in ("seen", "unseen"):
        assert one[group] == pytest.approx(two[group], rel=1e-12)
    assert one["few_shot"].pop("shot_unit") == two["few_shot"].pop("shot_unit") == "pair"
    for name, values in one["few_shot"].items():
        assert values == pytest.approx(two["few_shot"][name], rel=1e-12), name
