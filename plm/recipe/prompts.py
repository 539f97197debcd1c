"""Prompts from a file: JSONL, CSV or Parquet with a key ``prompt``, lines of text, or the data of a recipe."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from plm.data.files import FORMATS, read_rows
from plm.data.values import ROW_SPLITS, short, to_prompt
from plm.messages import missing_key


class Prompt(NamedTuple):
    """A prompt and what else its row says."""

    text: str
    """Plain, or chat messages as canonical JSON."""
    record: dict[str, Any]
    """The row as it was read."""


def read_prompts(path: str, *, per_user: bool = False) -> list[Prompt]:
    """Prompts of a file, each once.

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
    return _distinct(read_rows(file, _prompt, '{"prompt": ...}'), path, per_user)


def _prompt(record: dict[str, Any]) -> Prompt:
    """Check one row."""
    if "prompt" not in record:
        raise ValueError(missing_key("prompt", record))
    try:
        if record["prompt"] is None:
            raise ValueError("expected a text or chat messages")
        return Prompt(to_prompt(record["prompt"]), record)
    except ValueError as error:
        raise ValueError(f"prompt: {error}, got {short(record['prompt'])}") from error


def _distinct(prompts: list[Prompt], path: str, per_user: bool) -> list[Prompt]:
    """Each prompt once: a text depends on nothing else."""
    if not prompts:
        raise ValueError(f"expected at least one prompt in {path}, got none")
    kept: dict[tuple[str, str | None], Prompt] = {}
    for prompt in prompts:
        kept.setdefault((prompt.text, str(prompt.record.get("user_id")) if per_user else None), prompt)
    if len(kept) < len(prompts):
        warnings.warn(f"{len(prompts) - len(kept)} repeated prompts of {path} are left out", stacklevel=3)
    return list(kept.values())


def _of_source(path: str) -> list[Prompt]:
    """Prompts of a recipe's pairs; one that pairs of two splits share belongs to the training."""
    from plm.recipe.read import build_source, merged_recipe

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
