"""What a cell of a row holds: values inside values, and lists that a table keeps as text."""

from __future__ import annotations

import ast
import json
from typing import Any


def value_at(value: Any, path: str) -> Any:
    """The value under a column's name, or under the names on the way to it, joined by dots; None where there is none.

    Example:
        >>> value_at({"answers": [{"text": "a"}, {"text": "b"}]}, "answers.text")
        ['a', 'b']
    """
    value = printed_list(value)
    if isinstance(value, list):
        return [value_at(entry, path) for entry in value]
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    name, dot, rest = path.partition(".")
    return value_at(value[name], rest) if dot and name in value else None


def printed_list(value: Any) -> Any:
    """The list or object that a text prints, as JSON or in Python's way; any other value as it is.

    Example:
        >>> printed_list("['response-0']"), printed_list("[sic] a text"), printed_list("['a' 'b']")
        (['response-0'], '[sic] a text', "['a' 'b']")
    """
    if not isinstance(value, str) or not value.startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        inside = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value
    return inside if repr(inside) == value else value  # in ['a' 'b'] two texts would become one
