"""Short error messages: what was wrong in a recipe or option, and the nearest valid name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, get_args

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

from plm.messages import debug, nearest


def shorten(message: str) -> str:
    r"""Reduce jsonargparse's report on every branch of a union to what the user can act on; other messages stay.

    Example:
        >>> shorten("Parser key \"lr\":\n  Expected a <class 'float'>. Got value: x")
        "lr: expected float, got 'x'"
        >>> shorten("Parser key \"mode\":\n  Expected a typing.Literal['shared', 'per_user']. Got value: share")
        "mode: expected one of shared, per_user, got 'share'; did you mean 'shared'?"
    """
    if "Parser key" not in message and "Union subtypes" not in message:
        return message
    text = message
    while "Errors:\n" in text:
        head, _, rest = text.rpartition("Errors:\n")
        rest = re.split(r"\s*Given value type:", rest)[0]
        rest = re.sub(r"\s*Subclass types expect one of:(\n\s+- a .*)+", "", rest)
        branches = [branch.strip() for branch in re.split(r"^\s*- ", rest, flags=re.M)]
        useful = [b for b in branches if b and not re.match(r"Expected a <class 'NoneType'>|Not a valid subclass", b)]
        head = re.sub(r"(- )?Does not validate against any of the Union subtypes\s+Subtypes: .*\n\s*$", "", head)
        text = head + "; or ".join(dict.fromkeys(useful))
    text = re.sub(r"- Expected a path but .* either not accessible or invalid", "", text)
    text = re.sub(r"(- )?Parser key \"([^\"]+)\":", r"\2:", text)
    text = re.sub(r"Problem with given class_path '([^']+)':", r"\1:", text)
    text = re.sub(r"Expected a typing\.Literal\[([^\]]*)\]\. Got value: (.*)", _not_among, text)
    text = re.sub(r"Expected an? (?:<class '([^']+)'>|(\S+))\. Got value: (.*)", r"expected \1\2, got '\3'", text)
    text = re.sub(r"(- )?Expected a dot import path string: (\S+)", r"no class '\2'", text)
    return " ".join(text.split())


def _not_among(found: re.Match[str]) -> str:
    """What is said of a value that is none of the few that there are."""
    choices, value = re.findall(r"'([^']*)'", found[1]), found[2]
    return f"expected one of {', '.join(choices)}, got {value!r}{nearest(value, choices)}"


class RecipeParser(LightningArgumentParser):
    """LightningCLI's parser with one-message errors."""

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Check a configuration; a refused key is reported with the nearest accepted one."""
        try:
            super().validate(*args, **kwargs)
        except KeyError as error:
            error.args = (self._near_key(str(error.args[0])),)
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Show one message with the nearest valid name, and exit with status 2."""
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
        self.exit(2, f"error: {text}\n")

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
