"""Callbacks that turn what the evaluation steps return into metrics, files and pictures, and keep the user states.

Methods are never touched: a callback reads ``margin``, ``population_margin`` and ``other_margin`` of a step's output,
and the user rows of its batch. Every process computes, process zero writes. A ``fast_dev_run`` sees one batch, so
nothing is written or printed of it.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import RenderableType
from torch import Tensor

from plm.atomic import write_csv, write_json
from plm.evaluation import (
    USER_COLUMNS,
    calibration_figure,
    control_notes,
    few_shot_figure,
    few_shot_table,
    gain_figure,
    is_flat,
    points,
    print_parts,
    summarize,
    summarize_few_shot,
    summary_table,
    user_rows,
    verdict,
)
from plm.metrics import CONTROL_MARGINS, FewShotMetric, PreferenceMetric, UserTable
from plm.types import PreferenceBatch
from plm.users import UserStore, shared_hash, store_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALIDATION_KEYS = ("accuracy", "log_loss", "global_accuracy", "personal_minus_global")
"""What is logged while training; the rest needs a bootstrap or waits for the test."""


def run_dir(trainer: L.Trainer) -> Path:
    """The run's folder, the one that holds Lightning's ``checkpoints/``; ``default_root_dir/run`` without a logger."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / "run"
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version))


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Whether the trainer runs one batch of everything to find bugs: nothing of it is kept or shown."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


class PreferenceMetrics(L.Callback):
    """Logs accuracy, log-loss, calibration and controls of seen and unseen users; writes the results of a test.

    Validation logs ``val/<users>/`` accuracy, log_loss, global_accuracy and personal_minus_global. A test logs
    everything under ``test/<users>/`` with intervals, prints a table with a verdict, and writes ``metrics.json``,
    ``per_user.csv``, ``histogram.png`` and ``calibration.png`` into the run's folder. What a method reports of itself,
    such as signs of collapse, goes to ``val/method/``, ``test/method/`` and ``method`` of ``metrics.json``.

    Args:
        num_resamples: Bootstrap resamples of the users behind each 95 % interval of a test.
        seed: Seed of the bootstrap.
    """

    def __init__(self, num_resamples: int = 2000, seed: int = 0) -> None:
        self.num_resamples = num_resamples
        self.seed = seed
        self._names: list[str] = []  # of the evaluation loaders, in order
        self._metrics: dict[str, PreferenceMetric] = {}
        self._report: list[RenderableType] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from empty sums."""
        self._start(trainer, pl_module, "validate")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from empty sums."""
        self._start(trainer, pl_module, "test")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        self._update(outputs, batch, dataloader_idx)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the few numbers that training watches."""
        for name, metric in self._metrics.items():
            numbers = metric.table().estimates()
            _log(pl_module, f"val/{name}", {key: numbers[key] for key in VALIDATION_KEYS if key in numbers})
        _log(pl_module, "val/method", cast(Any, pl_module).report())

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log every number with its interval and write the files."""
        data = _datamodule(trainer)
        tables = {name: _with_majority(metric.table(), data, name) for name, metric in self._metrics.items()}
        groups = {name: summarize(table, self.num_resamples, self.seed) for name, table in tables.items()}
        for name, numbers in groups.items():
            _log(pl_module, f"test/{name}", numbers)
        report = cast(Any, pl_module).report()
        _log(pl_module, "test/method", report)
        if not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        verdicts = {name: verdict(name, numbers) for name, numbers in groups.items()}
        metadata = {
            "method": {"name": type(pl_module).__name__, **report},
            "split_hash": data.split_hash,
            "num_resamples": self.num_resamples,
            "seed": self.seed,
        }
        folder = run_dir(trainer)
        noise = _noise(data)
        metadata |= {"noise": noise} if noise else {}
        write_json(folder / "metrics.json", {**metadata, **groups, "verdicts": verdicts})
        rows = user_rows(tables, data.all_user_ids)
        write_csv(folder / "per_user.csv", USER_COLUMNS, rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("test/users", columns=USER_COLUMNS, data=rows)
        _show(trainer, "test/histogram", gain_figure(tables), folder / "histogram.png")
        _show(trainer, "test/calibration", calibration_figure(tables), folder / "calibration.png")
        files = f"metrics.json, per_user.csv and figures in {folder}"
        ceiling = [noise["sentence"]] if noise else []
        self._report = [summary_table(groups), *verdicts.values(), *control_notes(groups), *ceiling, files]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the table last, below the progress bar and Lightning's own listing."""
        self._report = _print(self._report)

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: Literal["validate", "test"]) -> None:
        data, device = _datamodule(trainer), _device(pl_module)
        num_users, self._names = len(data.all_user_ids), data.eval_names(stage)
        self._metrics = {name: PreferenceMetric(num_users).to(device) for name in self._names if name != "few_shot"}

    def _update(self, outputs: STEP_OUTPUT, batch: PreferenceBatch, dataloader_idx: int) -> None:
        name = self._names[dataloader_idx]
        if name == "few_shot":
            return
        metric, facts = self._metrics[name], _facts(outputs)
        controls = {key: facts[key].to(metric.device) for key in CONTROL_MARGINS if key in facts}
        rows = _required(batch, "user_row").to(metric.device)
        metric.update(facts["margin"].to(metric.device), rows, batch.tie.to(metric.device), **controls)


