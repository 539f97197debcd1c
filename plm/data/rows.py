"""What a batch holds of an item or a prompt, gathered by row: features, or tokens.

Axes: I items, P prompts, B gathered rows, D feature width, T tokens of the longest gathered text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plm.arrays import Float32Array, IntArray
from plm.data.shards import FeatureArray
from plm.types import Tokens

MAX_FLOATS = 2**26
"""How many feature values an evaluation batch may hold (256 MiB)."""
FLOATS_PER_TOKEN = 16
"""What a token counts for: an evaluation batch may hold 2**22 of them (64 MiB with masks)."""


class BatchRows(ABC):
    """Rows that batches are gathered from."""

    @property
    @abstractmethod
    def width(self) -> int:
        """How many feature values the longest row counts for in memory."""

    @property
    def max_rows(self) -> int:
        """How many an evaluation batch may hold."""
        return MAX_FLOATS // self.width

    @abstractmethod
    def gather(self, rows: IntArray) -> Tensor | Tokens:
        """Rows ``(B,)`` as features ``(B, D)``, or as tokens ``(B, T)``."""


@dataclass(frozen=True)
class FeatureRows(BatchRows):
    """Features in memory."""

    features: Float32Array
    """``(I, D)``."""

    @property
    def width(self) -> int:
        """Width D of the features."""
        return int(self.features.shape[1])

    def gather(self, rows: IntArray) -> Tensor:
        """Rows ``(B,)`` -> ``(B, D)``."""
        return torch.from_numpy(np.ascontiguousarray(self.features[rows], dtype=np.float32))


@dataclass(frozen=True)
class MappedRows(BatchRows):
    """Features in files that are mapped into memory: read when they are gathered, and shared by processes."""

    files: Sequence[FeatureArray]
    """``(n, D)`` each; at least one."""
    place: npt.NDArray[np.int32]
    """``(I, 2)`` the file of each item and its row there; -1 for an item without features, which are nan."""

    @property
    def width(self) -> int:
        """Width D of the features."""
        return int(self.files[0].shape[1])

    def gather(self, rows: IntArray) -> Tensor:
        """Rows ``(B,)`` -> ``(B, D)``."""
        file, row = self.place[rows].T
        out = np.empty((len(rows), self.width), dtype=np.float32)
        order = np.lexsort((row, file))  # each file once, from its beginning to its end
        for part in np.split(order, np.flatnonzero(np.diff(file[order])) + 1):
            if len(part):
                out[part] = self.files[file[part[0]]][row[part]] if file[part[0]] >= 0 else np.nan
        return torch.from_numpy(out)


@dataclass(frozen=True)
class TokenRows(BatchRows):
    """Token ids of prompts and responses, of any length each."""

    prompts: Sequence[npt.NDArray[np.int32]]
    """P prompts."""
    responses: Sequence[npt.NDArray[np.int32]]
    """I responses; none for prompts alone."""
    prompt: IntArray
    """``(I,)`` row of the prompt of each response."""
    ref_logps: Float32Array | None = None
    """``(I,)`` log-probability of each response under the reference policy."""

    @property
    def lengths(self) -> IntArray:
        """``(I,)`` tokens of prompt and response."""
        response_lengths = np.array([len(ids) for ids in self.responses], dtype=np.int64)
        return response_lengths + np.array([len(ids) for ids in self.prompts], dtype=np.int64)[self.prompt]

    @property
    def width(self) -> int:
        """Tokens of the longest text, as feature values."""
        return FLOATS_PER_TOKEN * int(self.lengths.max(initial=1))

    def gather(self, rows: IntArray) -> Tokens:
        """Rows ``(B,)`` -> prompt and response, padded on the right to the longest of them."""
        before = [self.prompts[prompt] for prompt in self.prompt[rows]]
        after = [self.responses[row] for row in rows]
        start = np.array([len(ids) for ids in before], dtype=np.int64)[:, None]
        end = start + np.array([len(ids) for ids in after], dtype=np.int64)[:, None]
        column = np.arange(int(end.max(initial=1)))[None, :]
        ids = np.zeros((len(rows), column.shape[1]), dtype=np.int64)
        empty = np.zeros(0, dtype=np.int32)
        ids[column < start] = np.concatenate([empty, *before])
        ids[(column >= start) & (column < end)] = np.concatenate([empty, *after])
        ref_logps = None if self.ref_logps is None else torch.from_numpy(self.ref_logps[rows])
        attended = torch.from_numpy(column < end)
        return Tokens(torch.from_numpy(ids), attended, attended & torch.from_numpy(column >= start), ref_logps)

    def prompts_alone(self) -> TokenRows:
        """Rows that are the prompts without a response."""
        nothing = [np.zeros(0, dtype=np.int32)] * len(self.prompts)
        return TokenRows(self.prompts, nothing, np.arange(len(self.prompts)))
