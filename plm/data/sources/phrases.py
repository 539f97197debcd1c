"""The words of the synthetic source: prompts and assistant replies written from templates with measurable attributes.

Axes: I texts, A attributes.

An attribute of a text is how often its keyword occurs. Every phrase of an attribute holds its keyword exactly once and
no other text holds it, so an attribute is a linear function of word counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from plm.arrays import IntArray

# attribute -> (keyword, phrases), in the order in which they stand in a reply
OPENING = {
    "warmth": (
        "glad",
        ["I am so glad you asked.", "How glad I am to help with this!", "Very glad to think along with you."],
    ),
    "formality": (
        "therefore",
        [
            "One ought therefore to proceed with some order.",
            "It is therefore proper to begin at the beginning.",
            "The matter therefore deserves a considered reply.",
        ],
    ),
    "praise": (
        "excellent",
        [
            "That is an excellent question.",
            "You have made an excellent start already.",
            "What an excellent goal to have.",
        ],
    ),
}
MIDDLE = {
    "detail": (
        "specifically",
        [
            "More specifically, plan on two sessions of forty minutes each week.",
            "Look specifically at cost, time and effort, in that order.",
            "Write down, specifically, what changed since the last attempt.",
        ],
    ),
    "examples": (
        "example",
        [
            "For example, my neighbour began with ten minutes a day.",
            "A good example is the way small teams keep one shared list.",
            "Take the example of a person who tried it for a month.",
        ],
    ),
    "steps": (
        "step",
        [
            "The next step is to choose one thing and do it today.",
            "Make every step small enough to finish before lunch.",
            "End each step with a short note of what worked.",
        ],
    ),
    "evidence": (
        "studies",
        [
            "Several studies point the same way.",
            "According to studies of beginners, steady practice wins.",
            "There are studies that followed people for a year.",
        ],
    ),
    "hedging": (
        "perhaps",
        [
            "This is perhaps not true for everybody.",
            "Or perhaps another way would suit you better.",
            "It could perhaps take longer than it sounds.",
        ],
    ),
}
CLOSING = {
    "caution": (
        "careful",
        ["Be careful not to do too much at once.", "A careful person would ask an expert first.",
         "Please stay careful when money is involved."],
    ),
    "humour": (
        "joke",
        ["As the old joke goes, the first mistake is free.", "My only joke on the subject is sadly unprintable.",
         "Even the worst joke helps on a slow day."],
    ),
    "questions": (
        "tell",
        ["Could you tell me how much time you have?", "Will you tell me what you tried before?",
         "Can you tell me who else is involved?"],
    ),
    "confidence": (
        "certainly",
        ["This will certainly work if you keep at it.", "You can certainly do it.",
         "It is certainly worth the effort."],
    ),
}  # fmt: skip
ATTRIBUTES = {**OPENING, **MIDDLE, **CLOSING}
NAMES = tuple(ATTRIBUTES)
MAX_LEVEL = 2

TASKS = (
    "learn", "teach", "plan", "improve", "explain", "organise", "compare", "practise", "budget for", "write about",
    "get better at", "start with", "talk about", "set goals for", "stay motivated for", "find time for",
)  # fmt: skip
TOPICS = (
    "sourdough baking", "public speaking", "a vegetable garden", "marathon training", "household savings",
    "chess openings",
    "watercolour painting", "a job interview", "Spanish verbs", "home insulation", "a school play", "bicycle repair",
    "meditation", "weekly meal prep", "a first novel", "night photography", "data analysis", "beekeeping",
    "choir singing",
    "a move abroad", "composting", "piano scales", "a small bakery", "bird watching", "first aid", "a family budget",
    "knitting", "a reading club", "trail maps", "remote work", "calculus", "a wedding speech",
)  # fmt: skip
SITUATIONS = (
    "as a complete beginner", "with two small children", "on a tight budget", "before the end of the month",
    "after a long break", "together with a friend", "in the evenings", "without any special tools", "in a small flat",
    "with a demanding job", "for a group of ten", "during the winter",
)  # fmt: skip
CORES = (
    "When you {task} {topic} {situation}, begin with what you have.",
    "To {task} {topic} {situation} takes patience more than talent.",
    "People who {task} {topic} {situation} mostly need a simple plan.",
    "If you want to {task} {topic} {situation}, keep the first week easy.",
)
FILLERS = (
    "Most of it is habit.", "Keep a notebook near you.", "Rest matters as well.", "The first try rarely counts.",
    "Ask around for used material.", "Mornings are often calm.", "A friend can keep you honest.", "Good light helps.",
    "Leave some room for surprises.", "Nothing here needs to be perfect.", "Set a timer and begin.",
    "Water and air help too.",
    "Old books are full of advice.", "A short walk clears the head.", "Music makes it lighter.", "Keep the receipts.",
    "Start again on Monday.", "Thursday is a fine day for it.", "Put the phone in another room.",
    "Small changes add up.",
)  # fmt: skip
NUM_PROMPTS = len(TASKS) * len(TOPICS) * len(SITUATIONS)


def prompt_texts(rows: Sequence[int]) -> list[tuple[str, dict[str, str]]]:
    """(prompt, its parts) for numbers below ``NUM_PROMPTS``; other numbers, other prompts."""
    out = []
    for row in rows:
        rest, task = divmod(row, len(TASKS))
        situation, topic = divmod(rest, len(TOPICS))
        parts = {"task": TASKS[task], "topic": TOPICS[topic], "situation": SITUATIONS[situation]}
        out.append(("How do I {task} {topic} {situation}?".format(**parts), parts))
    return out


def reply_text(levels: Sequence[int], parts: dict[str, str], draws: Sequence[int]) -> str:
    """A reply that holds ``levels[a]`` phrases of attribute a, filled up with neutral sentences.

    Args:
        levels: ``(A,)`` 0 to ``MAX_LEVEL`` per attribute.
        parts: Parts of the prompt.
        draws: ``(A + 2,)`` large random numbers: which phrases, core and fillers.

    Returns:
        The text.
    """
    core = CORES[draws[-1] % len(CORES)].format(**parts)
    sentences: list[str] = []
    for index, (_, phrases) in enumerate(ATTRIBUTES.values()):
        if index == len(OPENING):
            sentences.append(core)
        first = draws[index]
        sentences += [phrases[(first + shift) % len(phrases)] for shift in range(levels[index])]
    filler = draws[-2]
    for _ in range(3):
        filler, pick = divmod(filler, len(FILLERS))
        filler, place = divmod(filler, len(sentences))
        sentences.insert(place + 1, FILLERS[pick])
    return " ".join(sentences)


def measure(texts: Sequence[str]) -> IntArray:
    """Attributes of texts, ``(I, A)``: how often each keyword occurs.

    Example:
        >>> dict(zip(NAMES, measure(["I am so glad you asked."])[0].tolist()))["warmth"]
        1
    """
    column = {keyword: index for index, (keyword, _) in enumerate(ATTRIBUTES.values())}
    out = np.zeros((len(texts), len(ATTRIBUTES)), dtype=np.int64)
    for row, text in enumerate(texts):
        for word in re.findall(r"[a-z]+", text.lower()):
            if word in column:
                out[row, column[word]] += 1
    return out
