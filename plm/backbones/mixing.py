"""Texts written by a mixture of policies of one tokenizer.

Axes: B texts, K policies, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plm.backbones.policy import TextWriter
from plm.types import Tokens


class MixedWriting:
    """Texts written by a mixture of policies: the next token is drawn from their weighted geometric mean.

    With weights that sum to one, log p = sum_k w_k log p_k up to a constant at each place, as log-ratios to the
    reference are mixed in training.

    Args:
        parts: One batch of the same texts for every policy.
        weights: ``(B, K)`` non-negative, each row summing to one.
    """

    def __init__(self, parts: Sequence[TextWriter], weights: Tensor) -> None:
        self.parts, self.weights = parts, weights

    def start(self, prompts: Tokens) -> Tensor:
        """Read the prompts, padded on the left; logits ``(B, V)`` of the first token."""
        return self._mix([part.start(prompts) for part in self.parts])

    def step(self, token: Tensor) -> Tensor:
        """Write one token ``(B,)`` to every text; logits ``(B, V)`` of the next."""
        return self._mix([part.step(token) for part in self.parts])

    def take(self, rows: Tensor) -> None:
        """Go on with these of the B texts, ``(n,)`` int64."""
        for part in self.parts:
            part.take(rows)
        self.weights = self.weights[rows]

    def _mix(self, logits: Sequence[Tensor]) -> Tensor:
        return mixed_logits(logits, self.weights)


def mixed_logits(logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Scores of the weighted geometric mean of K next-token distributions, up to a constant of each row.

    >>> first, second = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> mixed_logits([one, two], torch.tensor([[0.5, 0.5]])).softmax(-1)
    tensor([[0.7500, 0.2500]])

    Args:
        logits: K times ``(B, V)``.
        weights: ``(B, K)``.
    """
    mixed = torch.zeros_like(logits[0])
    for part, weight in zip(logits, weights.to(mixed).unbind(1), strict=True):
        mixed += weight[:, None] * part.log_softmax(-1)
    return mixed
