"""Folders of runs: a name that says what ran, claimed by one process, and what a folder of them holds."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace

CLAIMED = "PLM_CLAIMED_RUN"
"""Variable that tells the processes of one run its folder, while it runs."""
_MADE: set[Path] = set()
"""Folders of runs that this process has made."""
_CHECKPOINTS = "checkpoints"
"""Folder of a run in which Lightning keeps its checkpoints."""
_PLAIN_NAMES = ("prefs", "pairs", "data", "train", "preferences")
"""Names of files that say nothing: the folder names the data."""


def run_name(verb: str, method: str, source: dict[str, Any] | None, checkpoint: str | None = None) -> str:
    """What a run is called: ``run-verb`` after the run of its checkpoint, else ``[verb-]method-data-time`` in seconds.

    Args:
        verb: The command; only others than fit are named.
        method: Import path of the class.
        source: ``{class_path, init_args}`` of the pairs.
        checkpoint: Path of the checkpoint; a fit that goes on from one is named by method, data and time.
    """
    if verb != "fit" and checkpoint is not None and (folder := Path(checkpoint).absolute().parent).name == _CHECKPOINTS:
        return f"{folder.parent.name}-{verb}"
    parts = [] if verb == "fit" else [verb]
    parts += [method.rpartition(".")[2], _data_name(source or {})]
    plain = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part).strip("_.").lower() for part in parts if part)
    return f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}"


def _data_name(source: dict[str, Any]) -> str:
    """The file or folder of the pairs, or the class that draws them."""
    path = (source.get("init_args") or {}).get("path")
    first = path[0] if isinstance(path, list) and path else path
    if isinstance(first, str) and first:
        file = Path(first)
        stem = file.name.partition(".")[0]
        return file.parent.name if stem in _PLAIN_NAMES and file.parent.name else stem
    return str(source.get("class_path", "")).rpartition(".")[2].removesuffix("Pairs")


def numbered(name: str) -> Iterator[str]:
    """A name, and what to call further runs of it."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def claim(root: str | Path, names: Iterable[str]) -> Path:
    """Make the folder of a run under the first name that is free; no other process can be given the same.

    Raises:
        ValueError: If none is free, or one is no name of a folder.
    """
    folder = Path(root)
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"expected the name of a folder, got {name!r}; the one above is trainer.default_root_dir")
        folder = Path(root) / name
        while True:
            with suppress(FileExistsError):
                folder.parent.mkdir(parents=True)
                _MADE.add(folder.parent)
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                break
            except FileNotFoundError:  # somebody has just removed the one above, which was empty
                continue
    raise ValueError(f"expected a new run, but {folder} is there; give another name")


def discard_empty(folder: Path) -> None:
    """Remove a claimed folder in which nothing was written, and the one above if it was the first."""
    with suppress(OSError):  # it is not empty
        folder.rmdir()
        if folder.parent in _MADE:
            folder.parent.rmdir()


def keeps_files(logger: Any) -> bool:
    """Whether the configuration of a logger names one that writes files, and not where."""
    return _writes_files(logger) and logger.init_args.get("version") is None


def _writes_files(logger: Any) -> bool:
    """Whether the configuration of a logger names one that writes files into the folder of the run."""
    name = str(getattr(logger, "class_path", "")).rpartition(".")[2]
    return getattr(logger, "init_args", None) is not None and name in ("CSVLogger", "TensorBoardLogger")


def claimed_name() -> str:
    """Name of the run that is going on."""
    return Path(os.environ.get(CLAIMED, "run")).name


def repeatable(config: Namespace) -> Namespace:
    """A recipe without the folder of its run, also one that it named, and without its W&B run: each run has its own."""
    config = config.clone()
    config.name = None
    loggers = config.trainer.get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        arguments = getattr(logger, "init_args", None)
        if arguments is None:
            continue
        is_pinned = CLAIMED not in os.environ or arguments.get("version") != claimed_name()
        if _writes_files(logger) and is_pinned:
            arguments.save_dir = config.trainer.default_root_dir or "."
        for key in ("version", "id"):
            if arguments.get(key) is not None:
                arguments[key] = None
    return config


class RunSummary(NamedTuple):
    """One finished run."""

    folder: Path
    method: str
    data: str
    users: str
    """``unseen`` where the run tested such users, else ``seen``."""
    accuracy: float
    gain: float
    """Accuracy less that of the population's state."""
    gain_low: float
    gain_high: float


def read_runs(root: str | Path) -> list[RunSummary]:
    """Finished runs below a folder, the newest first; what is no run or was not tested is left out.

    Raises:
        ValueError: If there is no such folder.
    """
    if not Path(root).is_dir():
        raise ValueError(f"expected a folder of runs, got {str(root)!r}, which is none")
    files = [file for file in Path(root).rglob("metrics.json") if (file.with_name("recipe.yaml")).is_file()]
    found = []
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        with suppress(KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError):  # files of another program
            found.append(_summary(file))
    return found


def _summary(file: Path) -> RunSummary:
    recipe = yaml.safe_load(file.with_name("recipe.yaml").read_text(encoding="utf-8"))
    metrics = json.loads(file.read_text(encoding="utf-8"))
    users = "unseen" if "unseen" in metrics else "seen"
    numbers = metrics.get(users, {})
    keys = ("accuracy", "personal_minus_global", "personal_minus_global_low", "personal_minus_global_high")
    found = [float("nan") if numbers.get(key) is None else float(numbers[key]) for key in keys]
    data = _data_name((recipe.get("data") or {}).get("source") or {})
    return RunSummary(file.parent, recipe["model"]["class_path"].rpartition(".")[2], data, users, *found)
