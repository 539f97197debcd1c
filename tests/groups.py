"""The groups of conf/method as arguments, so that tests read what recipes read."""

from __future__ import annotations

from typing import Any

from plm.recipe.defaults import read_config, shipped


def method_options(name: str) -> dict[str, Any]:
    """The ``init_args`` of ``conf/method/<name>.yaml``."""
    options: dict[str, Any] = read_config(shipped("conf") / "method" / f"{name}.yaml")["model"]["init_args"]
    return options
