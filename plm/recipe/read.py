"""Read a recipe without Lightning: its merged keys, and the source of pairs that it names."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plm.data.sources import PairSource, source_modules
from plm.recipe.defaults import expand, read_config
from plm.recipe.errors import message_of

_Part = TypeVar("_Part")
_GROUP = {"source": "data", "backbone": "backbone"}
"""Key below ``data`` -> folder of ``conf`` that sets it."""


def merged_recipe(path: str, overrides: list[str], configs: Sequence[str] = ()) -> dict[str, Any]:
    """Merge a recipe with its groups and options; a later class drops the arguments of an earlier one.

    Args:
        path: The recipe.
        overrides: Options as ``key=value``.
        configs: Recipes or groups that win over it.

    Returns:
        Its keys, with references between them resolved.

    Raises:
        ValueError: If a file cannot be read or an interpolation fails.
    """
    merged: dict[str, Any] = {}
    for file in expand([part for config in (path, *configs) for part in ("--config", config)])[1::2]:
        merged = _merge(merged, read_config(Path(file)))
    try:
        config = OmegaConf.merge(OmegaConf.create(merged), OmegaConf.from_dotlist(overrides))
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {message_of(error)}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another, as jsonargparse does with several ``--config``."""
    if "class_path" in new and old.get("class_path", new["class_path"]) != new["class_path"]:
        return new
    both = {
        key: _merge(old[key], new[key]) for key in new if isinstance(old.get(key), dict) and isinstance(new[key], dict)
    }
    return {**old, **new, **both}


def build_source(recipe: dict[str, Any]) -> PairSource:
    """Build the source that a recipe names.

    Raises:
        ValueError: If there is none, or its arguments are wrong.
    """
    for module in source_modules():
        import_module(module)
    return build_part(recipe, "source", PairSource)  # type: ignore[type-abstract]


def split_options(recipe: dict[str, Any]) -> dict[str, Any]:
    """How a recipe divides its pairs, as arguments of `plm.data.splits.split_pairs`; none for what it does not say."""
    data = recipe.get("data") or {}
    names = {"group_by": "group_by", "unseen_users": "unseen_users", "val_rows": "val_rows", "test_rows": "test_rows"}
    names |= {"split_seed": "seed"}
    return {argument: data[name] for name, argument in names.items() if name in data}


def build_part(recipe: dict[str, Any], name: str, base: type[_Part]) -> _Part:
    """Build a part of the data that a recipe names.

    Args:
        recipe: Its merged keys.
        name: Key below ``data``: source or backbone.
        base: What it is one of.

    Raises:
        ValueError: If there is none, or its arguments are wrong.
    """
    spec = (recipe.get("data") or {}).get(name)
    if not spec:
        raise ValueError(f"expected data.{name} in the recipe, got none; add a {_GROUP[name]} group to its defaults")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, f"data.{name}", required=True)
    try:
        built = parser.instantiate(parser.parse_object({"data": {name: spec}})).data[name]
    except (ArgumentError, KeyError) as error:
        raise ValueError(message_of(error)) from error
    assert isinstance(built, base) and not inspect.isabstract(type(built))
    return built
