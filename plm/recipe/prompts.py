"""Prompts from a file: JSONL, CSV or Parquet with a key ``prompt``, lines of text, or the data of a recipe."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plm.data.files import FORMATS, read_rows
from plm.data.values import ROW_SPLITS, from_prompt, parsed, to_id, to_prompt
from plm.messages import missing_key
from plm.recipe.read import build_source, merged_recipe


class Prompt(NamedTuple):
    """A prompt and the row it was read from."""

    text: str
    """Plain, or chat messages as canonical JSON."""
    record: dict[str, Any]
    """The row as it was read."""

    @property
    def value(self) -> str | list[dict[str, str]]:
        """The prompt as files of JSON hold it: text, or the list of its messages."""
        return from_prompt(self.text)


def read_prompts(path: str, *, per_user: bool = False) -> list[Prompt]:
    """Read the prompts of a file, each once.

    Args:
        path: JSONL, CSV or Parquet rows with a ``prompt``; a YAML recipe or data group, whose pairs' prompts are taken
            with their split; any other file is text, one prompt a line.
        per_user: Keep a prompt once for each ``user_id`` of its rows.

    Raises:
        ValueError: If it cannot be read, holds no prompt, or rows are malformed; these are named by their lines.
    """
    file = Path(path)
    if file.suffix in (".yaml", ".yml"):
        return _of_source(path)
    if not file.is_file():
        raise ValueError(f"expected a file of prompts, got {path!r}, which does not exist")
    if not file.name.endswith(FORMATS):
        lines = file.read_text(encoding="utf-8").splitlines()
        return _distinct([Prompt(line, {"prompt": line}) for line in lines if line.strip()], path, per_user)
    return _distinct(read_rows(file, prompt_of, '{"prompt": ...}'), path, per_user)


def with_users(
    prompts: Sequence[Prompt], users: Sequence[str] | None, path: str
) -> tuple[list[Prompt], list[str] | None]:
    """Pair prompts with users.

    Args:
        prompts: Prompts of a file.
        users: Ids, each of which gets every prompt; None = the ``user_id`` of the rows.
        path: The file, for messages.

    Returns:
        Prompts, and the user of each; None where no row names one.

    Raises:
        ValueError: If some rows name a user and others do not.
    """
    if users is not None:
        distinct = list(dict.fromkeys(users))
        return [prompt for prompt in prompts for _ in distinct], distinct * len(prompts)
    user_ids = [prompt.record.get("user_id") for prompt in prompts]
    if all(user_id is None for user_id in user_ids):
        return list(prompts), None
    if any(user_id is None for user_id in user_ids):
        raise ValueError(f"expected a user_id in all rows of {path} or in none, got it in some; give --user ID")
    try:
        return list(prompts), [to_id(user_id) for user_id in user_ids]
    except ValueError as error:
        raise ValueError(f"user_id of a row of {path}: {error}") from error


def prompt_of(record: dict[str, Any]) -> Prompt:
    """The prompt of one row.

    Raises:
        ValueError: If it has none.
    """
    if "prompt" not in record:
        raise ValueError(missing_key("prompt", record))
    return Prompt(parsed("prompt", record["prompt"], _prompt_text), record)


def _prompt_text(value: Any) -> str:
    """The text of a prompt, which an empty cell is not."""
    if value is None:
        raise ValueError("expected a text or chat messages")
    return to_prompt(value)


def _distinct(prompts: list[Prompt], path: str, per_user: bool) -> list[Prompt]:
    """Leave out repeated prompts: a text depends on its prompt alone."""
    if not prompts:
        raise ValueError(f"expected at least one prompt in {path}, got none")
    distinct: dict[tuple[str, str | None], Prompt] = {}
    for prompt in prompts:
        distinct.setdefault((prompt.text, str(prompt.record.get("user_id")) if per_user else None), prompt)
    if len(distinct) < len(prompts):
        warnings.warn(f"{len(prompts) - len(distinct)} repeated prompts of {path} are left out", stacklevel=3)
    return list(distinct.values())


def _of_source(path: str) -> list[Prompt]:
    """Read the prompts of a recipe's pairs; one that pairs of two splits share belongs to the training."""
    table = build_source(merged_recipe(path, [])).load()
    splits: dict[int, int] = {}
    for prompt, split in zip(table.prompt.tolist(), table.row_split.tolist(), strict=True):
        splits[prompt] = min(split, splits.get(prompt, split))
    return [
        Prompt(
            table.prompts[row], {"prompt": table.prompts[row]} | ({"split": ROW_SPLITS[split]} if split >= 0 else {})
        )
        for row, split in sorted(splits.items())
    ]


def held_out_prompts(path: str) -> list[str]:
    """Read the prompts of the test where rows have a split, else all.

    Raises:
        ValueError: If the file cannot be read or no prompt belongs to the test.
    """
    prompts = read_prompts(path)
    if all(prompt.record.get("split") is None for prompt in prompts):
        return [prompt.text for prompt in prompts]
    texts = [prompt.text for prompt in prompts if prompt.record.get("split") == "test"]
    if not texts:
        raise ValueError(f"expected prompts of split test in {path}, got none among {len(prompts)}")
    return texts
