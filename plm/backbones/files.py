"""Features that others have made: read of a file, looked up by text.

Axes: N rows of the file, D feature width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from plm.arrays import Float32Array
from plm.backbones.backbone import Backbone, Key, chat_messages, plain_text

_TEXTS = ("prompt", "response")


class FeatureFiles(Backbone):
    """Features from a file: embeddings of a service, or states of a model that is too large for this machine.

    The file has a row for every distinct prompt and response of the pairs: ``prompt`` (text or chat messages),
    ``response``, and ``features``, a list of D numbers. Where the response is null, the features are those of the
    prompt alone, for methods that read them. Nothing else can be scored: a text that is not in the file is an error.

    Args:
        path: Parquet file.
        array: Instead of the column ``features``: a file of NumPy, ``.npy``, with ``(N, D)`` numbers in the order of
            its rows. It is mapped into memory, not read.
        head: ``.npy`` of ``(D,)`` numbers: the direction in which the model that made the features scores them itself,
            if it is a reward model.
    """

    def __init__(self, path: str, array: str | None = None, head: str | None = None) -> None:
        self.path, self.array, self.head = path, array, head

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return int(self._features.shape[1])

    def key(self) -> Key:
        """Hash of the files."""
        digest = hashlib.sha256()
        for path in (self.path, self.array):
            if path is not None:
                with _existing(path).open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return {"engine": "files", "content": digest.hexdigest()}

    def render(self, prompt: str, response: str) -> str:
        """Prompt and response as one text, by which features are looked up."""
        return plain_text(prompt, response)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Features ``(N, D)`` of texts.

        Raises:
            ValueError: If the file does not hold one of them.
        """
        absent = [text for text in texts if text not in self._row_of]
        if absent:
            raise ValueError(
                f"expected features of every text in {self.path!r}, got none of {len(absent)}, such as "
                f"{absent[0][:80]!r}; add rows with these prompts and responses"
            )
        rows = [self._row_of[text] for text in texts]
        found = np.array(self._features[rows], dtype=np.float32).reshape(-1, self.feature_dim)
        if not np.isfinite(found).all():
            row = rows[int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])]
            raise ValueError(f"{self.array or self.path}: expected finite numbers, got others in row {row}")
        return torch.from_numpy(found)

    @property
    def reference_head(self) -> Tensor | None:
        """``(D,)`` what ``head`` holds."""
        if self.head is None:
            return None
        head = torch.from_numpy(np.asarray(_loaded(self.head), dtype=np.float32))
        if head.shape != (self.feature_dim,):
            raise ValueError(f"expected {self.feature_dim} numbers in {self.head!r}, got shape {tuple(head.shape)}")
        return head

    def release(self) -> None:
        """Let go of the file."""
        for name in ("_table", "_features", "_row_of"):
            vars(self).pop(name, None)

    @cached_property
    def _table(self) -> pa.Table:
        """The columns that are read."""
        wanted = [*_TEXTS, *(["features"] if self.array is None else [])]
        try:
            file = pq.ParquetFile(_existing(self.path))
            missing = [name for name in wanted if name not in file.schema_arrow.names]
            if not missing:
                return file.read(wanted)
        except pa.ArrowException as error:
            raise ValueError(f"{self.path}: expected a Parquet file, got {error}") from error
        got = ", ".join(file.schema_arrow.names)
        raise ValueError(f"{self.path}: expected the columns {', '.join(wanted)}, got {got}; {missing[0]} is missing")

    @cached_property
    def _features(self) -> Float32Array:
        """``(N, D)``."""
        num_rows = self._table.num_rows
        if self.array is not None:
            features: Float32Array = _loaded(self.array)
            if features.ndim != 2 or len(features) != num_rows or features.dtype.kind != "f":
                raise ValueError(
                    f"{self.array}: expected numbers of shape ({num_rows}, D), a row for each of {self.path}, got "
                    f"{features.dtype} of shape {features.shape}"
                )
            return features
        column = self._table["features"].combine_chunks()
        kind = column.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            raise ValueError(f"{self.path}: expected lists of numbers in the column features, got {kind}")
        values = column.flatten()
        lengths = np.unique(pc.list_value_length(column).fill_null(0).to_numpy()).tolist()
        if len(lengths) != 1 or 0 in lengths or values.null_count or not pa.types.is_floating(values.type):
            raise ValueError(
                f"{self.path}: expected lists of equally many decimal numbers in the column features, got {kind} of "
                f"lengths {lengths[:5]} with {values.null_count} nulls"
            )
        numbers: Float32Array = values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        return numbers.reshape(num_rows, -1)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        """Rendered text -> row."""
        rows: dict[str, int] = {}
        prompts, responses = (self._table[name].to_pylist() for name in _TEXTS)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            text = _alone(_text(prompt)) if response is None else plain_text(_text(prompt), response)
            first = rows.setdefault(text, row)
            if first != row and not np.array_equal(self._features[first], self._features[row]):
                raise ValueError(f"{self.path}: rows {first} and {row} have one text and other features; remove one")
        return rows


def _text(prompt: object) -> str:
    """A prompt of a table: text, or the JSON of its messages."""
    return prompt if isinstance(prompt, str) else "" if prompt is None else json.dumps(prompt, ensure_ascii=False)


def _alone(prompt: str) -> str:
    """A prompt without a response, as methods that read prompts are given it."""
    messages = chat_messages(prompt)
    return prompt if messages is None else "\n".join(turn["content"] for turn in messages)


def _existing(path: str) -> Path:
    """The file of a path, which may hold ``~``.

    Raises:
        ValueError: If there is none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"expected a file of features, got {path!r}, which does not exist; give an absolute path")
    return file


def _loaded(path: str) -> Float32Array:
    """The array of a ``.npy`` file, mapped into memory."""
    file = _existing(path)
    try:
        array: Float32Array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a .npy file, got {error}") from error
    return array
