"""``plm fit|validate|test|predict``: run a recipe; ``plm methods``: what a recipe can name."""

from __future__ import annotations

import os

from plm.cli import VERBS
from plm.cli.options import OptionParser, stop
from plm.cli.recipe_options import COMMON, check_options, show_help, wants_help

_OPTIONS = {
    "--config FILE": "recipe, your own or a shipped one (recipes/quickstart.yaml); of several the later wins",
    "--model CLASS": "method: its short name, as plm methods lists them, or its import path",
    "--model.init_args.NAME VALUE": "argument of the method, e.g. --model.init_args.lr 0.01; --model.help CLASS "
    "describes all of a method",
    "--data.source CLASS": "where pairs come from; --data.source.help CLASS describes the arguments, which are set by "
    "--data.source.init_args.NAME VALUE",
    "--data.backbone CLASS": "what reads texts; arguments as for the source",
    "--trainer.max_epochs N": "passes over the training pairs; early stopping may end sooner",
    "--trainer.accelerator NAME": "cpu, gpu or auto",
    "--trainer.devices N": "devices, each with a process of its own",
    "--trainer.logger CLASS": "who keeps the numbers: CSVLogger, TensorBoardLogger or WandbLogger",
    "--trainer.default_root_dir DIR": "folder of all runs (default: runs)",
    "--name NAME": "folder of this run in it, which must be new (default: method-data-time; of another verb than fit, "
    "the name of the checkpoint's run and the verb)",
    "--seed_everything N": "seed (default: 42)",
    "--ckpt_path FILE": "checkpoint to evaluate, or to go on from",
    "--select GRID": "{model.init_args.NAME: [VALUE, ...]}: fit every combination, keep the best on validation rows",
    "--final_test BOOL": "whether fit ends with a test of the best checkpoint (default: true)",
    "--show_lightning BOOL": "whether to show what Lightning reports of devices, files and layers (default: false)",
    "--print_config": "show the recipe with all its defaults and stop",
    "--help all": "every option, those of Lightning too",
}
_ONLY_FIT = ("--trainer.max_epochs N", "--select GRID", "--final_test BOOL")
NAMES = {
    "fit": ("final_test", "select"),
    "validate": ("verbose",),
    "test": ("verbose",),
    "predict": ("return_predictions",),
}
"""First parts of options that one verb alone has."""


def run(args: list[str]) -> None:
    """Run a recipe.

    Args:
        args: The verb first.

    Raises:
        ValueError: If the recipe, its data or the checkpoint cannot be read, in one message.
    """
    verb, rest = (args[0], args[1:]) if args[0] in VERBS else ("", args)
    if verb == "methods":
        _list_methods(rest)
        return
    if verb and wants_help(rest) == "short":
        rows = [(name, text) for name, text in _OPTIONS.items() if verb == "fit" or name not in _ONLY_FIT]
        show_help(
            f"plm {verb} --config RECIPE [--OPTION VALUE ...]",
            f"{VERBS[verb][1].capitalize()}. A recipe is the saved form of the options; the command line wins over it. "
            "These are the options that most runs need.",
            rows,
            f"example:\n  plm {verb} --config recipes/quickstart.yaml --model LoRe --model.init_args.num_bases 4",
        )
        return
    if verb:
        if not rest and not any(name.startswith(f"PLM_{verb.upper()}__") for name in os.environ):
            required = "data.source, data.backbone, model"
            stop(f"the following arguments are required: {required}; give a recipe with --config")
        check_options(rest, (*COMMON, *NAMES.get(verb, ())))

    from plm.recipe.fit import run_recipe

    run_recipe([verb, "--help"] if verb and wants_help(rest) == "all" else args)


def _list_methods(args: list[str]) -> None:
    """Print every registered method; none is imported."""
    OptionParser(prog="plm methods", description="List the installed methods.").parse(args)

    from plm.recipe.plugins import describe_methods

    print(describe_methods())
