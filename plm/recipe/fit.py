"""``plm fit|validate|test|predict``: LightningCLI with the few overrides that make a recipe the one truth."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from plm.atomic import write_json, write_text
from plm.callbacks import BestCheckpoint, FewShotCurve, PreferenceMetrics, SaveUserStates, run_dir
from plm.checkpoint import find_class, read_checkpoint
from plm.data.datamodule import PreferenceDataModule
from plm.data.skipped import NAME as SKIPPED
from plm.data.skipped import write_skipped
from plm.messages import WrongUsage
from plm.method import CHECKPOINT_KEY, PersonalizationMethod
from plm.recipe.defaults import expand, read_config
from plm.recipe.errors import message_of
from plm.recipe.grid import LINKS, check_grid
from plm.recipe.paper import check_paper
from plm.recipe.parser import SETTINGS, RecipeParser, relative_references
from plm.recipe.plugins import load_plugins
from plm.recipe.predict import SavePredictions
from plm.recipe.quiet import quiet, speak
from plm.recipe.runs import (
    CLAIMED,
    claim,
    claimed_name,
    discard_empty,
    keeps_files,
    numbered,
    provenance,
    repeatable,
    run_name,
)
from plm.recipe.select import select

MONITOR = "val/seen/log_loss"
"""What early stopping, checkpoints and selection watch unless the recipe says otherwise: lower is better."""


class SaveRecipe(SaveConfigCallback):
    """Save the resolved recipe in the folder of the run, and in its loggers; a fit or test also ``facts.json``.

    A fit saves its split, too.
    Lightning's own callback writes to a folder that all W&B runs share, where the second run fails.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``recipe.yaml`` (of a fit) or ``<command>.yaml`` once per run, on rank zero; all learn its folder."""
        name = trainer.strategy.broadcast(claimed_name())
        if name != claimed_name():  # a process that others than Lightning have started
            trainer.loggers = [_renamed(logger, name) for logger in trainer.loggers]
        if not self.already_saved and trainer.is_global_zero:
            text = self.parser.dump(repeatable(self.config), skip_unset=False)
            path = run_dir(trainer) / ("recipe.yaml" if stage == "fit" else f"{TrainerFn(stage).value}.yaml")
            write_text(path, text)
            data = getattr(trainer, "datamodule", None)
            if stage in ("fit", "test"):
                write_json(path.with_name("facts.json"), provenance())
            if stage == "fit" and isinstance(data, PreferenceDataModule):
                data.save_splits(path.with_name("splits.json"))
                write_skipped(data.table, path.with_name(SKIPPED))
            metadata = {"recipe": yaml.safe_load(text), "method": type(pl_module).__name__}
            if isinstance(data, PreferenceDataModule):
                metadata["dataset"] = data.source.name
            for logger in trainer.loggers:
                logger.log_hyperparams(metadata)
        self.already_saved = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, after data and features are loaded."""
        self._start = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add ``fit_seconds`` to ``facts.json``."""
        if trainer.is_global_zero:
            seconds = time.perf_counter() - self._start
            write_json(run_dir(trainer) / "facts.json", {"fit_seconds": seconds}, merge=True)


