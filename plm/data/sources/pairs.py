"""Pairs in JSONL, CSV or Parquet files with one row per pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plm.data.schema import PairTable, read_pairs
from plm.data.sources import PairSource
from plm.data.sources.corpus import local_files


class PairFiles(PairSource):
    """Preference pairs from files with the columns user_id, prompt, chosen and rejected.

    Optional columns: weight, chosen_score, rejected_score, tie, dialogue_id, turn, timestamp, row_split (train, val or
    test) and user_split (seen or unseen; rows with any other value are left out). Prompts and responses are texts or
    chat messages; a prompt may be an empty text, a response may not. Of duplicate rows the first is kept.

    Where the file has two responses and a column that names the preferred one, as tools of annotation write, say so:
    ``columns: {chosen: response_a, rejected: response_b}`` with ``winner: {column: preferred, left: A, right: B}``. A
    file with such a column that nothing reads is refused. Users and winners may be lists of one length: as many pairs.

    A row may hold ``responses`` and their ``ratings``, two lists, instead of chosen and rejected: all pairs of them,
    the higher rating chosen, equal ones a tie, with the weight of one pair in all.

    Args:
        path: A file or several, ending in .jsonl, .json, .csv (all also .gz) or .parquet; may hold ``~`` and ``*``. A
            relative path that does not exist here is looked up in the folder named by the PLM_DATA variable.
        columns: Our column name -> the name in the file, where they differ, with dots on the way to a part of a value;
            null leaves an optional column unread.
        winner: ``column`` names the preferred response, null = none does. ``left``, ``right`` and ``tie``: its labels,
            one or a list each, for the response of ``chosen``, of ``rejected``, and for neither; not needed for left,
            right, tie, a, b, model_a, model_b and the names of the two columns.
    """

    def __init__(
        self,
        path: str | list[str],
        columns: dict[str, str | None] | None = None,
        winner: dict[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.columns = columns
        self.winner = winner

    @property
    def name(self) -> str:
        """Folder and file name of the first path."""
        first = Path(self.path if isinstance(self.path, str) else self.path[0] if self.path else "none")
        return "/".join(first.parts[-2:])

    def load(self) -> PairTable:
        """Read and validate all files.

        Raises:
            ValueError: If a path matches no file, or with all malformed rows (see ``read_pairs``).
        """
        return read_pairs(local_files(self.path), self.columns, self.winner)
