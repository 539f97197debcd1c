"""The protocol of a reward.

Axes: N responses, A rewards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from plm.arrays import Float64Array


class Reward(ABC):
    """What a response to a prompt is worth; more is better. The constructor is cheap, what it needs is read once."""

    @abstractmethod
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float64Array:
        """Reward ``(N,)`` of each of N responses to the prompt in the same row; any scale, always finite."""


def scores_of(rewards: Mapping[str, Reward], prompts: Sequence[str], responses: Sequence[str]) -> Float64Array:
    """Every reward of N responses to the prompts in the same rows: ``(N, A)``.

    Raises:
        ValueError: If a score is no finite number.
    """
    columns = []
    for name, reward in rewards.items():
        values = reward.score(prompts, responses)
        if values.shape != (len(responses),) or not np.isfinite(values).all():
            raise ValueError(
                f"expected a finite score of each of {len(responses)} responses from the reward {name!r}, got "
                f"shape {values.shape} with {int((~np.isfinite(values)).sum())} that are not"
            )
        columns.append(values)
    return np.stack(columns, axis=1)