class RecipeCLI(LightningCLI):
    """LightningCLI whose recipe wins over checkpoints, and that can select hyper-parameters before a fit.

    It knows the options of its verb alone, where the first argument is one: to collect them takes most of the time that
    a short command takes.
    """

    _goes_on = ""
    """What is said of a fit that starts from a checkpoint."""

    def __init__(self, model_class: type, datamodule_class: type, args: list[str], **options: Any) -> None:
        self._verb = args[0] if args else ""
        super().__init__(model_class, datamodule_class, args=args, **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # as Lightning calls it
        """Arguments of methods of the trainer that are no options, by verb."""
        known = LightningCLI.subcommands()
        return {self._verb: known[self._verb]} if self._verb in known else known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of plm, the callbacks of every run, and the links from data to method."""
        parser.add_argument(
            "--defaults", type=list[dict[str, str]] | None, default=None, help="Groups of conf/ read before the recipe."
        )
        parser.add_argument(
            "--select",
            type=dict[str, list[Any]] | None,
            default=None,
            help="Grid {model.init_args.NAME: [values]}: fit keeps the combination with the best monitored val value.",
        )
        parser.add_argument(
            "--paper",
            type=dict[str, str | dict[str, Any]] | None,  # a text of any words stays one
            default=None,
            help="Numbers of a paper {source: ..., table: ..., numbers: ...}, which plm verify compares with.",
        )
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Folder of the run (default: method-data-time, or that of the checkpoint's run and the verb).",
        )
        parser.add_argument(
            "--final_test", type=bool, default=True, help="Whether fit ends with a test of the best checkpoint."
        )
        parser.add_argument(
            "--show_lightning", type=bool, default=False, help="Whether to show what Lightning reports."
        )
        parser.add_lightning_class_args(PreferenceMetrics, "metrics")
        parser.add_lightning_class_args(FewShotCurve, "few_shot")
        parser.add_lightning_class_args(SaveUserStates, "user_states")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.set_defaults({"checkpoint.monitor": MONITOR, "checkpoint.mode": "min", "checkpoint.filename": "best"})
        parser.set_defaults({"checkpoint.save_on_train_epoch_end": False})  # an epoch may end before its last batch
        # after validations alone: a resumed fit ends an epoch before it has validated anything
        parser.set_defaults({"early_stopping.monitor": MONITOR, "early_stopping.check_on_train_epoch_end": False})
        for target, source in LINKS.items():
            parser.link_arguments(source, f"model.init_args.{target}", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Leave the table of a test to `PreferenceMetrics`, and do not hold predictions that are written to a file."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        quiet = {"test": "verbose", "predict": "return_predictions"}
        if subcommand in quiet:
            parser.set_defaults({quiet[subcommand]: False})
        return parser

    def before_instantiate_classes(self) -> None:
        """Claim the folder of the run, where a logger keeps files and the recipe names none.

        One process claims it; processes that Lightning starts are told by a variable, others by `SaveRecipe`.
        """
        config = self.config[self.config.subcommand] if self.subcommand else self.config
        loggers = config.trainer.get("logger")
        loggers = loggers if isinstance(loggers, list) else [loggers]
        free = [logger.init_args for logger in loggers if keeps_files(logger)]
        if config.trainer.fast_dev_run or not free:
            if config.name is not None and not config.trainer.fast_dev_run:
                self.parser.error(
                    "--name: expected a logger that keeps files and has no version; add {logger: csv} to defaults"
                )
            return
        if _is_first_process():
            source = config.data.get("source")
            checkpoint = config.get("ckpt_path")
            told = run_name(str(self.subcommand), config.model.class_path, source and source.as_dict(), checkpoint)
            must_be_new = config.name is not None and self.subcommand == "fit" and checkpoint is None
            names = [config.name] if must_be_new else numbered(config.name or told)
            os.environ[CLAIMED] = str(claim(free[0].save_dir, names))
        for arguments in free:
            arguments.name = ""
            arguments.version = claimed_name()

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with a short message for a bad interpolation and for what Lightning would ignore."""
        assert isinstance(args, list) and isinstance(parser, RecipeParser)
        self.config = parser.parse_or_stop(args)
        config = self.config[self.config.subcommand]
        recipes = [read_config(path) for path in _config_files(args)]
        typed = any(arg.partition("=")[0] == "--defaults" for arg in args)
        if typed or (config.defaults and not any(recipe.get("defaults") for recipe in recipes)):
            parser.error(
                "defaults work in a recipe given by --config only; elsewhere give --config conf/GROUP/NAME.yaml"
            )
        if config.show_lightning:
            config.trainer.enable_model_summary = True
            speak()
        config.defaults = None  # expanded by now: the saved recipe stands on its own
        _refuse_link_targets(parser, args, recipes)
        if config.select:
            check_grid(config.select)
        if config.paper is not None:
            check_paper(config.paper)

    def _parse_ckpt_path(self) -> None:
        """The recipe wins over the hyper-parameters of a checkpoint; another method's checkpoint is refused."""
        config = self.config[self.config.subcommand]
        path = config.ckpt_path
        if path is None and self.config.subcommand != "fit":
            rank_zero_warn("no --ckpt_path: the method is evaluated as it is before training")
        if path in ("best", "last"):
            self.parser.error(f"--ckpt_path {path}: every run has a folder of its own; give the file")
        if path is None or path == "hpc" or Path(path).is_dir():
            return
        checkpoint = read_checkpoint(path)
        held = checkpoint[CHECKPOINT_KEY]["class_path"]
        if find_class(held) is not find_class(config.model.class_path):
            self.parser.error(f"the checkpoint {path!r} holds {held}, the recipe asks for {config.model.class_path}")
        if self.config.subcommand == "fit":
            reached = f"epoch {checkpoint['epoch'] + 1} and step {checkpoint['global_step']}"
            self._goes_on = f"goes on from {path}, where {reached} were reached"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Keep what candidates of a selection are fitted with before the trainer of the run takes it over."""
        if self._get(self.config, "select"):
            parts = [self._get(self.config_init, key) for key in ("trainer", "metrics", "early_stopping")]
            self.untouched = copy.deepcopy((parts[0].as_dict(), *parts[1:]))
        if self.subcommand == "predict":
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": SavePredictions()}
        trainer = super().instantiate_trainer(**kwargs)
        # the first of several checkpoints is the one that the test reads: not those that are kept for resuming
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda item: isinstance(item, Checkpoint) + (type(item) is not BestCheckpoint))
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it, and finish its W&B run, which the next one of this process would continue; as failed if it raises."""
        exit_code = 1
        try:
            super()._run_subcommand(subcommand)
            exit_code = 0
        finally:
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLogger) and logger._experiment is not None:  # asking for it would start one
                    logger.experiment.finish(exit_code)

    def before_fit(self) -> None:
        """Check that there is something to validate on, take the best candidate of a selection, say what goes on."""
        if isinstance(self.datamodule, PreferenceDataModule) and not self.datamodule.num_judged_validation_pairs:
            raise ValueError(
                "expected validation pairs that are not ties, got none: early stopping and the choice of a checkpoint "
                f"need them; raise data.val_rows or bring more pairs per user ({self.datamodule.summary()})"
            )
        if self._get(self.config, "select"):
            self.model = select(self, self.untouched)
        if self._goes_on and self.trainer.is_global_zero:
            print(self._goes_on)

    def after_fit(self) -> None:
        """Say which epoch was the best, and test its checkpoint."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or None
        if best is not None and self.trainer.is_global_zero:
            print(self._told(best))
        counts = self.datamodule.summary()
        is_tested = counts["pairs_test"] + counts["pairs_query"] > 0
        if self._get(self.config, "final_test") and is_tested:
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, weights_only=True, verbose=False)
        if self.trainer.is_global_zero:
            self._say_who_is_unknown(is_tested)

    def _say_who_is_unknown(self, is_tested: bool) -> None:
        """Print who took no part in the training, and how they do."""
        seen = set(self.datamodule.user_ids)
        names = [user_id for user_id in self.datamodule.all_user_ids if user_id not in seen]
        if names:
            shown = ", ".join(map(repr, names[:2])) + (", ..." if names[2:] else "")
            count = f"{len(names)} of {len(seen) + len(names)} users were held out and are unknown to the checkpoint"
            print(f"{count}: {shown}")
            print("plm adapt (in Python learn) learns them; a fit on everybody: data.unseen_users 0, data.test_rows 0")
        elif not is_tested:
            print("no pair was held out: nothing was tested")

    def _told(self, best: str) -> str:
        """The best epoch, its monitored value, and whether the fit ended early."""
        callback = self.trainer.checkpoint_callback
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        stopped = any(isinstance(each, EarlyStopping) and each.stopped_epoch for each in callbacks)
        epoch, value = read_checkpoint(best)["epoch"] + 1, getattr(callback, "best_model_score", None)
        judged = "" if value is None else f", {getattr(callback, 'monitor', '')} {float(value):.4f}"
        how = "stopped early" if stopped else "ran to its end"
        return f"best epoch {epoch} of {self.trainer.current_epoch}{judged}; {how}"


class RecipeReader(RecipeCLI):
    """A recipe that is read and instantiated, and not run."""

    def before_instantiate_classes(self) -> None:
        """Claim no folder."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def run_recipe(args: Sequence[str], cli_class: type[RecipeCLI] = RecipeCLI) -> RecipeCLI:
    """Run a training command.

    Args:
        args: Command line, the verb first.
        cli_class: What runs it; the leaderboard adds a callback, `RecipeReader` runs nothing.

    Returns:
        The command line interface with data, method and trainer as they were left.

    Raises:
        WrongUsage: If an option or a key is unknown or wrong.
        ValueError: If the recipe, its data or the checkpoint cannot be read, or the recipe cannot be run as it is.
    """
    with quiet():
        relative_references()
        load_plugins()
        try:
            cli = cli_class(
                PersonalizationMethod,
                PreferenceDataModule,
                subclass_mode_model=True,
                seed_everything_default=42,
                auto_configure_optimizers=False,
                save_config_callback=SaveRecipe,
                parser_class=RecipeParser,
                trainer_defaults={"default_root_dir": "runs", "enable_model_summary": False},
                parser_kwargs={**SETTINGS, "prog": "plm", "default_env": True, "env_prefix": "PLM"},
                args=expand(args),
            )
        except WrongUsage:
            raise
        except ValueError as error:
            raise ValueError(message_of(error)) from error
        except (MisconfigurationException, ModuleNotFoundError) as error:
            raise ValueError(str(error)) from error
        except RuntimeError as error:
            text = str(error)
            if text.startswith("Error(s) in loading state_dict"):
                raise ValueError(f"the checkpoint does not fit the recipe: {' '.join(text.split())}") from error
            if text.startswith("Early stopping conditioned on metric"):
                raise ValueError(text) from error
            raise
        finally:
            claimed = os.environ.pop(CLAIMED, None) if _is_first_process() else None
            if claimed is not None:
                discard_empty(Path(claimed))
        return cli


