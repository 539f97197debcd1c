"""What a response is worth, computed without a network: the tastes of simulated people, and the judges of policies.

Axes: N responses.
"""

from __future__ import annotations

from plm.data.rewards.reward import Reward, scores_of
from plm.data.rewards.sentiment import Sentiment
from plm.data.rewards.style import Length, Lexicon, Style

__all__ = ["Length", "Lexicon", "Reward", "Sentiment", "Style", "scores_of"]
