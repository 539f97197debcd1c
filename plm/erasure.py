"""Remove users from everything that a run keeps of them, and name what still speaks of them.

A run keeps users in the store beside its checkpoint, as rows of the tables in its checkpoints, from which ``plm test``,
``plm predict`` and a resumed fit go on, and by name in its files.
"""

from __future__ import annotations

import codecs
import csv
import json
import mmap
import re
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from plm.atomic import whole_file, write_csv, write_json
from plm.checkpoint import NOBODY, find_class, read_checkpoint
from plm.method import CHECKPOINT_KEY
from plm.users import Receipt, UserStore, store_path
from plm.users.database import FACTS

PAIRS_FOLDER = "pairs"
"""Folder beside the runs in which `plm.fitting.fit` keeps tables of pairs."""
_FILES = ("per_user.csv", "predictions*.csv", "users.csv", "splits.json", "portfolio.json", "*skipped.ndjson")
"""What runs and portfolios write with ids in it."""
_YAML = ("recipe.yaml", "hparams.yaml", "validate.yaml", "test.yaml", "predict.yaml")
_NUMBERS = (*_YAML, "metrics.csv", "metrics.json", "facts.json")
"""Text that runs write, whose numbers are measures and settings."""
MIN_LENGTH = 6
"""Characters of an id from which on it does not occur in other bytes, such as a picture's, by chance."""


class Erasure(NamedTuple):
    """What was done, and what was not."""

    receipts: list[Receipt]
    """One for each user."""
    changed: list[Path]
    """Files from which a user was removed."""
    remaining: list[Path]
    """Files of the run, and tables of pairs beside it, that still hold the id of one."""
    short: list[str]
    """Ids below `MIN_LENGTH`: of binary files, only checkpoints, databases and tables were read for them."""


def erase_users(ckpt_path: str | Path, user_ids: Sequence[str], users: str | Path | None = None) -> Erasure:
    """Remove users from the store, the checkpoints of the folder and the files of the run, also those of its tests.

    It may be repeated, also for ids that nobody knows: what a call that was killed has left is done by the next.

    Args:
        ckpt_path: A checkpoint of the run.
        user_ids: Whom.
        users: Where the store is, if not beside the checkpoint.

    Raises:
        ValueError: If the checkpoint or the store cannot be read or written.
    """
    path = Path(ckpt_path)
    read_checkpoint(path)
    receipts = UserStore(store_path(path) if users is None else users).delete(user_ids)
    folder = path.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    beside = _evaluations(run) if run != folder else []
    named = [file for place in (run, *beside) for pattern in _FILES for file in sorted(place.glob(pattern))]
    changed = [file for file in sorted(folder.glob("*.ckpt")) if file.is_file() and _erase_rows(file, user_ids)]
    changed += [file for file in named if _erase_names(file, user_ids)]
    files = [*run.rglob("*")] if run != folder else [*folder.glob("*")]
    files += [file for place in beside for file in place.rglob("*")]
    quoting = {*named, *(file for file in files if file.name in _NUMBERS)}
    remaining = [file for file in sorted(files) if _holds(file, user_ids, quoting)]
    tables = sorted((run.parent / PAIRS_FOLDER).glob("*.parquet"))
    remaining += [file for file in tables if _has_cell(file, user_ids)]
    return Erasure(receipts, changed, remaining, sorted({name for name in user_ids if len(name) < MIN_LENGTH}))


def _evaluations(run: Path) -> list[Path]:
    """Folders beside a run in which ``plm validate``, ``test`` and ``predict`` write about its checkpoints."""
    name = re.compile(rf"{re.escape(run.absolute().name)}-(?:validate|test|predict)(?:-\d+)?")
    folders = (folder for folder in sorted(run.absolute().parent.iterdir()) if name.fullmatch(folder.name))
    return [folder for folder in folders if folder.is_dir() and not (folder / "recipe.yaml").exists()]


def _has_cell(path: Path, user_ids: Collection[str]) -> bool:
    """Whether an id is a cell of a Parquet file."""
    table = pq.read_table(path)
    columns = [
        column for column in table.columns if pa.types.is_string(column.type) or pa.types.is_integer(column.type)
    ]
    wanted = pa.array(sorted(user_ids))
    return any(pc.any(pc.is_in(column.cast(pa.string()), wanted)).as_py() for column in columns)


