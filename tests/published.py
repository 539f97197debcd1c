"""The published configurations of methods, as the groups of conf/method hold them."""

from pathlib import Path
from typing import Any

import yaml


def published(name: str) -> dict[str, Any]:
    """Constructor arguments of a group."""
    path = Path(__file__).parents[1] / "conf" / "method" / f"{name}.yaml"
    arguments: dict[str, Any] = yaml.safe_load(path.read_text())["model"]["init_args"]
    return arguments
