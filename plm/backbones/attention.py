"""Which part of a network reads text, and what its layers can look at: windows, masks, caches with virtual tokens.

Axes: B texts, S tokens read before, T tokens read now, H key heads, p virtual tokens, d key width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_WINDOWS = ("window", "window_size", "chunk_size", "local_attention")
"""How the names of a config end that bound what some layers look at, in tokens."""

Prefix = Sequence[tuple[Tensor, Tensor]]
"""Keys and values ``(B, H, p, d)`` of p virtual tokens before a text, one pair per layer."""


def decoder_of(network: Any) -> Any:
    """What reads token ids: the network below its output embedding, without what it has for images."""
    decoder = network.get_decoder()
    return network.model if decoder is network else decoder  # Llama 4 finds no base model of its own


def attention_window(config: Any) -> int | None:
    """Tokens of the longest text in which every layer looks at all that was before; None = any text.

    Sliding windows and attention in chunks bound it; of several the smallest counts.
    """
    sizes = config.get_text_config().to_dict()
    found = [
        size
        for name, size in sizes.items()
        if name.endswith(_WINDOWS) and isinstance(size, int) and not isinstance(size, bool)
    ]
    return min(found, default=None)


def attention_bias(attended: Tensor, num_now: int, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Term ``(B, 1, T, S + T)`` added to attention scores: nearly minus infinity where a token may not look.

    Args:
        attended: ``(B, S + T)`` bool, True = no padding.
        num_now: T.
        dtype: Precision of the scores.
        bias: ``(S + T,)`` added to the scores of each column; None = 0.
    """
    column = torch.arange(attended.shape[1], device=attended.device)
    seen = attended[:, None, :] & (column[None, :] <= column[-num_now:, None])
    added = column.new_zeros((), dtype=dtype) if bias is None else bias.to(dtype)
    return torch.where(seen, added, torch.finfo(dtype).min)[:, None]


def filled_cache(prefix: Prefix) -> Any:
    """A key/value cache that holds ``prefix``, and will hold all that is read after it, windows or not."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (key, value) in enumerate(prefix):
        cache.update(key, value, layer)
    return cache