def _renamed(logger: Logger, name: str) -> Logger:
    """A logger that writes to the folder of a run."""
    if not isinstance(logger, CSVLogger | TensorBoardLogger) or logger.version != claimed_name():
        return logger
    return type(logger)(logger.save_dir, name=logger.name, version=name)


def _is_first_process() -> bool:
    """Whether this is the only process of a run, or the one that Lightning calls rank zero."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def _config_files(args: list[str]) -> Iterator[Path]:
    """Paths of all ``--config`` of expanded arguments."""
    return (Path(path) for option, path in pairwise(args) if option == "--config")


def _refuse_link_targets(parser: LightningArgumentParser, args: list[str], recipes: list[dict[str, Any]]) -> None:
    """Stop where an argument that is filled from the data is set by hand: Lightning would silently drop it."""
    targets = {arg.partition("=")[0].removeprefix("--") for arg in args if arg.startswith("--model.")}
    for recipe in recipes:
        model = recipe.get("model")
        if isinstance(model, dict):
            targets |= {f"model.{key}" for key in [*model, *(model.get("init_args") or {})]}
    for target, source in LINKS.items():
        if {f"model.{target}", f"model.init_args.{target}"} & targets:
            parser.error(f"model.init_args.{target} is filled from {source}; remove it from the recipe or command line")
