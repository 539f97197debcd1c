"""Fit a method to pairs from Python, as ``plm fit`` does, and what a finished run holds."""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import tempfile
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from plm.atomic import whole_file
from plm.backbones import Backbone
from plm.callbacks import run_dir
from plm.checkpoint import load_method
from plm.data.conversion import arrow_table
from plm.data.schema import PairTable
from plm.erasure import PAIRS_FOLDER
from plm.method import PersonalizationMethod
from plm.recipe.fit import run_recipe


class Run:
    """A finished run.

    Args:
        folder: Its folder, such as ``runs/mine``.
        checkpoint: Its best checkpoint, from there.

    Raises:
        ValueError: If it holds no checkpoint.
    """

    def __init__(self, folder: str | Path, checkpoint: str | Path = "checkpoints/best.ckpt") -> None:
        self.folder = Path(folder)
        self.checkpoint = self.folder / checkpoint
        """The best checkpoint; its users are stored beside it."""
        if not self.checkpoint.is_file():
            state = f"which has no {checkpoint}" if self.folder.is_dir() else "which does not exist"
            raise ValueError(f"expected the folder of a run, such as runs/mine, got {str(folder)!r}, {state}")

    def __fspath__(self) -> str:
        """Its folder: what takes the folder of a run takes the run."""
        return str(self.folder)

    @property
    def metrics(self) -> dict[str, Any]:
        """What ``metrics.json`` holds: numbers of ``seen`` and ``unseen`` users with intervals, ``verdicts``, and more.

        Raises:
            ValueError: If the run was not tested.
        """
        file = self.folder / "metrics.json"
        if not file.is_file():
            raise ValueError(f"expected a run that was tested, got {str(self.folder)!r}; fit it with final_test: true")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    @cached_property
    def method(self) -> PersonalizationMethod:
        """The method, loaded with its users: it scores texts, learns and forgets users."""
        return load_method(self.checkpoint)

    @property
    def figures(self) -> dict[str, Path]:
        """Name -> PNG of every figure."""
        return {file.stem: file for file in sorted(self.folder.glob("*.png"))}

    @property
    def users(self) -> list[str]:
        """Ids of all users that the model knows."""
        return self.method.known_users.store.ids

    def __repr__(self) -> str:
        """The folder and the verdicts."""
        verdicts = self.metrics["verdicts"].values() if (self.folder / "metrics.json").is_file() else ["not tested"]
        return "\n".join([f"Run({str(self.folder)!r})", *(f"  {verdict}" for verdict in verdicts)])

    def _repr_html_(self) -> str:
        """The same with figures, for notebooks."""
        pictures = (
            f'<img alt="{html.escape(name)}" style="max-width: 32em" '
            f'src="data:image/png;base64,{b64encode(file.read_bytes()).decode()}">'
            for name, file in self.figures.items()
        )
        return f"<pre>{html.escape(repr(self))}</pre>{''.join(pictures)}"


