"""Folders of runs: a name that says what ran, claimed by one process, and what a folder of them holds."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

import plm
from plm.messages import plain

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
    return _text(source.get("class_path")).rpartition(".")[2].removesuffix("Pairs")


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


def provenance() -> dict[str, str]:
    """Date, version of plm, and what ``git describe`` says of the working folder, ``unknown`` where it says nothing."""
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        told = subprocess.run(describe, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a repository too large to look through
        told = ""
    date = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"date": date, "commit": told or "unknown", "plm": plm.__version__}


@dataclass(frozen=True)
class RunSummary:
    """What the folder of a run holds; texts are without control characters, whatever the files say."""

    folder: Path
    name: str
    """The folder, seen from the folder of all runs."""
    method: str = ""
    data: str = ""
    split: str = ""
    """Hash of the split; runs of one split have the same test pairs."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """``date``, ``commit``, ``plm`` and ``fit_seconds``, where the run says so."""
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """``unseen`` and ``seen``, where tested -> number of `plm.evaluation.summarize` -> its value, nan if it is none."""
    verdicts: Sequence[str] = ()
    few_shot: Mapping[str, Any] | None = None
    problems: Sequence[str] = ()
    """What is missing or damaged."""

    @property
    def users(self) -> str:
        """``unseen`` where the run tested such users, else ``seen``; empty for a run that was not tested."""
        return next(iter(self.numbers), "")


def read_runs(root: str | Path) -> list[RunSummary]:
    """All runs below a folder, the newest first, also those that are damaged, unfinished or were not tested.

    A run is a folder with ``recipe.yaml``, ``metrics.json`` or ``checkpoints``, or an empty one directly below.

    Raises:
        ValueError: If there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"expected a folder of runs, got {str(root)!r}, which is none")
    found: list[RunSummary] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(root, followlinks=True):
        folder = Path(place)
        real = os.path.realpath(folder)
        if real in seen:  # a link back, or to another run
            folders.clear()
            continue
        seen.add(real)
        is_claimed = folder.parent == root and not folders and not files
        if folder != root and (is_claimed or {"recipe.yaml", "metrics.json", _CHECKPOINTS} & {*folders, *files}):
            found.append(_summary(folder, root))
            folders.clear()
    return sorted(found, key=lambda run: (_when(run), run.folder), reverse=True)


def _when(run: RunSummary) -> float:
    """When a run was fitted, or its folder was last changed where it does not say so: seconds since 1970."""
    try:
        return datetime.fromisoformat(str(run.facts.get("date"))).timestamp()
    except (ValueError, OverflowError, OSError):  # no date, or one that no calendar holds
        return run.folder.stat().st_mtime


def _summary(folder: Path, root: Path) -> RunSummary:
    """Read one run; whatever cannot be read is a problem of its own."""
    name = plain(str(folder.relative_to(root)))
    if not any(folder.iterdir()):
        return RunSummary(folder, name, problems=["nothing was written: it has just begun, or was killed"])
    problems: list[str] = []
    file = "test.yaml" if (folder / "test.yaml").is_file() else "recipe.yaml"
    recipe = _mapping(folder / file, problems)
    path = _part(recipe, "model").get("class_path")
    if recipe and not isinstance(path, str):
        problems.append(f"{file} names no method")
    metrics = _mapping(folder / "metrics.json", problems, "it runs still, was stopped, or was not tested")
    numbers: dict[str, Mapping[str, float]] = {}
    for users in ("unseen", "seen"):
        if users in metrics:
            numbers[users] = {key: _number(value) for key, value in _part(metrics, users).items()}
            if not 0 <= numbers[users].get("accuracy", math.nan) <= 1:
                problems.append(f"metrics.json has no accuracy of {users} users from 0 to 1")
                del numbers[users]
    if metrics and not numbers:
        problems.append("metrics.json has numbers of no users")
    curve = _part(metrics, "few_shot")
    if curve and not _is_curve(curve):
        problems.append("few_shot of metrics.json is no curve")
        curve = {}
    facts = _mapping(folder / "facts.json", []) if (folder / "facts.json").is_file() else {}
    checkpoints = sorted(folder.glob(f"{_CHECKPOINTS}/*.ckpt"))
    if file == "recipe.yaml" and not checkpoints:
        problems.append("no checkpoint")
    problems += [
        f"{plain(path.name)} is damaged: it was not written to its end" for path in checkpoints if not _is_whole(path)
    ]
    if numbers and not (folder / "per_user.csv").is_file():
        problems.append("no per_user.csv")
    return RunSummary(
        folder,
        name,
        _text(path).rpartition(".")[2],
        plain(_data_name(_part(_part(recipe, "data"), "source"))),
        _text(metrics.get("split_hash")),
        {key: _text(value) if isinstance(value, str) else _number(value) for key, value in facts.items()},
        numbers,
        [_text(text) for text in _part(metrics, "verdicts").values()],
        curve or None,
        problems,
    )


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has its end, where the archive that torch writes keeps its directory."""
    return checkpoint.is_dir() or zipfile.is_zipfile(checkpoint)  # a sharded one is a folder


def _mapping(file: Path, problems: list[str], hint: str = "") -> dict[str, Any]:
    """A file of YAML or JSON that holds a mapping; empty, with a problem, where it does not."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        problems.append(f"no {file.name}" + (f": {hint}" if hint else ""))
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{file.name} is damaged: {plain(' '.join(str(error).split()))}")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{file.name} is damaged: it holds no mapping")
        return {}
    return found


def _part(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping in a mapping; empty where there is none."""
    found = mapping.get(key)
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    """A text of a file without control characters; empty where it holds something else."""
    return plain(value) if isinstance(value, str) else ""


def _number(value: Any) -> float:
    """A finite number of a file; nan where it holds something else."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _is_curve(curve: Mapping[str, Any]) -> bool:
    """Whether the lists that a picture needs are there, of one length and of shares."""
    shots = curve.get("shots")
    if not isinstance(shots, list) or not all(isinstance(count, int) and 0 <= count < 2**31 for count in shots):
        return False
    lists = [curve.get(name) for name in ("accuracy", "accuracy_low", "accuracy_high")]
    return bool(shots) and all(
        isinstance(values, list)
        and len(values) == len(shots)
        and all(value is None or 0 <= _number(value) <= 1 for value in values)
        for values in lists
    )
