"""Read a recipe without Lightning: its merged keys, and the source of pairs that it names."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plm.data.sources import PairSource, source_modules
from plm.recipe.defaults import expand, read_config
from plm.recipe.errors import message_of


def merged_recipe(path: str, overrides: list[str]) -> dict[str, Any]:
    """Merge a recipe with its groups and options; a later class drops the arguments of an earlier one.

    Args:
        path: The recipe.
        overrides: Options as ``key=value``.

    Returns:
        Its keys, with references between them resolved.

    Raises:
        ValueError: If a file cannot be read or an interpolation fails.
    """
    merged: dict[str, Any] = {}
    for file in expand(["--config", path])[1::2]:
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
    spec = (recipe.get("data") or {}).get("source")
    if not spec:
        raise ValueError("expected data.source in the recipe, got none; add a data group to its defaults")
    for module in source_modules():
        import_module(module)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PairSource, "data.source", required=True)
    try:
        built = parser.instantiate(parser.parse_object({"data": {"source": spec}})).data.source
    except (ArgumentError, KeyError) as error:
        raise ValueError(message_of(error)) from error
    assert isinstance(built, PairSource) and not inspect.isabstract(type(built))
    return built
