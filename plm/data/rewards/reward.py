"""The protocol of a reward.

Axes: N responses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from plm.arrays import Float64Array


class Reward(ABC):
    """What a response to a prompt is worth; more is better. The constructor is cheap, what it needs is read once."""

    @abstractmethod
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float64Array:
        """Reward ``(N,)`` of each of N responses to the prompt in the same row; any scale, always finite."""
