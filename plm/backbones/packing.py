"""Several texts in one row, none of which sees another.

Axes: B texts or pairs, R rows, T tokens of a row, n response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plm.types import Tokens


class Packed(NamedTuple):
    """Rows that hold several texts each, and where their response tokens are."""

    input_ids: Tensor
    """``(R, T)`` int64."""
    mask: Tensor
    """``(R, T, T)`` bool, True = may look at."""
    position: Tensor
    """``(R, T)`` int64, the place of a token in its own text."""
    row: Tensor
    """``(n,)`` int64, the row of each response token, in the order of the texts."""
    column: Tensor
    """``(n,)`` int64, its column."""


def first_fit(lengths: list[int]) -> list[tuple[int, int]]:
    """Row and first column of each text, the longest first, each in the first row with room (Johnson 1974).

    Rows are as long as the longest text.

    >>> first_fit([3, 5, 2, 2, 3])
    [(1, 0), (0, 0), (1, 3), (2, 3), (2, 0)]
    """
    width, used = max(lengths, default=0), list[int]()
    places = [(0, 0)] * len(lengths)
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        row = next((row for row, size in enumerate(used) if size + lengths[text] <= width), len(used))
        if row == len(used):
            used.append(0)
        places[text] = (row, used[row])
        used[row] += lengths[text]
    return places


def pack_texts(tokens: Tokens) -> Packed:
    """Pack B texts, padded on either side, into as few rows as `first_fit` finds, each as long as the longest text."""
    device, length = tokens.input_ids.device, tokens.attention_mask.sum(-1)
    places = torch.tensor(first_fit(length.tolist()), device=device)
    text, _ = tokens.attention_mask.nonzero(as_tuple=True)
    place = (tokens.attention_mask.long().cumsum(-1) - 1)[tokens.attention_mask]
    row, column = places[text, 0], places[text, 1] + place
    shape = (int(places[:, 0].max()) + 1, int(length.max()))
    owner = torch.full(shape, -1, device=device)  # what is left over is one more text, which nobody reads
    owner[row, column] = text
    ids, position = owner.new_zeros(shape), owner.new_zeros(shape)
    ids[row, column], position[row, column] = tokens.input_ids[tokens.attention_mask], place
    causal = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).tril()
    mask = causal & (owner[:, :, None] == owner[:, None, :])
    response = tokens.completion_mask[tokens.attention_mask]
    return Packed(ids, mask, position, row[response], column[response])


def pack_pairs(chosen: Tokens, rejected: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pack prompt, chosen and rejected response of each pair into one row.

    Returns:
        Token ids ``(B, T)``; mask ``(B, T, T)`` bool, True = may look at; positions ``(B, T)``; and of the n response
        tokens, all chosen ones first: the column that predicts them, their own column, and their text ``(n,)`` each,
        0..B-1 for chosen and B..2B-1 for rejected.

    Raises:
        ValueError: If a pair's responses do not follow the same prompt.
    """
    num_pairs, device = chosen.num_rows, chosen.input_ids.device
    prompts, parts = [], []
    for side in (chosen, rejected):
        before = side.attention_mask & ~side.completion_mask
        prompts.append((before.sum(-1), side.input_ids[before]))
        parts.append(side.completion_mask.sum(-1))
    if not all(torch.equal(a, b) for a, b in zip(*prompts, strict=True)):
        raise ValueError("expected both responses of a pair to follow the same prompt; set share_prompts to false")
    p, c, r = prompts[0][0], parts[0], parts[1]  # (B,) each
    column = torch.arange(int((p + c + r).max()), device=device)[None, :]  # (1, T)
    start_c, start_r, end = p[:, None], (p + c)[:, None], (p + c + r)[:, None]
    kind = (column >= start_c).long() + (column >= start_r).long() + (column >= end).long()  # 0 prompt .. 3 padding
    packed = torch.zeros(num_pairs, column.shape[1], dtype=torch.long, device=device)
    packed[kind == 0] = prompts[0][1]
    packed[kind == 1] = chosen.input_ids[chosen.completion_mask]
    packed[kind == 2] = rejected.input_ids[rejected.completion_mask]
    position = torch.where(kind == 2, column - c[:, None], column).clamp(max=int((p + torch.maximum(c, r)).max()) - 1)
    causal = column[:, :, None] >= column[:, None, :]
    mask = causal & ((kind[:, None, :] == 0) | (kind[:, None, :] == kind[:, :, None]))
    (chosen_row, chosen_column), (rejected_row, rejected_column) = ((kind == k).nonzero(as_tuple=True) for k in (1, 2))
    row = torch.cat([chosen_row, rejected_row + num_pairs])
    token_column = torch.cat([chosen_column, rejected_column])
    first = token_column == torch.cat([start_c[:, 0], start_r[:, 0]])[row]
    source = torch.where(first, p.repeat(2)[row] - 1, token_column - 1)
    return packed, mask, position, source, token_column, row