def _erase_rows(path: Path, user_ids: Collection[str]) -> bool:
    """Overwrite the rows of users in a checkpoint, those of the optimizer too; whether there were any."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        metadata = checkpoint[CHECKPOINT_KEY]
        ids: list[str] = metadata["user_ids"]
    except Exception:  # not a checkpoint of plm: if it holds an id, it is named as a file that remains
        return False
    rows = [row for row, user_id in enumerate(ids) if user_id in set(user_ids)]
    if not rows:
        return False
    names = metadata.get("user_tables", ())
    tables = [checkpoint["state_dict"][name] for name in names or find_class(metadata["class_path"]).user_tables]
    shapes = {(len(ids),), *(table.shape for table in tables)}
    moments = [value for optimizer in checkpoint.get("optimizer_states", ()) for value in _tensors(optimizer["state"])]
    for table in [*tables, *(moment for moment in moments if moment.shape in shapes)]:
        table[rows] = 0
    metadata["user_ids"] = [NOBODY if row in rows else user_id for row, user_id in enumerate(ids)]
    with whole_file(path) as file:
        torch.save(checkpoint, file)
    return True


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of nested dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _erase_names(path: Path, user_ids: Collection[str]) -> bool:
    """Remove rows of CSV, lines of JSON, or ids and what stands under them in a JSON file; whether there were any."""
    if path.suffix == ".json":
        before = json.loads(path.read_text(encoding="utf-8"))
        after = _without(before, set(user_ids))
        if after != before:
            write_json(path, after)
        return bool(after != before)
    if path.suffix == ".ndjson":
        lines, pattern = path.read_bytes().splitlines(keepends=True), _pattern(user_ids)
        others = [line for line in lines if not pattern.search(line)]
        if len(others) < len(lines):
            with whole_file(path) as file:
                file.writelines(others)
        return len(others) < len(lines)
    with path.open(encoding="utf-8", newline="") as file:
        columns, *rows = csv.reader(file)
    place = columns.index("user_id")
    kept = [row for row in rows if row[place] not in user_ids]
    if len(kept) < len(rows):
        write_csv(path, columns, kept)
    return len(kept) < len(rows)


def _without(value: Any, user_ids: set[str]) -> Any:
    """A JSON value without entries of lists, and keys of objects, that are ids."""
    if isinstance(value, dict):
        return {key: _without(part, user_ids) for key, part in value.items() if key not in user_ids}
    if isinstance(value, list):
        return [_without(part, user_ids) for part in value if not (isinstance(part, str) and part in user_ids)]
    return value


def _holds(path: Path, user_ids: Collection[str], quoting: Collection[Path]) -> bool:
    """Whether a file holds an id as a word of its own, as it is or as JSON writes it, or in binary files as a value.

    Args:
        path: The file.
        user_ids: Whom.
        quoting: Files in which an id that is a number stands in quotes, and other numbers are something else.
    """
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if not _is_text(data[:_HEAD]):
            long = [user_id for user_id in user_ids if len(user_id) >= MIN_LENGTH]
            if long and _pattern(long).search(data):
                return True
            return len(long) < len(user_ids) and _has_value(path, user_ids)
        numbers = [user_id for user_id in user_ids if _is_number(user_id)]
        if not numbers or path not in quoting:
            return _pattern(user_ids).search(data) is not None
        words = [user_id for user_id in user_ids if user_id not in numbers]
        quoted = b"|".join(re.escape(user_id.encode()) for user_id in numbers)
        found = re.search(rb"([\"'])(?:" + quoted + rb")\1", data)
        return found is not None or (bool(words) and _pattern(words).search(data) is not None)


_HEAD = 1 << 16


def _is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are UTF-8 without zeros; the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _is_number(user_id: str) -> bool:
    try:
        float(user_id)
    except ValueError:
        return False
    return True


def _has_value(path: Path, user_ids: Collection[str]) -> bool:
    """Whether an id is a user of a checkpoint, a cell of a Parquet file, or a text in an SQLite database."""
    try:
        if path.suffix == ".parquet":
            return _has_cell(path, user_ids)
        if path.suffix == ".ckpt":
            metadata = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[CHECKPOINT_KEY]
            return not set(user_ids).isdisjoint(metadata["user_ids"])
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            rows = (
                row
                for (table,) in tables
                if table != FACTS.name
                for row in database.execute(f'SELECT * FROM "{table}"')
            )
            return any(value in user_ids for row in rows for value in row if isinstance(value, str))
    except Exception:  # damaged, or no such file: nothing can be told of a short id
        return False


def _pattern(user_ids: Collection[str]) -> re.Pattern[bytes]:
    """Ids as words of their own, as they are, as JSON writes them, and as JSON writes lines of JSON.

    Digits of a longer number, such as 1 in 2.1, are no word.
    """
    once = {user_id: json.dumps(user_id)[1:-1] for user_id in user_ids}
    forms = {form for user_id, text in once.items() for form in (user_id, text, json.dumps(text)[1:-1])}
    words = b"|".join(re.escape(form.encode("utf-8", "surrogatepass")) for form in sorted(forms))
    return re.compile(rb"(?<![\w-])(?<!\d\.)(?:" + words + rb")(?![\w-]|\.\d)")
