"""How vocabulary scores become the distribution that tokens are drawn from.

Axes: B texts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Warpers:
    """Temperature, top-k (Fan et al. 2018) and nucleus sampling (Holtzman et al. 2020), in this order.

    Args:
        temperature: What scores are divided by.
        top_k: Only so many most likely tokens stay; None = all.
        top_p: Only the most likely tokens that together have this probability stay; None = all.
    """

    def __init__(self, temperature: float, top_k: int | None = None, top_p: float | None = None) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        steps: list[Any] = [TemperatureLogitsWarper(float(temperature))]
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
