"""``select:`` of a recipe: fit every combination of a small grid, keep the best by validation value.

Only validation rows are looked at. Data and features are loaded once and shared by all candidates.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from rich.table import Table

from plm.atomic import write_json, write_text
from plm.callbacks import is_fast_dev_run, run_dir
from plm.evaluation import print_parts
from plm.method import PersonalizationMethod, constructor_arguments
from plm.recipe.errors import message_of
from plm.recipe.grid import LINKS
from plm.recipe.parser import RecipeParser
from plm.recipe.quiet import quiet
from plm.recipe.runs import repeatable


class BestValue(L.Callback):
    """Remembers the best value of a logged metric over the epochs of a fit.

    Args:
        monitor: Name of the metric.
        mode: ``"min"`` or ``"max"``.
    """

    def __init__(self, monitor: str, mode: str) -> None:
        self.monitor = monitor
        self.mode = mode
        self.value = math.nan

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare this epoch's value."""
        if trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"select watches checkpoint.monitor = {self.monitor!r}, but validation logged: {logged}")
        value = float(trainer.callback_metrics[self.monitor])
        if math.isnan(self.value) or better(value, self.value, self.mode):
            self.value = value


def better(value: float, than: float, mode: str) -> bool:
    """Whether a value beats another; nan never does."""
    return value < than if mode == "min" else value > than


def select(cli: LightningCLI, untouched: tuple[Any, ...]) -> PersonalizationMethod:
    """Fit all candidates, report them, and build the best one anew, untrained.

    Writes two files into the folder of the run: ``select.json``, all candidates with their values, and
    ``selected.yaml``, the recipe of the best one, to be used with the run's checkpoints.

    Args:
        cli: The command, its data, method and trainer instantiated.
        untouched: Arguments of the trainer, metrics and early stopping as no fit has used them yet.

    Raises:
        ValueError: If a candidate cannot be built, or none reached a finite value.
    """
    config = cli.config["fit"]
    monitor, mode = config.checkpoint.monitor, config.checkpoint.mode
    names = [key.removeprefix("model.").removeprefix("init_args.") for key in config.select]
    candidates = [dict(zip(names, values, strict=True)) for values in itertools.product(*config.select.values())]
    for candidate in candidates:  # all mistakes show before the first fit
        build(cli, candidate)
    with quiet():  # the same lines for every candidate
        values = [_fit(cli, untouched, candidate, index, monitor, mode) for index, candidate in enumerate(candidates)]
    finite = [index for index, value in enumerate(values) if math.isfinite(value)]
    if not finite:
        raise ValueError(f"select: no candidate reached a finite {monitor}, got {values!r}")
    best = (min if mode == "min" else max)(finite, key=values.__getitem__)
    best = cli.trainer.strategy.broadcast(best)
    if cli.trainer.is_global_zero and not is_fast_dev_run(cli.trainer):  # which leaves nothing behind
        _report(cli, candidates, values, best)
    L.seed_everything(config.seed_everything, workers=True, verbose=False)
    return build(cli, candidates[best])


def build(cli: LightningCLI, arguments: dict[str, Any]) -> PersonalizationMethod:
    """Build the recipe's method with some arguments replaced, filled from the data that are already there."""
    spec = cli.config["fit"].model
    accepted = constructor_arguments(type(cli.model))
    linked = {
        target: getattr(cli.datamodule, source.removeprefix("data."))
        for target, source in LINKS.items()
        if target in accepted
    }
    arguments_of_recipe = {key: value for key, value in spec.init_args.as_dict().items() if key not in LINKS}
    parser = RecipeParser(exit_on_error=False)
    parser.add_subclass_arguments(PersonalizationMethod, "model", fail_untyped=False)
    try:
        parsed = parser.parse_object(
            {"model": {"class_path": spec.class_path, "init_args": {**arguments_of_recipe, **linked, **arguments}}}
        )
        method: PersonalizationMethod = parser.instantiate(parsed).model
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"select: {message_of(error)}") from error
    return method


def _fit(
    cli: LightningCLI, untouched: tuple[Any, ...], candidate: dict[str, Any], index: int, monitor: str, mode: str
) -> float:
    """Best monitored value of one candidate, fitted with callbacks and a trainer of its own."""
    config = cli.config["fit"]
    L.seed_everything(config.seed_everything, workers=True, verbose=False)
    method = build(cli, candidate)
    best = BestValue(monitor, mode)
    trainer_config, metrics, stopping = copy.deepcopy(untouched)
    callbacks = [c for c in trainer_config.pop("callbacks", None) or [] if not isinstance(c, Checkpoint)]
    options = {
        "logger": CSVLogger(run_dir(cli.trainer), name="select", version=str(index)),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(**{**trainer_config, **options, "callbacks": [*callbacks, metrics, stopping, best]})
    trainer.fit(method, datamodule=cli.datamodule)
    return best.value


def _report(cli: LightningCLI, candidates: list[dict[str, Any]], values: list[float], best: int) -> None:
    """Write and print the table of candidates."""
    config = cli.config["fit"]
    folder = run_dir(cli.trainer)
    rows = [
        {**candidate, config.checkpoint.monitor: value} for candidate, value in zip(candidates, values, strict=True)
    ]
    monitor = {"monitor": config.checkpoint.monitor, "mode": config.checkpoint.mode}
    write_json(folder / "select.json", {**monitor, "selected": best, "candidates": rows})
    chosen = repeatable(config)
    chosen.select = None
    for name, value in candidates[best].items():
        chosen.model.init_args[name] = value
    text = cli._parser("fit").dump(chosen, skip_unset=False)
    write_text(folder / "selected.yaml", text)
    table = Table(*map(str, rows[0]), "", title="Selection on validation rows", title_justify="left")
    for index, row in enumerate(rows):
        cells = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()]
        table.add_row(*cells, "selected" if index == best else "")
    print_parts(table)
