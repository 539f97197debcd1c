"""Supervision of every token of a response, as published, without loops.

Axes: B pairs in a batch, T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from plm.methods.pal.heads import pair_losses
from plm.types import Tokens

Weighting = Literal["mean", "cumulative", "last"]


def token_window(chosen: Tokens, rejected: Tokens) -> Tensor:
    """Where two responses are compared: ``(B, T)`` bool, from the first token in which they differ to the longer end.

    Ends come from the attention mask, so the id of the padding token does not matter. Two equal rows are compared at
    their last token. Rows are padded on the right.
    """
    place = torch.arange(chosen.input_ids.shape[1], device=chosen.input_ids.device)
    end = torch.maximum(chosen.attention_mask.sum(-1), rejected.attention_mask.sum(-1))
    differs = (chosen.input_ids != rejected.input_ids) | (chosen.attention_mask != rejected.attention_mask)
    differs = differs & (place < end[:, None])
    start = torch.where(differs.any(-1), differs.int().argmax(-1), end - 1)
    return (place >= start[:, None]) & (place < end[:, None])


def last_tokens(tokens: Tokens) -> Tensor:
    """For each place the place itself, or the last real token where the row has ended: ``(B, T)``.

    A shorter response keeps its final reward while the longer one goes on; the hidden states of padding are not read.
    """
    place = torch.arange(tokens.input_ids.shape[1], device=tokens.input_ids.device)
    return torch.minimum(place, tokens.attention_mask.sum(-1, keepdim=True) - 1).clamp_min(0)


def token_weights(window: Tensor, weighting: str) -> Tensor:
    """Weight of every token, of sum one in each row: ``(B, T)`` bool -> ``(B, T)``.

    mean = all alike; cumulative = rising linearly, the j-th of n tokens has ``j / (n (n + 1) / 2)``; last = all on the
    last token.

    >>> token_weights(torch.tensor([[False, True, True, True]]), "cumulative").mul(6).tolist()
    [[0.0, 1.0, 2.0, 3.0]]
    """
    kept = window.to(torch.get_default_dtype())
    rank = kept.cumsum(-1) * kept
    if weighting == "mean":
        rank = kept
    elif weighting == "last":
        rank = kept * (rank == rank.amax(-1, keepdim=True))
    total: Tensor = rank.sum(-1, keepdim=True)
    return rank / total.clamp_min(1.0)


def token_losses(
    margin: Tensor, target: Tensor, window: Tensor, weighting: str, kind: str, gamma: float = 1.0
) -> Tensor:
    """Loss of each pair from the margins of its tokens: ``(B, T)``, ``(B,)``, ``(B, T)`` -> ``(B,)``.

    Args:
        margin: Reward of chosen minus reward of rejected at each token; outside the window anything finite or not.
        target: Probability that chosen wins.
        window: See `token_window`.
        weighting: See `token_weights`.
        kind: See `plm.methods.pal.heads.pair_losses`.
        gamma: Width of the curved part of the smooth hinge.
    """
    margin = margin.masked_fill(~window, 0.0)
    losses = pair_losses(kind, margin, target[:, None], gamma)
    return (losses * token_weights(window, weighting).to(losses)).sum(-1)