class FewShotCurve(L.Callback):
    """Accuracy, calibration and harm of unseen users against the number of pairs they are adapted on.

    A test logs ``test/few_shot/accuracy@<shots>``, adds ``few_shot`` to ``metrics.json`` and draws ``few_shot.png``,
    which, as the table, is left out where no number of pairs changes anything, as of a method without a personal part.
    It does nothing when the data has no few-shot batches.

    Args:
        num_resamples: Bootstrap resamples of the users behind the 95 % band.
        seed: Seed of the bootstrap.
    """

    def __init__(self, num_resamples: int = 2000, seed: int = 0) -> None:
        self.num_resamples = num_resamples
        self.seed = seed
        self._loader = 0  # index of the few-shot loader
        self._unit = "pair"
        self._metric: FewShotMetric | None = None
        self._curve: dict[str, Any] | None = None
        self._report: list[RenderableType] = []

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from empty sums."""
        data = _datamodule(trainer)
        names = data.eval_names("test")
        self._metric = self._curve = None
        if "few_shot" in names and not is_fast_dev_run(trainer):
            self._loader = names.index("few_shot")
            seen = set(data.user_ids)
            users = [row for row, user_id in enumerate(data.all_user_ids) if user_id not in seen]
            self._unit = getattr(data, "shot_unit", self._unit)
            metric = FewShotMetric(users, data.shots, data.repeats)
            self._metric = metric.to(_device(pl_module))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch of the curve."""
        metric = self._metric
        if metric is None or dataloader_idx != self._loader:
            return
        keys = {name: _required(batch, name).to(metric.device) for name in ("user_row", "num_shots", "repeat")}
        metric.update(_facts(outputs)["margin"].to(metric.device), **keys, tie=batch.tie.to(metric.device))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the curve and draw it."""
        if self._metric is None:
            return
        table = self._metric.table()
        if not len(table.user_row):
            return
        curve = {**summarize_few_shot(table, self.num_resamples, self.seed), "shot_unit": self._unit}
        accuracy = zip(curve["shots"], curve["accuracy"], strict=True)
        _log(pl_module, "test/few_shot", {f"accuracy@{shots}": value for shots, value in accuracy})
        if trainer.is_global_zero:
            self._curve = curve
            if is_flat(table):
                return
            path = run_dir(trainer) / "few_shot.png"
            _show(trainer, "test/few_shot", few_shot_figure(curve), path)
            self._report = [few_shot_table(curve)]

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the curve to ``metrics.json``, which `PreferenceMetrics` has begun anew by now."""
        if self._curve is not None:
            write_json(run_dir(trainer) / "metrics.json", {"few_shot": self._curve}, merge=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the curve below the progress bar."""
        self._report = _print(self._report)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint of a fit, also of a resumed one, which writes into another folder, and the last."""

    _end = -1
    """Step at which ``last.ckpt`` was written."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Also write ``last.ckpt`` where the fit ends; a later fit goes on from here, within an epoch, too."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and trainer.should_stop:
            self._save_end(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``last.ckpt`` of a fit that was stopped between epochs."""
        super().on_train_end(trainer, pl_module)
        if self._end != trainer.global_step:
            self._save_end(trainer)

    def _save_end(self, trainer: L.Trainer) -> None:
        if not is_fast_dev_run(trainer):
            self._end = trainer.global_step
            trainer.save_checkpoint(Path(cast(str, self.dirpath)) / "last.ckpt", self.save_weights_only)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the best score of the run that is resumed; Lightning forgets it when the folder changes."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class SaveUserStates(L.Callback):
    """Writes the states of all seen users beside the best checkpoint when a fit ends, as a `UserStore`."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the states off the weights of the best checkpoint; the model itself is left as it was."""
        if not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        path = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not path:
            rank_zero_warn(
                "user states are not saved: checkpoints are off, or this fit was never validated; leave out "
                "trainer.limit_val_batches: 0 and trainer.enable_checkpointing: false"
            )
            return
        if Path(path).is_dir():
            rank_zero_warn(f"user states are not saved: {path} is a folder of parts of a checkpoint; make it one file")
            return
        best = torch.load(path, map_location=pl_module.device, weights_only=True)["state_dict"]
        current = pl_module.state_dict()
        # what other processes hold parts of is a network, and stays: no state of a user is read off it
        shared = [name for name in best if name in current and type(current[name]) is type(best[name])]
        last = {name: current[name].clone() for name in shared}
        was_training = pl_module.training
        pl_module.eval()
        try:
            pl_module.load_state_dict({name: best[name] for name in last}, strict=pl_module.strict_loading)
            with torch.no_grad():
                method = cast(Any, pl_module)
                states = method.user_states(torch.arange(method.num_users, device=pl_module.device))
                UserStore.begin(store_path(path), shared_hash(best, method.user_tables), method.user_ids, states)
        finally:
            pl_module.load_state_dict(last, strict=pl_module.strict_loading)
            pl_module.train(was_training)


# ---------------------------------------------------------------------- shared by the callbacks
def _datamodule(trainer: L.Trainer) -> Any:
    """Return the datamodule, which names the evaluation loaders and the users."""
    data = getattr(trainer, "datamodule", None)
    if data is None:
        raise ValueError("plm's callbacks read names and users from a PreferenceDataModule, got none; pass datamodule=")
    return data


def _with_majority(table: UserTable, data: Any, name: str) -> UserTable:
    """Add what most training users preferred, where the test judged these pairs and they share responses with them."""
    if not hasattr(data, "majority_pairs"):
        return table
    margin, user_row, tie = map(torch.from_numpy, data.majority_pairs(name))
    metric = PreferenceMetric(len(data.all_user_ids))
    metric.update(margin, user_row, tie)
    judged = metric.table()
    if not margin.any() or not np.array_equal(judged.num_pairs, table.num_pairs):
        return table
    return replace(table, majority_accuracy=judged.accuracy)


def _noise(data: Any) -> dict[str, Any]:
    """What repeated comparisons of one user say about the best accuracy there can be; empty where there are none."""
    found = getattr(data, "repeated_comparisons", None)
    if found is None or math.isnan(found.noise_ceiling):
        return {}
    num_repeated = found.agreeing + found.contradicting
    low, high = (points(bound, "") for bound in found.interval)
    return {
        **found._asdict(),
        "ceiling": found.noise_ceiling,
        "ceiling_interval": list(found.interval),
        "sentence": f"noise ceiling: accuracy {points(found.noise_ceiling, '')} % [{low}, {high}]: of {num_repeated:,} "
        f"repeated comparisons of one user {found.contradicting:,} were answered the other way",
    }


def _device(pl_module: L.LightningModule) -> torch.device:
    """The device of the sums: that of the model, or the CPU where that device has no float64."""
    return torch.device("cpu") if pl_module.device.type == "mps" else pl_module.device


def _facts(outputs: STEP_OUTPUT) -> dict[str, Tensor]:
    if not isinstance(outputs, dict) or "margin" not in outputs:
        raise ValueError(f"expected an evaluation step that returns {{'margin': (B,)}}, got {type(outputs).__name__}")
    return cast(dict[str, Tensor], outputs)


def _required(batch: PreferenceBatch, name: str) -> Tensor:
    value = getattr(batch, name)
    if value is None:
        raise ValueError(f"expected evaluation batches with {name}, got None; set it where the batches are made")
    return cast(Tensor, value)


def _log(pl_module: L.LightningModule, prefix: str, numbers: dict[str, float]) -> None:
    """Log numbers that are already equal in all processes, without nan; sync_dist silences a warning of Lightning."""
    present = {f"{prefix}/{key}": value for key, value in numbers.items() if not math.isnan(value)}
    pl_module.log_dict(present, sync_dist=True)


def _show(trainer: L.Trainer, key: str, figure: Figure, path: Path) -> None:
    """Save a figure and hand it to the loggers that show pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(key, figure, trainer.global_step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(key, [str(path)])


def _print(report: list[RenderableType]) -> list[RenderableType]:
    """Print the parts of a report after an empty line; returns an empty one."""
    if report:
        print_parts("", *report)
    return []
