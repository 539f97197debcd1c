"""The parser of recipes and their options: errors are one message with the nearest valid name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, get_args

from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException

from plm.messages import WrongUsage, debug, nearest
from plm.recipe.defaults import expand
from plm.recipe.errors import message_of, shorten

SETTINGS: dict[str, Any] = {"parser_mode": "omegaconf+", "allow_abbrev": False}
"""How every recipe is parsed: references between keys are resolved, options are written out."""

_Built = TypeVar("_Built")


class RecipeParser(LightningArgumentParser):
    """LightningCLI's parser with one-message errors."""

    def parse_or_stop(self, args: Sequence[str]) -> Namespace:
        """Parse a command line; a bad reference or key is `WrongUsage`, too."""
        try:
            return self.parse_args(args)
        except (OmegaConfBaseException, KeyError) as error:
            self.error(message_of(error))

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Check a configuration; a refused key is reported with the nearest accepted one."""
        try:
            super().validate(*args, **kwargs)
        except KeyError as error:
            error.args = (self._near_key(str(error.args[0])),)
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `WrongUsage`: one message with the nearest valid name."""
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        if debug() and ex is not None:
            raise ex
        text = shorten(message)
        unknown = re.match(r"unrecognized arguments: (--?[^\s=]+)", text)
        no_class = re.match(r"([\w.]+): no class '([\w.]+)'", text) or re.match(
            r"([\w.]+): ([\w.]+): (?:No module named|module .* has no attribute)", text
        )
        if unknown:
            text = f"no option {unknown[1]!r}{nearest(unknown[1], self._options())}"
        elif no_class:
            text += self._near_class(no_class[2], self._classes(no_class[1]))
        elif text.startswith("the following arguments are required"):
            text = re.sub(r"\b(fit|validate|test|predict)\.", "", text) + "; give a recipe with --config"
        raise WrongUsage(text) from None

    @staticmethod
    def _near_class(path: str, known: Mapping[str, type]) -> str:
        """The nearest class, by its short name; by its path where the name is right and the module is not."""
        name = path.rpartition(".")[2]
        if name in known:
            return f"; did you mean '{known[name].__module__}.{name}'?"
        return nearest(name, known)

    def _near_key(self, message: str) -> str:
        """Add the nearest accepted key to ``... option 'key' ...``."""
        found = re.search(r"[Oo]ption '([^']+)'", message)
        if not found or "did you mean" in message:
            return message
        parsers = list(self._subparsers_by_name().values()) or [self]
        keys = {action.dest for parser in parsers for action in parser._actions}
        parts = found[1].split(".")
        for depth, part in enumerate(parts):
            prefix = ".".join(parts[:depth])
            siblings = {
                key[len(prefix) :].lstrip(".").split(".")[0]
                for key in keys
                if f"{key}.".startswith(f"{prefix}.".lstrip("."))
            }
            if part not in siblings:
                bad = ".".join(parts[: depth + 1])
                return f"no key {bad!r}{nearest(part, siblings - {''})}"
        return message

    def _subparsers_by_name(self) -> dict[str, argparse.ArgumentParser]:
        """Parsers of the sub-commands."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    def _options(self) -> set[str]:
        """Every option string of this parser and its sub-commands."""
        parsers = [self, *self._subparsers_by_name().values()]
        return {option for parser in parsers for action in parser._actions for option in action.option_strings}

    def _classes(self, key: str) -> dict[str, type]:
        """Short names of the known subclasses accepted by a key."""
        types = [
            getattr(action, "_typehint", None)
            for parser in [self, *self._subparsers_by_name().values()]
            for action in parser._actions
            if action.dest == key
        ]
        return {cls.__name__: cls for root in types for base in _leaves(root) for cls in _subclasses(base)}


def relative_references() -> None:
    """Let references between keys of a recipe start at the recipe, wherever it stands in the configuration."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


def build_from_recipe(cls: type[_Built], args: Sequence[str], *, prog: str, description: str) -> _Built:
    """Build an object whose constructor arguments are the options of a command.

    Args:
        cls: Its class.
        args: Command line; recipes are given by ``--config``.
        prog: Name of the command.
        description: First lines of its help.

    Raises:
        WrongUsage: If an option or a key is unknown or wrong.
        ValueError: If a recipe cannot be read or an argument does not do.
    """
    relative_references()
    parser = RecipeParser(prog=prog, description=description, **SETTINGS)
    parser.add_argument("--config", action="config", help="Recipe; give several to override one by the next.")
    parser.add_class_arguments(cls, as_group=False)
    config = parser.parse_or_stop(expand(args))
    config.pop("config", None)
    try:
        return cls(**parser.instantiate(config).as_dict())
    except (ArgumentError, ValueError) as error:
        raise ValueError(message_of(error)) from error


def _leaves(hint: Any) -> Iterator[type]:
    """Classes inside a type hint."""
    if isinstance(hint, type) and hint is not type(None):
        yield hint
    for argument in get_args(hint):
        yield from _leaves(argument)


def _subclasses(cls: type) -> Iterator[type]:
    """A class and all that derive from it."""
    yield cls
    children: list[type] = type.__subclasses__(cls)
    for child in children:
        yield from _subclasses(child)
