"""Which arguments the constructor of a class takes, its bases included."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any


def constructor_arguments(cls: type) -> set[str]:
    """Names of the arguments a class takes, with those that it hands on by ``**options``.

    They go to the classes after it, and to the dataclass that it names as ``options_class``.
    """
    return set(_defaults(cls))


def _defaults(cls: type) -> dict[str, Any]:
    """Arguments of a class, as of `constructor_arguments` -> default, or an object that stands for none."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        named = {one.name: one.default for one in parameters if one.kind is not one.VAR_KEYWORD}
        if "options_class" in vars(base):
            named |= {field.name: field.default for field in dataclasses.fields(vars(base)["options_class"])}
        found = named | found  # of two the first counts
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def given_arguments(cls: type, values: Mapping[str, Any]) -> list[str]:
    """``name=value`` of the arguments of a constructor that are no defaults, but for mappings."""
    defaults = _defaults(cls)
    shown = {name: value for name, value in values.items() if name in defaults and not isinstance(value, Mapping)}
    return [f"{name}={value!r}" for name, value in shown.items() if defaults[name] != value]
