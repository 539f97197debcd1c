"""Files of a corpus, from a folder or from the Hugging Face hub, as rows with the columns a protocol needs."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from plm.data.files import position, read_records
from plm.hub import offline_options
from plm.messages import nearest

HUB = "hf://datasets/"
"""What the address of a dataset of the hub begins with."""
PARQUET = "refs/convert/parquet"
"""Revision of every dataset of the hub that holds it as ``<config>/<split>/*.parquet``."""


def local_files(pattern: str | Sequence[str]) -> list[str]:
    """Files that match a path, or several; relative ones are also looked up in the folder named by PLM_DATA.

    A folder that the ``datasets`` library has saved stands for its files, ``hf://datasets/OWNER/NAME`` for the training
    split of a dataset of the hub, and ``hf://datasets/OWNER/NAME/PATTERN`` for files of its repository.

    Raises:
        ValueError: If a path matches none, or the hub cannot be reached.
    """
    if not isinstance(pattern, str):
        return [file for path in pattern for file in local_files(path)]
    if pattern.startswith(HUB):
        return _hub_files(pattern)
    root = os.environ.get("PLM_DATA", "")
    tried = [os.path.expanduser(pattern)]
    if root and not os.path.isabs(tried[0]):
        tried.append(os.path.join(os.path.expanduser(root), tried[0]))
    for candidate in tried:
        files = [candidate] if os.path.isfile(candidate) else sorted(glob.glob(candidate, recursive=True))
        if files:
            return [part for file in files for part in _saved_parts(file)]
    where = f"PLM_DATA is {root!r}" if root else "PLM_DATA is not set"
    raise ValueError(
        f"expected data at {pattern!r}, got no such file (looked at {', '.join(map(os.path.abspath, tried))}; {where}"
        "); correct the path, or set PLM_DATA to the folder that holds the data sets"
    )


def _hub_files(path: str) -> list[str]:
    """Files of a dataset of the hub, downloaded."""
    owner, _, rest = path.removeprefix(HUB).partition("/")
    name, _, pattern = rest.partition("/")
    if not owner or not name:
        raise ValueError(f"expected {HUB}OWNER/NAME or {HUB}OWNER/NAME/FILES, got {path!r}")
    option = "name the files instead"
    if pattern:
        return corpus_files(None, f"{owner}/{name}", pattern, option=option)
    files = corpus_files(None, f"{owner}/{name}", "*/train/*.parquet", PARQUET, option)
    configs = sorted({Path(file).parts[-3] for file in files})
    if len(configs) > 1:
        raise ValueError(
            f"expected one configuration in the dataset {owner}/{name}, got {', '.join(configs)}; name the files of "
            f"one as they stand in its repository, such as {path}/FOLDER/*.parquet"
        )
    return files


def _saved_parts(path: str) -> list[str]:
    """The files of a folder that the ``datasets`` library has saved; any other path as it is.

    Raises:
        ValueError: If it holds several splits, or rows in another order than the files.
    """
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").is_file())
        if len(splits) != 1:
            raise ValueError(f"{path}: expected one split, got {', '.join(splits)}; name one of these folders")
        folder = folder / splits[0]
    state = folder / "state.json"
    if not state.is_file():
        return [path]
    saved = json.loads(state.read_text(encoding="utf-8"))
    if saved.get("_indices_files"):
        raise ValueError(f"{path}: expected rows in the order of the files; save dataset.flatten_indices() instead")
    return [str(folder / part["filename"]) for part in saved.get("_data_files", [])]


def corpus_files(
    path: str | None,
    repo: str,
    pattern: str,
    revision: str = "main",
    option: str = "set data.source.init_args.path to its folder",
) -> list[str]:
    """Files of a dataset of the hub: in a folder where there is one, else downloaded (and kept by the hub's cache).

    Args:
        path: Folder with the layout of the dataset's repository; None = ``OWNER/NAME`` in the folder named by PLM_DATA.
        repo: Id of the dataset on the hub.
        pattern: Which files, such as ``default/train/*.parquet``.
        revision: Branch or commit of the hub.
        option: How the user gives downloaded files, for the error message.

    Raises:
        ValueError: If there are no such files, or the hub cannot be reached.
    """
    if path is not None:
        return local_files(os.path.join(path, pattern))
    if root := os.environ.get("PLM_DATA"):
        files = sorted(glob.glob(os.path.join(glob.escape(os.path.expanduser(root)), repo, pattern)))
        if files:
            return files
    instead = f"or download {pattern} of {repo} (revision {revision}) into {repo} below PLM_DATA, or {option}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"{repo} is read from the hub: pip install huggingface_hub, {instead}") from error
    try:
        folder = snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=[pattern], **offline_options()
        )
    except Exception as error:  # no network, a gated dataset, a wrong token: the hub's client has many ways to fail
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"the dataset {repo} cannot be downloaded ({reason}); go online (for a gated one: accept its terms and "
            f"`hf auth login`), {instead}"
        ) from error
    files = sorted(glob.glob(os.path.join(folder, pattern)))
    if not files:
        raise ValueError(f"expected {pattern} in the dataset {repo} (revision {revision}), got no such file; {instead}")
    return files


def corpus_rows(files: Sequence[str], columns: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of JSONL, JSON, CSV (all also .gz) or Parquet files.

    Args:
        files: Their paths.
        columns: Our name -> name in the files; a trailing ``?`` marks one that may be missing (then None).

    Returns:
        One dict per row, with exactly our names.

    Raises:
        ValueError: If a file cannot be read or a column is in no row; the near name is given.
    """
    wanted = {name: column.removesuffix("?") for name, column in columns.items()}
    rows: list[dict[str, Any]] = []
    for file in files:
        present, records = _read(file, list(dict.fromkeys(wanted.values())))
        missing = [column for name, column in wanted.items() if column not in present and columns[name] == column]
        if missing:
            near = nearest(missing[0], present)
            raise ValueError(f"{file}: expected the columns {missing}, got {present}{near}")
        rows += [{name: record.get(column) for name, column in wanted.items()} for record in records]
    return rows


def _read(file: str, wanted: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of all columns of a file, and its rows."""
    if file.endswith(".parquet"):
        present = list(pq.read_schema(file).names)
        table = pq.read_table(file, columns=[name for name in wanted if name in present])
        return present, table.to_pylist()
    records = read_records(Path(file))
    if records.problems:
        number, text = records.problems[0]
        raise ValueError(f"{position(file, number)}: {text}")
    return records.names, records.rows


def of_active_users(pairs: Sequence[dict[str, Any]], min_pairs: int) -> list[dict[str, Any]]:
    """The pairs of users who have at least ``min_pairs``."""
    count = Counter(pair["user_id"] for pair in pairs)
    return [pair for pair in pairs if count[pair["user_id"]] >= min_pairs]


def usable(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Leave out pairs that every corpus has a few of: an empty response, or twice the same text.

    Only texts are judged: anything else, such as a list of responses, is kept for validation to refuse.

    Returns:
        The other pairs, and how many were left out under ``empty`` and ``same_text``.
    """
    kept: list[dict[str, Any]] = []
    dropped = {"empty": 0, "same_text": 0}
    for row in rows:
        chosen, rejected = row["chosen"], row["rejected"]
        if any(text is None or (isinstance(text, str) and not text.strip()) for text in (chosen, rejected)):
            dropped["empty"] += 1
        elif chosen == rejected:
            dropped["same_text"] += 1
        else:
            kept.append(row)
    return kept, {why: count for why, count in dropped.items() if count}
