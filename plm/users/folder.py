"""Reads the folder of users that earlier versions of plm kept beside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file

from plm.types import UserState

_INDEX = "index.json"
_FORMAT = 1


class FormerStore(NamedTuple):
    """What the folder holds."""

    shared_hash: str
    user_ids: list[str]
    state: UserState


def read_folder(folder: Path) -> FormerStore | None:
    """Read a folder with ``index.json`` and the safetensors file that it names; None if it is no such folder.

    Raises:
        ValueError: If it is damaged, or of another format.
    """
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"the users in the folder {str(folder)!r} cannot be read: {error!r}") from error
    try:
        if index["format"] != _FORMAT:
            raise ValueError(f"format {index['format']!r}, expected {_FORMAT}")
        tensors = load_file(folder / Path(index["tensors"]).name)
        num_pairs = tensors.pop("num_pairs")
        named = {name.removeprefix("state."): value for name, value in tensors.items()}
        ids = index["user_ids"]
        if not isinstance(ids, list) or not all(isinstance(user_id, str) for user_id in ids):
            raise ValueError("expected user ids that are texts")
        if len({*ids}) != len(ids) or any(len(value) != len(ids) for value in [num_pairs, *named.values()]):
            raise ValueError("expected one state per distinct user id")
        return FormerStore(str(index["shared_hash"]), ids, UserState(named, num_pairs))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the users in the folder {str(folder)!r} cannot be read: {error!r}") from error
