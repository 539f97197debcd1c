"""What a batch holds of an item or a prompt, gathered by row: features, or tokens.

Axes: I items, P prompts, B gathered rows, D feature width, T tokens of the longest gathered text.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plm.data.files import IntArray
from plm.data.schema import PairTable
from plm.types import Tokens

MAX_FLOATS = 2**26
"""How many feature values an evaluation batch may hold (256 MiB)."""
MAX_TOKENS = 2**22
"""How many tokens an evaluation batch may hold (64 MiB with masks)."""


class Rows(Protocol):
    """Rows that batches are gathered from."""

    @property
    def max_rows(self) -> int:
        """How many an evaluation batch may hold."""

    def gather(self, rows: IntArray) -> Tensor | Tokens:
        """Rows ``(B,)`` as features ``(B, D)``, or as tokens ``(B, T)``."""


@dataclass(frozen=True)
class FeatureRows:
    """Features; may be memory-mapped."""

    features: npt.NDArray[np.float32]
    """``(I, D)``."""

    @property
    def max_rows(self) -> int:
        """How many an evaluation batch may hold."""
        return MAX_FLOATS // int(self.features.shape[1])

    def gather(self, rows: IntArray) -> Tensor:
        """Rows ``(B,)`` -> ``(B, D)``."""
        return torch.from_numpy(np.ascontiguousarray(self.features[rows], dtype=np.float32))


@dataclass(frozen=True)
class TokenRows:
    """Token ids of prompts and responses, of any length each."""

    prompts: Sequence[npt.NDArray[np.int32]]
    """P prompts."""
    responses: Sequence[npt.NDArray[np.int32]]
    """I responses; none for prompts alone."""
    prompt: IntArray
    """``(I,)`` row of the prompt of each response."""
    ref_logps: npt.NDArray[np.float32] | None = None
    """``(I,)`` log-probability of each response under the reference policy."""

    @property
    def lengths(self) -> IntArray:
        """``(I,)`` tokens of prompt and response."""
        own = np.array([len(ids) for ids in self.responses], dtype=np.int64)
        return own + np.array([len(ids) for ids in self.prompts], dtype=np.int64)[self.prompt]

    @property
    def max_rows(self) -> int:
        """How many an evaluation batch may hold."""
        return MAX_TOKENS // int(self.lengths.max(initial=1))

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


class Tokenizer(Protocol):
    """What turns texts into token ids, and refuses a prompt that leaves no room for a response."""

    def completion(self, prompt: str, response: str, /) -> tuple[list[int], list[int]]:
        """Token ids of prompt and response."""


def token_rows(table: PairTable, tokenizer: Tokenizer, too_long: type[ValueError]) -> tuple[PairTable, TokenRows]:
    """Tokenise the items of a table and leave out pairs that do not fit.

    Args:
        table: The pairs.
        tokenizer: A `plm.backbones.CausalLM`.
        too_long: What it raises for a prompt that leaves no room.

    Returns:
        The table without pairs whose prompt leaves no room, counted under ``dropped["too_long"]`` with a warning, and
        the tokens of all items; items of pairs that were left out are empty.

    Raises:
        ValueError: For a response without tokens or an id outside the vocabulary, with the position of its pair; or if
            no pair fits.
    """
    prompts: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)] * len(table.prompts)
    responses: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)] * len(table.items)
    fits = np.ones(len(table.items), dtype=bool)
    for item, (prompt, text) in enumerate(table.texts()):
        try:
            before, after = tokenizer.completion(prompt, text)
        except too_long:
            fits[item] = False
            continue
        except ValueError as error:
            pair = int(np.flatnonzero((table.chosen == item) | (table.rejected == item))[0])
            raise ValueError(f"{table.position(pair)}: {error}") from error
        prompts[table.items[item, 0]] = np.array(before, dtype=np.int32)
        responses[item] = np.array(after, dtype=np.int32)
    kept = fits[table.chosen] & fits[table.rejected]
    rows = TokenRows(prompts, responses, table.items[:, 0])
    num_dropped = int((~kept).sum())
    if not num_dropped:
        return table, rows
    first = table.position(int(np.flatnonzero(~kept)[0]))
    advice = "raise data.backbone.init_args.max_length or set max_prompt_length"
    if num_dropped == table.num_pairs:
        raise ValueError(f"expected prompts that leave room for a response, got none (the first at {first}); {advice}")
    warnings.warn(
        f"{num_dropped} of {table.num_pairs} pairs are left out: their prompts leave no room for a response (the first "
        f"at {first}); {advice}",
        stacklevel=2,
    )
    left = table.take(kept)
    left.dropped["too_long"] = num_dropped
    return left, rows
