"""Short messages for what jsonargparse and OmegaConf report of a recipe."""

from __future__ import annotations

import re

from omegaconf.errors import OmegaConfBaseException

from plm.messages import nearest


def message_of(error: Exception) -> str:
    """Say what was wrong in a recipe or option: one line where the error is about values, references or keys."""
    if isinstance(error, OmegaConfBaseException):
        return f"{str(error).splitlines()[0]} (key {error.full_key})"
    return str(error.args[0]) if isinstance(error, KeyError) else shorten(str(error))


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


def _not_among(match: re.Match[str]) -> str:
    """Say which values there are, and which of them may be meant."""
    choices, value = re.findall(r"'([^']*)'", match[1]), match[2]
    return f"expected one of {', '.join(choices)}, got {value!r}{nearest(value, choices)}"
