"""``plm portfolio``: choose few policies that serve everybody, and show how good they are at every size."""

from __future__ import annotations

from plm.cli.options import stop
from plm.cli.recipe_options import check_options, constructor_options, show_help, wants_help

_ABOUT = (
    "Choose few policies that serve everybody, with a certificate, and judge them at every size. Members are best-of-n "
    "policies, or with --policies those of a language model: plm generate --user then writes by them. The certificate "
    "bounds the loss to policies that the same oracle can make, no other; utilities are plain rewards unless --beta "
    "prices KL."
)


def run(args: list[str]) -> None:
    """Run a portfolio recipe.

    Raises:
        ValueError: If the recipe or what it names cannot be read, in one message.
    """
    options = constructor_options("plm.portfolio.run", "PortfolioRun")
    if wants_help(args) == "short":
        rows = [("--config FILE", "recipe; of several the later wins")]
        rows += [(f"--{name}", f"{text} (default: {default})" if default else text) for name, default, text in options]
        rows += [
            ("--rewards.help CLASS", "arguments of a class of rewards, set by --rewards.NAME VALUE"),
            ("--print_config", "show the recipe with all its defaults and stop"),
            ("--help all", "every option with its type"),
        ]
        show_help("plm portfolio --config RECIPE [--OPTION VALUE ...]", _ABOUT, rows)
        return
    if not args:
        stop("the following arguments are required: rewards; give a recipe with --config")
    check_options(args, ("config", "help", "print_config", *(name for name, _, _ in options)))

    from plm.portfolio.run import PortfolioRun
    from plm.recipe.parser import build_from_recipe
    from plm.recipe.quiet import quiet

    all_args = ["--help"] if wants_help(args) == "all" else args
    with quiet():
        build_from_recipe(PortfolioRun, all_args, prog="plm portfolio", description=_ABOUT).run()
