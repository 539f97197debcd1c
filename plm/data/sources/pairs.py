"""Pairs in JSONL, CSV or Parquet files with one row per pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from plm.atomic import map_leaves
from plm.data.schema import PairTable, read_pairs
from plm.data.sources import PairSource
from plm.data.sources.corpus import local_files


class PairFiles(PairSource):
    """Preference pairs from files with the columns user_id, prompt, chosen and rejected, or in another layout.

    Optional columns: weight, chosen_score, rejected_score, tie, dialogue_id, turn, timestamp, row_split (train, val or
    test) and user_split (seen or unseen; rows with any other value are left out). Prompts and responses are texts or
    chat messages; a prompt may be an empty text, a response may not. Of duplicate rows the first is kept.

    Instead of chosen and rejected a row may have several graded responses: ``responses`` with their ``ratings`` (higher
    is better) or ``ranking`` (1 is the best), or ``best_first``; or one ``response`` with its ``rating`` or ``rank``,
    where the rows of a user and a prompt belong together. All pairs are taken, equal grades as a tie, with the weight
    of one pair in all. docs/data.md shows every layout.

    Args:
        path: A file or several, ending in .jsonl, .json, .csv (all also .gz), .parquet or .arrow; may hold ``~`` and
            ``*``. A relative path that does not exist here is looked up in the folder named by the PLM_DATA variable.
            Also a folder saved by ``datasets``, or ``hf://datasets/OWNER/NAME`` on the hub.
        columns: Our column name -> the name in the file, where they differ, with dots on the way to a part of a value;
            null leaves a column unread. ``user_id: null``: no users are told apart; ``prompt: null``: the prompt is
            what both conversations share.
        winner: ``column`` names the preferred response, null = none does. ``left``, ``right`` and ``tie``: its labels,
            one or a list each, for the response of ``chosen``, of ``rejected``, and for neither; not needed for left,
            right, tie, a, b, model_a, model_b and the names of the two columns.
        attributes: Columns whose weighted sum is the rating -> weight.
        layout: A known layout, such as argilla, helpsteer2 or nectar; the other options go before what it says.
        on_error: What a malformed row does: ``stop``, or ``skip``, which leaves it out and counts it. A fit writes what
            it skipped into ``skipped.ndjson`` of its run.
    """

    def __init__(
        self,
        path: str | list[str],
        columns: dict[str, str | None] | None = None,
        winner: dict[str, Any] | None = None,
        attributes: dict[str, float] | None = None,
        layout: str | None = None,
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.path, self.columns, self.winner, self.attributes, self.layout = path, columns, winner, attributes, layout
        self.on_error: Literal["stop", "skip"] = on_error

    @property
    def name(self) -> str:
        """Folder and file name of the first path."""
        first = Path(self.path if isinstance(self.path, str) else self.path[0] if self.path else "none")
        return "/".join(first.parts[-2:])

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments that say which columns are read; those that are None are left out."""
        names = ("columns", "winner", "attributes", "layout")
        return {name: map_leaves(value, _plain) for name in names if (value := getattr(self, name))}

    def load(self) -> PairTable:
        """Read and validate all files.

        Raises:
            ValueError: If a path matches no file, or with all malformed rows (see ``read_pairs``).
        """
        return read_pairs(
            local_files(self.path), self.columns, self.winner, self.attributes, self.layout, self.on_error
        )


def _plain(value: Any) -> Any:
    """A value as checkpoints hold it: numbers of NumPy are Python's, dates their texts."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, str | int | float | None) else str(value)
