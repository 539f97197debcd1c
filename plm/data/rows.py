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
SAME = "their responses differ only where they are cut off"


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

    def cut_completion(self, prompt: str, response: str, /) -> tuple[tuple[list[int], list[int]], int]:
        """Token ids of prompt and response, and how many of the response were cut off."""


def token_rows(
    table: PairTable,
    tokenizer: Tokenizer,
    too_long: type[ValueError],
    advice: str = "raise data.backbone.init_args.max_length or set max_prompt_length",
) -> tuple[PairTable, TokenRows]:
    """Tokenise the items of a table and leave out pairs that do not fit; responses that were cut are warned about.

    Args:
        table: The pairs.
        tokenizer: A `plm.backbones.CausalLM`.
        too_long: What it raises for a prompt that leaves no room.
        advice: What to do about texts that do not fit.

    Returns:
        The table without pairs whose prompt leaves no room (``dropped["too_long"]``) or whose responses differ only
        where they were cut off (``dropped["same_when_cut"]``), both with a warning, and the tokens of all items.

    Raises:
        ValueError: For a response without tokens or an id outside the vocabulary, with the position of its pair; or if
            no pair fits.
    """
    prompts: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)] * len(table.prompts)
    responses: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)] * len(table.items)
    fits = np.ones(len(table.items), dtype=bool)
    cut = np.zeros(len(table.items), dtype=bool)
    for item, (prompt, text) in enumerate(table.texts()):
        try:
            (before, after), num_cut = tokenizer.cut_completion(prompt, text)
        except too_long:
            fits[item] = False
            continue
        except ValueError as error:
            pair = int(np.flatnonzero((table.chosen == item) | (table.rejected == item))[0])
            raise ValueError(f"{table.position(pair)}: {error}") from error
        prompts[table.items[item, 0]] = np.array(before, dtype=np.int32)
        responses[item] = np.array(after, dtype=np.int32)
        cut[item] = num_cut > 0
    rows = TokenRows(prompts, responses, table.items[:, 0])
    unfit = ~(fits[table.chosen] & fits[table.rejected])
    same = np.zeros(table.num_pairs, dtype=bool)
    for pair in np.flatnonzero(~unfit & cut[table.chosen] & cut[table.rejected]).tolist():
        same[pair] = np.array_equal(responses[table.chosen[pair]], responses[table.rejected[pair]])
    if not (~unfit & ~same).any():
        first = table.position(0)
        raise ValueError(f"expected prompts that leave room for a response, got none (the first at {first}); {advice}")
    if cut.any():
        first = table.position(int(np.flatnonzero(cut[table.chosen] | cut[table.rejected])[0]))
        warnings.warn(
            f"{cut.sum()} of {len(table.items)} responses are cut off where the model can read no more (the first at "
            f"{first}); {advice}",
            stacklevel=2,
        )
    reasons = {"too_long": (unfit, "their prompts leave no room for a response"), "same_when_cut": (same, SAME)}
    left = table.take(~unfit & ~same) if (unfit | same).any() else table
    for name, (which, why) in reasons.items():
        if which.any():
            first = table.position(int(np.flatnonzero(which)[0]))
            warnings.warn(
                f"{which.sum()} of {table.num_pairs} pairs are left out: {why} (the first at {first}); {advice}",
                stacklevel=2,
            )
            left.dropped[name] = int(which.sum())
    return left, rows
