"""Pairs in JSONL, CSV or Parquet files with one row per pair."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from plm.data.schema import PairTable, read_pairs
from plm.data.sources import PairSource


class PairFiles(PairSource):
    """Preference pairs from files with the columns user_id, prompt, chosen and rejected.

    Optional columns: weight, chosen_score, rejected_score, tie, dialogue_id, turn, timestamp, row_split (train, val or
    test) and user_split (seen or unseen; rows with any other value are left out). Prompts and responses are texts or
    chat messages; a prompt may be an empty text, a response may not. Of duplicate rows the first is kept.

    Args:
        path: A file or several, ending in .jsonl, .jsonl.gz, .csv, .csv.gz or .parquet; may hold ``~`` and ``*``. A
            relative path that does not exist here is looked up in the folder named by the PLM_DATA variable.
        columns: Our column name -> the name in the file, where they differ; null leaves an optional column unread.
    """

    def __init__(self, path: str | list[str], columns: dict[str, str | None] | None = None) -> None:
        """See the class."""
        self.path = path
        self.columns = columns

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
        patterns = [self.path] if isinstance(self.path, str) else self.path
        return read_pairs([file for pattern in patterns for file in _expand(pattern)], self.columns)


def _expand(pattern: str) -> list[str]:
    root = os.environ.get("PLM_DATA", "")
    tried = [os.path.expanduser(pattern)]
    if root and not os.path.isabs(tried[0]):
        tried.append(os.path.join(os.path.expanduser(root), tried[0]))
    for candidate in tried:
        files = [candidate] if os.path.isfile(candidate) else sorted(glob.glob(candidate, recursive=True))
        if files:
            return files
    where = f"PLM_DATA is {root!r}" if root else "PLM_DATA is not set"
    raise ValueError(
        f"expected pairs at {pattern!r}, got no such file (looked at {', '.join(map(os.path.abspath, tried))}; {where}"
        "); correct data.source.init_args.path or set PLM_DATA to the folder that holds the data sets"
    )
