"""Which arguments the constructor of a class takes, its bases included."""

from __future__ import annotations

import inspect


def constructor_arguments(cls: type) -> set[str]:
    """Names of the arguments a class takes, with those that it hands on by ``**options`` to the classes after it."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names
