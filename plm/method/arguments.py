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
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        if "options_class" in vars(base):
            names |= {field.name for field in dataclasses.fields(vars(base)["options_class"])}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names


def given_arguments(cls: type, values: Mapping[str, Any]) -> list[str]:
    """``name=value`` of the arguments of a constructor that are no defaults, but for mappings."""
    defaults: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            defaults |= {one.name: one.default for one in inspect.signature(vars(base)["__init__"]).parameters.values()}
        if "options_class" in vars(base):
            defaults |= {field.name: field.default for field in dataclasses.fields(vars(base)["options_class"])}
    known = constructor_arguments(cls)
    shown = {name: value for name, value in values.items() if name in known and not isinstance(value, Mapping)}
    return [f"{name}={value!r}" for name, value in shown.items() if defaults.get(name) != value]