def fit(
    pairs: Any,
    method: str | type[PersonalizationMethod] = "LoRe",
    *,
    backbone: str | Backbone = "minilm",
    columns: Mapping[str, str | None] | None = None,
    winner: Mapping[str, Any] | None = None,
    layout: str | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    name: str | None = None,
    folder: str | Path = "runs",
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Run:
    """Fit a method to preference pairs, test it on users that were held out, and keep the run in a folder.

    It is ``plm fit`` with the same defaults, files and printed table; ``recipe.yaml`` of the run repeats it.

    Args:
        pairs: A file or a list of files of pairs; or a table of them, one row a pair: a DataFrame, an Arrow table, a
            list of mappings, or what `plm.read_pairs` returns. A table is kept
            beside the runs, as ``folder/pairs/table_<hash>.parquet``.
        method: Short name, as ``plm methods`` lists them, import path, or class.
        backbone: A group of ``conf/backbone``, such as ``minilm`` or ``hashing``, or a backbone.
        columns: Our column name -> theirs, see `plm.data.sources.pairs.PairFiles`, as for the next three.
        winner: Which column names the preferred response, and by which labels.
        layout: A known layout of files.
        on_error: What a malformed row does, ``stop`` or ``skip``.
        name: Folder of the run below ``folder``, which must be new; default: method, data and time.
        folder: Folder of all runs.
        options: Any other key of a recipe -> its value, such as ``{"trainer.max_epochs": 50, "data.unseen_users": 0}``.
        **arguments: Arguments of the method, such as ``num_bases=8``.

    Returns:
        The run: ``run.metrics``, ``run.method.score(texts, user_id=...)``, ``run.figures``.

    Raises:
        ValueError: As ``plm fit`` fails: malformed rows, unknown keys, too few pairs.

    Examples:
        >>> run = fit("mine.jsonl", "LoRe", backbone="hashing", num_bases=8)  # doctest: +SKIP
        >>> run.method.score(["A new bus line.", "A new exit."], user_id="anna")  # doctest: +SKIP
    """
    class_path = method if isinstance(method, str) else f"{method.__module__}.{method.__qualname__}"
    with _kept(pairs, Path(folder)) as files, tempfile.TemporaryDirectory() as scratch:
        recipe: dict[str, Any] = {
            "defaults": [
                *([{"backbone": backbone}] if isinstance(backbone, str) else []),
                {"trainer": "gpu1" if torch.cuda.is_available() else "cpu"},
                {"logger": "csv"},
            ],
            "name": name,
            "model": {"class_path": class_path},
            "data": {"source": {"class_path": "plm.data.sources.pairs.PairFiles", "init_args": {"path": files}}},
            "trainer": {"default_root_dir": str(folder)},
        }
        given = {f"model.init_args.{key}": value for key, value in arguments.items()}
        reading = {"columns": columns, "winner": winner, "layout": layout, "on_error": on_error}
        given |= {f"data.source.init_args.{key}": value for key, value in reading.items() if value is not None}
        given |= {"data.backbone": backbone.spec()} if isinstance(backbone, Backbone) else {}
        for key, value in {**given, **(options or {})}.items():
            _set(recipe, key, _plain(key, value))
        if recipe["trainer"].get("fast_dev_run"):
            raise ValueError("trainer.fast_dev_run: expected a fit, which leaves a run; use plm fit for a trial")
        file = Path(scratch) / "recipes" / "recipe.yaml"  # groups are looked up in the folder above, which is empty
        file.parent.mkdir()
        file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        try:
            return fit_recipe(["--config", str(file)])
        except ValueError as error:
            raise type(error)(str(error).removeprefix(f"{file}: ")) from error  # nobody has written that file


def fit_recipe(args: Sequence[str]) -> Run:
    """Fit recipes and options, as ``plm fit`` takes them.

    Raises:
        ValueError: As ``plm fit`` fails.
    """
    trainer = run_recipe(["fit", *args]).trainer
    best: str = getattr(trainer.checkpoint_callback, "best_model_path", "")
    return Run(run_dir(trainer), Path(best).resolve())


def _set(recipe: dict[str, Any], key: str, value: Any) -> None:
    """Set a key with dots; a mapping is laid over the one that is there."""
    *parts, last = key.split(".")
    place: Any = recipe
    for depth, part in enumerate(parts):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            above = ".".join(parts[: depth + 1])
            raise ValueError(f"options: expected the keys of a recipe, got {key!r}, but {above} is {place!r}")
    if isinstance(value, dict) and isinstance(place.get(last), dict):
        for name, below in value.items():
            _set(recipe, f"{key}.{name}", below)
    else:
        place[last] = value


def _plain(key: str, value: Any) -> Any:
    """A value as a recipe can hold it.

    Raises:
        ValueError: For an object, with its key.
    """
    if isinstance(value, Mapping):
        return {str(name): _plain(f"{key}.{name}", below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if value is not None and not isinstance(value, str | bool | int | float):
        kind = type(value).__name__
        raise ValueError(
            f"{key}: expected what a recipe can hold, got {kind}; give {{class_path: ..., init_args: ...}}"
        )
    return value


@contextmanager
def _kept(pairs: Any, folder: Path) -> Iterator[list[str]]:
    """Files that hold the pairs; a table is written to one that its content names.

    Where the block fails, that file is removed, unless a run is left that names it, and errors name the table instead.
    """
    if isinstance(pairs, str | Path):
        yield [str(pairs)]
        return
    if isinstance(pairs, Sequence) and pairs and all(isinstance(file, str | Path) for file in pairs):
        yield [str(file) for file in pairs]
        return
    try:
        sink = io.BytesIO()
        pq.write_table(arrow_table(pairs) if isinstance(pairs, PairTable) else _table(pairs), sink)
    except (pa.ArrowException, TypeError, AttributeError, OverflowError) as error:
        expected = "expected files, a DataFrame, an Arrow table or a list of mappings of one kind"
        raise ValueError(f"pairs: {expected}, got {type(pairs).__name__}: {error}") from error
    file = folder / PAIRS_FOLDER / f"table_{hashlib.sha256(sink.getvalue()).hexdigest()[:12]}.parquet"
    is_new, is_new_folder = not file.is_file(), not folder.is_dir()
    before = set(folder.glob("*"))
    if is_new:
        with whole_file(file) as target:
            target.write(sink.getvalue())
    try:
        yield [str(file.resolve())]
    except BaseException as error:
        if is_new and set(folder.glob("*")) <= {*before, file.parent}:
            file.unlink(missing_ok=True)
            with suppress(OSError):  # it holds other tables, or what others have written meanwhile
                file.parent.rmdir()
                if is_new_folder:
                    folder.rmdir()
        if isinstance(error, ValueError) and file.name in str(error):
            raise ValueError(_of_table(str(error), file, f"the {type(pairs).__name__}")) from error
        raise


def _of_table(text: str, file: Path, name: str) -> str:
    """A message about the file of a table as one about the table."""
    text = re.sub(re.escape(str(file.resolve())) + r":(row \d+)", rf"\1 of {name}", text)
    for path in (str(file.resolve()), f"{file.parent.name}/{file.name}"):
        text = text.replace(path, name)
    return text


def _table(pairs: Any) -> pa.Table:
    """A table of any kind as one of Arrow."""
    if isinstance(pairs, pa.Table):
        return pairs
    if isinstance(pairs, Sequence):
        rows = [dict(row) for row in pairs]
        names = list(dict.fromkeys(name for row in rows for name in row))  # Arrow looks at the first row alone
        return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    if hasattr(pairs, "to_arrow"):  # polars
        return pairs.to_arrow()
    return pa.Table.from_pandas(pairs, preserve_index=False)
