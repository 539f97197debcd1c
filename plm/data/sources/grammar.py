"""Short texts of a small grammar: several responses to every prompt, whose manner is known.

Written for what learns from all responses to a prompt. A response has a mood, a length, an address and an ending, each
drawn evenly and shown by words, and says something about the topic of its prompt.

Axes: P prompts, N responses of a prompt, A attributes, U people.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from plm.arrays import BoolArray
from plm.data.schema import PairTable, pair_table
from plm.data.sources import PairSource, numbered
from plm.data.sources.population import shown_prompts
from plm.data.sources.samples import everyone_pairs
from plm.messages import Problems

SUBJECTS = "tea coffee bread rain snow music chess trains ships birds bees moss stars paint soup clay".split()
VERBS = "like know use see want trust need choose buy keep".split()
WORDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "mood": (
        ("dreadful", "boring", "poor", "sad"),
        ("fine", "plain", "usual", "fair"),
        ("lovely", "great", "merry", "best"),
    ),
    "address": (("",), ("friend ,", "dear ,", "mate ,"), ("sir ,", "madam ,", "doctor ,")),
    "ending": ((".",), ("!", "! !"), ("?", ", no ?")),
    "length": ((), ("by day",), ("by day", "and at night", "and in between")),
}
"""Attribute -> what may be said at each level; of a length all is said."""


def attributes(text: str) -> dict[str, int]:
    """Levels of a response, read off its words.

    >>> attributes("sir , tea is lovely by day !")
    {'mood': 2, 'address': 2, 'ending': 1, 'length': 1}
    """
    words, found = text.split(), {"mood": 1, "address": 0, "ending": 0, "length": 0}
    for name in ("mood", "address"):
        for level, choices in enumerate(WORDS[name]):
            if any(choice.split(" ")[0] in words for choice in choices if choice):
                found[name] = level
    found["ending"] = {".": 0, "!": 1, "?": 2}.get(words[-1] if words else ".", 0)
    found["length"] = 2 if "night" in words else int("day" in words)
    return found


class GrammarResponses(PairSource):
    """All responses to prompts of a small grammar, as pairs of one user, everyone; nothing is meant by who is chosen.

    Args:
        num_prompts: Prompts P.
        num_responses: Different responses N to each.
        test_share: Share of the prompts kept for the test.
        seed: Another seed writes other texts.
    """

    def __init__(self, num_prompts: int = 160, num_responses: int = 16, test_share: float = 0.2, seed: int = 0) -> None:
        self.num_prompts, self.num_responses, self.test_share, self.seed = num_prompts, num_responses, test_share, seed
        problems = Problems("GrammarResponses.")
        problems.within(2, len(SUBJECTS) * len(VERBS), num_prompts=num_prompts)
        problems.within(2, 64, num_responses=num_responses)
        problems.inner_shares(test_share=test_share)
        problems.check()

    @property
    def name(self) -> str:
        """Size."""
        return f"grammar/{self.num_prompts}x{self.num_responses}"

    def load(self) -> PairTable:
        """Write the texts."""
        return everyone_pairs(*self.written())

    def written(self) -> tuple[list[tuple[str, list[str]]], BoolArray]:
        """Prompts with their responses, and ``(P,)`` True = a prompt of the test."""
        rng = np.random.default_rng(self.seed)
        topics = list(product(SUBJECTS, VERBS))
        responses = []
        for number in rng.permutation(len(topics))[: self.num_prompts].tolist():
            subject, verb = topics[number]
            texts: dict[str, None] = {}
            while len(texts) < self.num_responses:
                texts[f" {_respond(subject, rng)}"] = None
            responses.append((f"Do you {verb} {subject} ?", list(texts)))
        test = np.arange(self.num_prompts) < max(1, round(self.test_share * self.num_prompts))
        return responses, test


class GrammarPeople(PairSource):
    """People with planted tastes who compare the responses of a small grammar, each on prompts of their own.

    A person weighs mood, address, ending and length by standard normal numbers. Of the responses to a prompt they
    compare the best, by the weighed levels, with the worst. Scores of the pairs are these values.

    Args:
        num_people: People U.
        prompts_per_person: Training prompts shown to each; all see those of the test.
        num_prompts: See `GrammarResponses`, and so for what follows.
        num_responses: Different responses N to each prompt.
        test_share: Share of the prompts kept for the test.
        seed: Another seed writes other texts and draws other people.
    """

    def __init__(
        self,
        num_people: int = 40,
        prompts_per_person: int = 32,
        num_prompts: int = 160,
        num_responses: int = 16,
        test_share: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.texts = GrammarResponses(num_prompts, num_responses, test_share, seed)
        self.num_people, self.prompts_per_person = num_people, prompts_per_person
        problems = Problems("GrammarPeople.")
        problems.at_least(1, num_people=num_people, prompts_per_person=prompts_per_person)
        problems.check()

    @property
    def name(self) -> str:
        """Size."""
        return f"grammar_people/{self.num_people}"

    def load(self) -> PairTable:
        """Write the texts and let every person compare them."""
        responses, test = self.texts.written()
        levels = np.array([[list(attributes(text).values()) for text in texts] for _, texts in responses])  # (P, N, A)
        rng = np.random.default_rng((self.texts.seed, 1))
        values = (levels - 1.0) @ rng.standard_normal((levels.shape[-1], self.num_people))  # (P, N, U)
        shown = [shown_prompts(test, self.prompts_per_person, rng) for _ in range(self.num_people)]
        user, prompt = np.repeat(np.arange(self.num_people), [*map(len, shown)]), np.concatenate(shown)
        worth = values[prompt, :, user]  # (pairs, N)
        best, worst = worth.argmax(1), worth.argmin(1)
        pair, size = np.arange(len(prompt)), levels.shape[1]
        return pair_table(
            numbered("person", self.num_people),
            [prompt for prompt, _ in responses],
            [text for _, texts in responses for text in texts],
            user=user,
            prompt=prompt,
            chosen=prompt * size + best,
            rejected=prompt * size + worst,
            chosen_score=worth[pair, best].astype(np.float32),
            rejected_score=worth[pair, worst].astype(np.float32),
            row_split=np.where(test[prompt], 2, 0),
        )


def _respond(subject: str, rng: np.random.Generator) -> str:
    """One response."""
    levels = {name: choices[int(rng.integers(len(choices)))] for name, choices in WORDS.items()}
    said = {name: level[int(rng.integers(len(level)))] for name, level in levels.items() if name != "length"}
    parts = [said["address"], subject, "is", said["mood"], *levels["length"], said["ending"]]
    return " ".join(part for part in parts if part)
