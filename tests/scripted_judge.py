"""A judge that follows a rule: it prefers short or long responses, as the persona or the examples before it say."""

from __future__ import annotations

import math
import re
import threading

from plm.backbones import Answer, Messages
from plm.testing.judge import blocks

SURE = 0.9


class Script:
    """Answers as a language model would.

    Args:
        bias: Added to the probability of the response that is shown first.
        junk: Every so manieth verdict is none; 0 = none is.
        logprobs: Whether the answer brings log-probabilities.
        default: What it prefers when nothing tells: ``long``, ``short`` or ``neither``.
        ignores: Whether it never heeds what it is told of a person.
    """

    name = "script"

    def __init__(
        self, bias: float = 0.0, junk: int = 0, logprobs: bool = True, default: str = "long", ignores: bool = False
    ) -> None:
        self.bias, self.junk, self.logprobs, self.default, self.ignores = bias, junk, logprobs, default, ignores
        self.asked: list[Messages] = []
        self.lock = threading.Lock()

    def __call__(
        self,
        messages: Messages,
        max_tokens: int,
        temperature: float,
        seed: int,
        begin: str = "",
        with_logprobs: bool = True,
    ) -> Answer:
        with self.lock:
            self.asked.append(messages)
            number = len(self.asked)
        last = messages[-1]["content"]
        if "PREFERENCE:" not in last and "SCORE:" not in last:
            shown = blocks(last)
            pairs = list(zip(shown["Preferred response"], shown["Other response"], strict=True))
            shorter = sum(len(better) < len(worse) for better, worse in pairs)
            return self.answer(f"This person likes {'short' if 2 * shorter > len(pairs) else 'long'} responses.", {})
        if self.junk and number % self.junk == 0:
            return self.answer("Both have their merits.", {})
        taste, shown = self.taste(messages), blocks(last)
        if "SCORE:" in last:
            length = min(9, 1 + len(shown["Response"][0]) // 10)
            mark = str({"long": length, "short": 10 - length, "neither": 5}[taste])
            return self.answer(f"SCORE: {mark}", {mark: 0.0})
        first, second = len(shown["Response A"][0]), len(shown["Response B"][0])
        chance = 0.5
        if taste != "neither" and first != second:
            chance = SURE if (first < second) == (taste == "short") else 1 - SURE
        chance = min(0.99, max(0.01, chance + self.bias))
        letter = "A" if chance >= 0.5 else "B"
        text = f"I would take the {taste} one.\nPREFERENCE: {letter}"
        return self.answer(text, {"A": math.log(chance), "B": math.log(1 - chance)})

    def taste(self, messages: Messages) -> str:
        """What the person likes, by the persona, else by the majority of the examples."""
        if self.ignores:
            return self.default
        if said := re.search(r"likes (short|long)", messages[0]["content"]):
            return said.group(1)
        shorter = longer = 0
        for question, reply in zip(messages[1:-1:2], messages[2:-1:2], strict=True):
            shown = blocks(question["content"])
            sides = shown["Response A"][0], shown["Response B"][0]
            better, worse = sides if reply["content"].endswith("A") else sides[::-1]
            shorter, longer = shorter + (len(better) < len(worse)), longer + (len(better) > len(worse))
        return self.default if shorter == longer else "short" if shorter > longer else "long"

    def answer(self, text: str, chances: dict[str, float]) -> Answer:
        """A text, and log-probabilities of its last letter."""
        tokens = [(text[:-1], {}), (text[-1], chances)] if self.logprobs else []
        return Answer(text, tokens, 10, 2)
