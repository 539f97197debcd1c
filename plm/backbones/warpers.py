"""How vocabulary scores become the distribution that tokens are drawn from, and the tokens.

Axes: B texts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WEYL = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
"""Of splitmix64, as signed integers."""
_BLOCK = 8192
_CACHED = 2**16
"""Tokens, and texts times tokens, whose noise is made at once on a processor, within its cache."""
_COMPARED = 8
"""Tokens that are compared exactly: rounding does not bring others before them."""


class Warpers:
    """Temperature, top-k (Fan et al. 2018) and nucleus sampling (Holtzman et al. 2020), in this order.

    Args:
        temperature: What scores are divided by.
        top_k: Only so many most likely tokens stay; None = all.
        top_p: Only the most likely tokens that together have this probability stay; None = all.
    """

    def __init__(self, temperature: float, top_k: int | None = None, top_p: float | None = None) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        steps: list[Any] = [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
        if top_k is not None:
            steps.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            steps.append(TopPLogitsWarper(top_p))
        self._steps: Any = LogitsProcessorList(steps)

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores ``(B, V)`` -> warped scores, minus infinity where a token cannot be drawn."""
        none = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)  # these warpers read no tokens
        warped: Tensor = self._steps(none, logits)
        return warped


def draw(scores: Tensor, keys: Tensor, place: int) -> Tensor:
    """Draw a token ``(B,)`` for every text from the softmax of scores ``(B, V)``: the largest with Gumbel noise added.

    All tokens are compared in float32, and the few largest again in float64, which decides.

    Args:
        scores: Minus infinity where a token cannot be drawn.
        keys: ``(B,)`` int64, seed of all that is random in a text.
        place: Number of the token in its text.
    """
    noisy = torch.empty_like(scores, dtype=torch.float32)
    num_rows, size = scores.shape
    width, height = (_BLOCK, _CACHED // _BLOCK) if scores.device.type == "cpu" else (size, num_rows)
    for column in range(0, size, width):
        tokens = torch.arange(column, min(column + width, size), device=scores.device)
        for row in range(0, num_rows, height):
            block = slice(row, row + height), slice(column, column + width)
            above = (
                _bits(keys[block[0], None], tokens, place).bitwise_xor_(2**53 - 1).float().add_(0.5).mul_(2.0**-53)
            )  # 1 - u
            noisy[block] = scores[block] - above.neg_().log1p_().neg_().log_()
    likely = noisy.topk(min(_COMPARED, scores.shape[1]), sorted=False).indices.sort(-1).values
    exact = scores.gather(1, likely) + gumbel_noise(keys, likely, place)
    return likely.gather(1, exact.argmax(-1, keepdim=True))[:, 0]


def gumbel_noise(keys: Tensor, tokens: Tensor, place: int) -> Tensor:
    """Gumbel noise ``(B, n)`` float64 for tokens at one place of B texts: the largest of scores plus noise is a draw.

    The noise of a token is a hash (splitmix64; Steele et al. 2014) of the key of its text, the place and the token, the
    same on every device and in every batch. Distributions that differ little thus mostly give the same token.

    Args:
        keys: ``(B,)`` int64.
        tokens: ``(B, n)`` or ``(n,)`` int64 ids.
        place: Number of the token in its text.
    """
    uniform = (_bits(keys[:, None], tokens, place).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _bits(keys: Tensor, tokens: Tensor, place: int) -> Tensor:
    """53 random bits of every key and token, as integers."""
    bits = keys + (tokens + (1 + (place << 32))) * _WEYL
    for shift, factor in (*_MIX, (31, None)):
        bits ^= (bits >> shift) & ((1 << 64 - shift) - 1)  # >> keeps the sign, hence the mask
        if factor is not None:
            bits *= factor
    return bits.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1)
