"""Which arguments the constructor of a class takes, its bases included."""

from __future__ import annotations

import dataclasses
import inspect


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
