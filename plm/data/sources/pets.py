"""Pets: a tiny conflict between people who prefer dogs and people who prefer cats.

Paper: VPL, arXiv 2408.10075 (there the users are called helpful and harmless).
Protocol: one prompt; one-sentence answers about birds, dogs, cats and rabbits; everybody ranks birds first and rabbits
last; about half of the pairs are the one in dispute, dog against cat; test sentences never occur in training.
Deviations: the sentences are our own, 100 per animal, the first 80 for training (the released ones leave 3 to 15 for
the test, one of which is in training); pairs are not repeated to give the dispute more weight; many people share a
type. A model that ignores the person is right on 75 % of the pairs ("full") or 50 % ("controversial").
Licence: that of this package.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from plm.data.sources.typed import TARGET, TEST, TypedPairs, TypedPool

PROMPT = "Say one thing about a pet that people keep."
ANIMALS = ("bird", "dog", "cat", "rabbit")
OPENINGS = (
    "My neighbour's {pet}", "A {pet}", "Every {pet} I have met", "The oldest {pet} in our street", "A happy {pet}",
    "Your first {pet}", "A young {pet}", "The {pet} of my aunt", "A well kept {pet}", "Almost any {pet}",
)  # fmt: skip
ENDINGS = {
    "bird": ("sings before breakfast", "learns a tune in a month", "needs room to spread its wings",
             "likes a branch near the window", "picks at millet all day", "watches the garden from above",
             "bathes in a shallow bowl", "calls when someone comes home", "sleeps with its head turned back",
             "knows the voice of its people"),
    "dog": ("wants a long walk in any weather", "brings the ball back again", "guards the door at night",
            "waits at the gate for its people", "learns to sit in an afternoon", "digs where the beds are fresh",
            "sleeps best near your feet", "greets strangers with a bark", "swims after every stick",
            "follows a scent for an hour"),
    "cat": ("naps on the warmest shelf", "comes when it wants to", "hunts moths in the hall",
            "washes its paws after dinner", "prefers a box to a bed", "purrs when the stove is lit",
            "sharpens its claws on the sofa", "steps over glasses without a sound", "stares at an empty corner",
            "sits on whatever you read"),
    "rabbit": ("nibbles hay through the night", "thumps when something is wrong", "hides under the bench",
               "likes parsley more than carrots", "chews every cable it finds", "digs a hollow in the straw",
               "freezes when a shadow passes", "grooms its ears with both feet", "lives best with another one",
               "hops in circles around the run"),
}  # fmt: skip
AGREED = (("bird", "dog"), ("cat", "rabbit"), ("bird", "cat"), ("dog", "rabbit"), ("bird", "rabbit"))
NUM_TRAIN = 80


def sentences(animal: str) -> list[str]:
    """100 distinct sentences about an animal; every ten of them use every opening and every ending once."""
    ends = ENDINGS[animal]
    return [f"{OPENINGS[row % 10].format(pet=animal)} {ends[(row + row // 10) % 10]}." for row in range(100)]


class PetsPairs(TypedPairs):
    """Pets: people who like dogs or cats better and agree about birds and rabbits.

    Args:
        variant: full = half of the pairs are in dispute; controversial = all are.
        pool_size: Training pairs written; a fifth as many for the test.
        **people: The arguments of `TypedPairs`.
    """

    def __init__(
        self, variant: Literal["full", "controversial"] = "full", pool_size: int = 2000, **people: Any
    ) -> None:
        super().__init__(**people)
        self.variant, self.pool_size = variant, pool_size

    @property
    def name(self) -> str:
        """The variant."""
        return f"pets-{self.variant}"

    def read_pool(self) -> TypedPool:
        """Write the pairs: the better animal of an agreed pair, and the dog of a dispute, is on the left."""
        rng = np.random.default_rng([self.seed, 2])
        kinds = [*AGREED, *[("dog", "cat")] * len(AGREED)] if self.variant == "full" else [("dog", "cat")]
        texts = {animal: sentences(animal) for animal in ANIMALS}
        opinions: dict[tuple[str, str, str], tuple[list[int], int]] = {}
        for part, share, low, high in ((TARGET, 1, 0, NUM_TRAIN), (TEST, 5, NUM_TRAIN, 100)):
            for _ in range(self.pool_size // share):
                left, right = kinds[rng.integers(len(kinds))]
                pair = (PROMPT, texts[left][rng.integers(low, high)], texts[right][rng.integers(low, high)])
                opinions.setdefault(pair, ([1, -1 if (left, right) == ("dog", "cat") else 1], part))
        return TypedPool.of(["dogs", "cats"], opinions)
