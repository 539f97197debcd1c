"""``plm portfolio``: choose few policies that serve everybody, and show how good they are at every size."""

from __future__ import annotations

from jsonargparse import ArgumentError, set_parsing_settings
from omegaconf.errors import OmegaConfBaseException

from plm.portfolio.run import PortfolioRun
from plm.recipe.defaults import expand
from plm.recipe.fit import quiet
from plm.recipe.parser import RecipeParser, shorten


def run(args: list[str]) -> None:
    """Run the command.

    Raises:
        ValueError: For whatever the user can mend, in one message.
    """
    quiet()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser = RecipeParser(
        prog="plm portfolio",
        description="Choose few policies that serve everybody, with a certificate, and judge them at every size. "
        "Members are best-of-n policies, or with --policies those of a language model: plm generate --user then writes "
        "by them. The certificate bounds the loss to policies that the same oracle can make, no other; utilities are "
        "plain rewards unless --beta prices KL.",
        parser_mode="omegaconf+",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="Recipe; give several to override one by the next.")
    parser.add_class_arguments(PortfolioRun, as_group=False)
    try:
        config = parser.parse_args(expand(args))
    except OmegaConfBaseException as error:
        parser.error(f"{str(error).splitlines()[0]} (key {error.full_key})")
    except KeyError as error:
        parser.error(str(error.args[0]))
    config.pop("config", None)
    try:
        PortfolioRun(**parser.instantiate(config).as_dict()).run()
    except (ArgumentError, ValueError) as error:
        raise ValueError(shorten(str(error))) from error
