"""Rewards that are rules: length, words of a list, and habits of style.

Axes: N responses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

from plm.arrays import Float64Array
from plm.data.rewards.reward import Reward
from plm.messages import nearest

Rule = Literal[
    "questions", "exclamations", "first_person", "second_person", "distinct_words", "no_repeats", "lower_case"
]
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_FIRST = frozenset("i me my mine myself we us our ours ourselves".split())
_SECOND = frozenset("you your yours yourself yourselves".split())


def words_of(text: str) -> list[str]:
    """Words of a text in small letters, without punctuation.

    Example:
        >>> words_of("It's GREAT, isn't it?")
        ["it's", 'great', "isn't", 'it']
    """
    return [word.lower().replace("’", "'") for word in _WORD.findall(text)]


def _pronouns(known: frozenset[str]) -> Callable[[str], float]:
    """Share of the words that are among ``known``, alone or before an apostrophe (I'm, you'll)."""
    return lambda text: _mean([word.split("'")[0] in known for word in words_of(text)])


def _distinct(text: str) -> float:
    words = words_of(text)
    return len(set(words)) / len(words) if words else 0.0


def _no_repeats(text: str) -> float:
    words = words_of(text)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) / len(triples) if triples else 1.0


def _marks(mark: str) -> Callable[[str], float]:
    """How often a mark stands in a text, by its words."""
    return lambda text: text.count(mark) / max(len(text.split()), 1)


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0


_RULES: dict[str, Callable[[str], float]] = {
    "questions": _marks("?"),
    "exclamations": _marks("!"),
    "first_person": _pronouns(_FIRST),
    "second_person": _pronouns(_SECOND),
    "distinct_words": _distinct,
    "no_repeats": _no_repeats,
    "lower_case": lambda text: _mean([letter.islower() for letter in text if letter.isalpha()]),
}


class Length(Reward):
    """Rewards long responses, or those near a target number of words.

    Args:
        target: The best number of words; the reward is minus the distance from it. Null = the more the better.
    """

    def __init__(self, target: int | None = None) -> None:
        if target is not None and target < 0:
            raise ValueError(f"Length.target: expected a number of words or null, got {target!r}")
        self.target = target

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float64Array:
        """Words ``(N,)``, or minus their distance from the target."""
        words = np.array([len(text.split()) for text in responses], dtype=np.float64)
        return words if self.target is None else -np.abs(words - self.target)


class Lexicon(Reward):
    """Rewards the share of words that are in a list.

    Args:
        words: The list; capitals do not matter.
    """

    def __init__(self, words: list[str]) -> None:
        self.words = frozenset(word.lower() for word in words)
        if not self.words:
            raise ValueError("Lexicon.words: expected words, got none")

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float64Array:
        """Shares ``(N,)``; 0 for a text without words."""
        return np.array([_mean([word in self.words for word in words_of(text)]) for text in responses], dtype=float)


class Style(Reward):
    """Rewards a habit of style, measured as a share.

    ``questions`` and ``exclamations`` count marks by words; ``first_person`` and ``second_person`` are shares of the
    words; ``distinct_words`` is the type-token ratio, ``no_repeats`` the share of distinct runs of three words, and
    ``lower_case`` the share of small letters.

    Args:
        rule: Which habit.
    """

    def __init__(self, rule: Rule) -> None:
        if rule not in _RULES:
            raise ValueError(
                f"Style.rule: expected one of {', '.join(get_args(Rule))}, got {rule!r}{nearest(rule, _RULES)}"
            )
        self.rule = rule

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float64Array:
        """Shares ``(N,)``."""
        rule = _RULES[self.rule]
        return np.array([rule(text) for text in responses], dtype=np.float64)
