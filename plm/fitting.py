"""Fit a method to pairs from Python, as ``plm fit`` does, and what a finished run holds."""

from __future__ import annotations

import hashlib
import html
import io
import json
import tempfile
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from plm.atomic import whole_file
from plm.backbones import Backbone
from plm.callbacks import run_dir
from plm.checkpoint import load_method
from plm.method import PersonalizationMethod
from plm.recipe.fit import run_recipe


class Run:
    """A finished run.

    Args:
        folder: Its folder, such as ``runs/mine``.

    Raises:
        ValueError: If it holds no checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoint = self.folder / "checkpoints" / "best.ckpt"
        """The best checkpoint; its users are stored beside it."""
        if not self.checkpoint.is_file():
            raise ValueError(f"expected the folder of a run, got {str(folder)!r}, which has no checkpoints/best.ckpt")

    @property
    def metrics(self) -> dict[str, Any]:
        """What ``metrics.json`` holds: numbers of ``seen`` and ``unseen`` users with intervals, ``verdicts``, and more.

        Raises:
            ValueError: If the run was not tested.
        """
        file = self.folder / "metrics.json"
        if not file.is_file():
            raise ValueError(f"expected a run that was tested, got {str(self.folder)!r}; plm test --ckpt_path tests it")
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
    name: str | None = None,
    folder: str | Path = "runs",
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Run:
    """Fit a method to preference pairs, test it on users that were held out, and keep the run in a folder.

    It is ``plm fit`` with the same defaults, files and printed table; ``recipe.yaml`` of the run repeats it.

    Args:
        pairs: A file or a list of files of pairs; or a table of them, one row a pair: a DataFrame, an Arrow table or a
            list of mappings. A table is kept beside the runs, as ``folder/pairs/table_<hash>.parquet``.
        method: Short name, as ``plm methods`` lists them, import path, or class.
        backbone: A group of ``conf/backbone``, such as ``minilm`` or ``hashing``, or a backbone.
        columns: Our column name -> theirs, see `plm.data.sources.pairs.PairFiles`.
        name: Folder of the run below ``folder``, which must be new; default: method, data and time.
        folder: Folder of all runs.
        options: Any other key of a recipe -> its value, such as ``{"trainer.max_epochs": 50, "data.unseen_users": 0}``.
        **arguments: Arguments of the method, such as ``num_bases=8``.

    Returns:
        The run: ``run.metrics``, ``run.method.score(texts, user_id=...)``, ``run.figures``.

    Raises:
        ValueError: As ``plm fit`` fails: malformed rows, unknown keys, too few pairs.

    Example:
        >>> run = fit("mine.jsonl", "LoRe", backbone="hashing", num_bases=8)  # doctest: +SKIP
        >>> run.method.score(["A new bus line.", "A new exit."], user_id="anna")  # doctest: +SKIP
    """
    files = _files(pairs, Path(folder))
    init_args = {"path": files, **({} if columns is None else {"columns": dict(columns)})}
    recipe: dict[str, Any] = {
        "defaults": [
            *([{"backbone": backbone}] if isinstance(backbone, str) else []),
            {"trainer": "gpu1" if torch.cuda.is_available() else "cpu"},
            {"logger": "csv"},
        ],
        "name": name,
        "model": {"class_path": method if isinstance(method, str) else _path_of(method), "init_args": arguments},
        "data": {"source": {"class_path": "plm.data.sources.pairs.PairFiles", "init_args": init_args}},
        "trainer": {"default_root_dir": str(folder)},
    }
    if isinstance(backbone, Backbone):
        recipe["data"]["backbone"] = backbone.spec()
    for key, value in (options or {}).items():
        *parts, last = key.split(".")
        place = recipe
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        cli = run_recipe(["fit", "--config", str(file)])
    return Run(run_dir(cli.trainer))


def _path_of(cls: type) -> str:
    """Import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _files(pairs: Any, folder: Path) -> list[str]:
    """Files that hold the pairs; a table is written to one that its content names."""
    if isinstance(pairs, str | Path):
        return [str(pairs)]
    if isinstance(pairs, Sequence) and pairs and all(isinstance(file, str | Path) for file in pairs):
        return [str(file) for file in pairs]
    try:
        table = _table(pairs)
        sink = io.BytesIO()
        pq.write_table(table, sink)
    except (pa.ArrowException, TypeError, AttributeError) as error:
        expected = "expected files, a DataFrame, an Arrow table or a list of mappings of one kind"
        raise ValueError(f"pairs: {expected}, got {type(pairs).__name__}: {error}") from error
    file = folder / "pairs" / f"table_{hashlib.sha256(sink.getvalue()).hexdigest()[:12]}.parquet"
    if not file.is_file():
        with whole_file(file) as target:
            target.write(sink.getvalue())
    return [str(file.resolve())]


def _table(pairs: Any) -> pa.Table:
    """A table of any kind as one of Arrow."""
    if isinstance(pairs, pa.Table):
        return pairs
    if isinstance(pairs, Sequence):
        return pa.Table.from_pylist([dict(row) for row in pairs])
    if hasattr(pairs, "to_arrow"):  # polars
        return pairs.to_arrow()
    return pa.Table.from_pandas(pairs, preserve_index=False)
