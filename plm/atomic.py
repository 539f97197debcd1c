"""Files and folders that appear whole or not at all, and survive a power cut once the call has returned."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date, timedelta
from datetime import time as clock_time
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout


@contextmanager
def whole_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a new file that takes the place of ``path`` when the block ends without an error.

    A reader sees the file before or all of the new one, never a part. The folder is made where it is missing; a block
    that fails leaves the former file as it was. A link is followed, permissions are kept, and what is no file, such as
    a pipe or ``/dev/stdout``, is written to as it is.

    Args:
        path: The file.
        mode: ``wb`` for bytes, ``w`` for UTF-8 text whose line ends are left alone.

    Raises:
        ValueError: If the path is a folder.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ValueError(f"expected the name of a file, got the folder {str(path)!r}")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if path.exists() and not path.is_file():
        with path.open(mode, **text) as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open(mode, **text) as file:
            with suppress(FileNotFoundError):  # there may be none, or no longer
                os.chmod(temporary, path.stat().st_mode & 0o7777)
            yield file
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace(source: Path, target: Path) -> None:
    """Rename a file, or a folder with all that is in it, to ``target``, and make content and rename durable.

    Raises:
        OSError: As `os.replace`; a folder does not replace one that holds something.
    """
    for path in [source, *source.rglob("*")]:
        if path.is_file():
            _to_disk(path)
    os.replace(source, target)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _to_disk(target.parent)


def _to_disk(path: Path) -> None:
    """Wait until what was written to a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def only_writer(lock: Path, message: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file, so that no second process writes the same thing; given back however the block ends.

    Args:
        lock: The file.
        message: What the error says.
        wait: Seconds that the other process is waited for.

    Raises:
        ValueError: With the message, if another process still holds it then.
    """
    held = FileLock(lock, timeout=wait)
    try:
        held.acquire()
    except Timeout:
        raise ValueError(message) from None
    try:
        yield
    finally:
        held.release()


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file as it is, in one step."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, entries: Mapping[str, Any], merge: bool = False) -> None:
    """Write a JSON object in one step; nan and infinities, which JSON does not have, become null.

    Args:
        path: The file.
        entries: What to write.
        merge: Keep the file's other top-level entries.
    """
    path = Path(path)
    kept = json.loads(path.read_text(encoding="utf-8")) if merge and path.is_file() else {}
    write_text(path, json.dumps(_finite({**kept, **entries}), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def json_line(row: Mapping[str, Any]) -> str:
    """One row of results as a line of JSON.

    Half of a character, which has no UTF-8, is escaped. Dates, spans of time and decimal numbers, which Parquet holds,
    become texts; nan and infinities become null.

    Raises:
        ValueError: For a value that JSON cannot hold, such as bytes, with its column.
    """
    try:
        return _strict_json(row)
    except (TypeError, ValueError):  # few rows are looked at number by number
        pass
    try:
        return _strict_json(_finite(row))
    except TypeError as error:
        wrong = next((name for name, value in row.items() if not _fits_json(value)), "?")
        raise ValueError(f"column {wrong!r}: expected values that JSON can hold, {error}; leave it out") from error


def write_csv(path: str | Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file in one step; None becomes an empty cell."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    write_text(path, text.getvalue())


def _strict_json(row: Any) -> str:
    """A line of what every reader of JSON takes; only half of a character makes it escape what is not ASCII."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(row, allow_nan=False, default=_as_text) + "\n"
    return line


def _as_text(value: Any) -> str:
    """What JSON has no type for but a text says in full."""
    if isinstance(value, date | clock_time | timedelta | Decimal):
        return str(value)
    raise TypeError(f"got {type(value).__name__}")


def _fits_json(value: Any) -> bool:
    """Whether a value can be written."""
    try:
        json.dumps(value, default=_as_text)
    except TypeError:
        return False
    return True


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by None; keys stay what they are, for JSON to take or to refuse."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change what mappings, whose keys become texts, and lists inside a value hold, or a value that is neither."""
    if isinstance(value, Mapping):
        return {str(key): map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_leaves(item, change) for item in value]
    return change(value)
