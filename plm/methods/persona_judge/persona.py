"""Who a user is, from the user's pairs: a persona and worked examples, chosen on pairs that neither has seen.

After SynthesizeMe (arXiv 2506.05598), with a real early stop and a comparison with the judge who knows nobody.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from plm.methods.persona_judge.judge import REASON_TOKENS, Duel, Judge, Question
from plm.methods.persona_judge.prompts import (
    MAX_PERSONA,
    NOBODY,
    Demo,
    Pair,
    Persona,
    ask_pair,
    ask_persona,
    digest,
    ordered,
    reasoning_of,
    verdict,
)

LEAST_PAIRS = 4
"""Of users with fewer pairs, these are the examples, and nothing is chosen."""
TRAIN_SHARE = 0.7
ENOUGH = 0.8
"""Accuracy on held-out pairs with which a candidate is taken without trying the next."""


class Search(NamedTuple):
    """How personas are looked for."""

    num_demos: int
    """Most worked examples."""
    bootstraps: int
    """Draws of examples with the reasons of a judge who was right."""
    max_pairs: int
    """Most pairs of a user that are read."""
    seed: int
    max_bytes: int
    """Width of a state, into which candidates must fit."""


def _num_train(num_pairs: int) -> int:
    """How many of a user's pairs are learned from; at least one is, and one chooses."""
    return min(max(1, round(TRAIN_SHARE * num_pairs)), num_pairs - 1)


def split(pairs: Sequence[Pair], search: Search) -> tuple[list[Pair], list[Pair]]:
    """The pairs to learn from and those to choose on; who and when says nothing of a pair's place, its texts do."""
    texts = sorted(set(pairs), key=lambda pair: (digest(search.seed, *pair), pair))[: search.max_pairs]
    if len(texts) < LEAST_PAIRS:
        return texts, []
    num_train = _num_train(len(texts))
    return texts[:num_train], texts[num_train:]


def most_questions(num_pairs: int, search: Search) -> int:
    """Most questions that learning a user from so many different pairs takes.

    With t pairs to learn from, v to choose on and c bootstraps: ``c t`` reasons, the persona, and v pairs in both
    orders for each of ``1 + c`` sets of examples without a persona, ``2 + c`` with one, and for nobody.
    """
    num_pairs = min(num_pairs, search.max_pairs)
    if num_pairs < LEAST_PAIRS:
        return 0
    num_train = _num_train(num_pairs)
    return search.bootstraps * num_train + 1 + 2 * (num_pairs - num_train) * (4 + 2 * search.bootstraps)


def learn(judge: Judge, pairs: Sequence[Pair], search: Search) -> Persona:
    """The persona of a user without ties: of nobody where there are no pairs."""
    train, held = split(pairs, search)
    shown = [ordered(pair, search.seed) for pair in train]

    def candidate(text: str, demos: Sequence[Demo]) -> Persona:
        return Persona(text, tuple(demos)).fitted(search.max_bytes)

    labelled = shown[: search.num_demos]
    if not held:
        return candidate("", labelled)
    sets = [labelled, *(_bootstrap(judge, train, search, number) for number in range(search.bootstraps))]
    told = _first_good(judge, [candidate("", demos) for demos in sets], held).demos
    others = [demo for demo in shown if all({*demo[:3]} != {*one[:3]} for one in told)]
    [answer] = judge.ask([Question(ask_persona((*told, *others)), REASON_TOKENS)])
    text = answer.text.strip()[:MAX_PERSONA]
    return _first_good(judge, [candidate(text, demos) for demos in ([], *sets)], held, NOBODY)


def _first_good(
    judge: Judge, candidates: Sequence[Persona], held: Sequence[Pair], otherwise: Persona | None = None
) -> Persona:
    """The first candidate that is right often enough, else the first of the best; ``otherwise``, if that is better."""
    best, best_accuracy = candidates[0], -1.0
    for candidate in candidates:
        accuracy = _accuracy(judge, candidate, held)
        if accuracy > best_accuracy:
            best, best_accuracy = candidate, accuracy
        if accuracy >= ENOUGH:
            break
    return otherwise if otherwise is not None and _accuracy(judge, otherwise, held) > best_accuracy else best


def _accuracy(judge: Judge, persona: Persona, pairs: Sequence[Pair]) -> float:
    """Share of pairs whose preferred response is likelier; the half of ties."""
    chances = judge.preferences([Duel(persona, *pair) for pair in pairs])
    return sum((chance > 0.5) + 0.5 * (chance == 0.5) for chance in chances) / len(pairs)


def _bootstrap(judge: Judge, train: Sequence[Pair], search: Search, number: int) -> list[Demo]:
    """Pairs on which a judge with other pairs as examples agreed with the user, with its reasons.

    The first draw takes pairs in order and as many as there may be, later ones in another order and some of them.
    """
    draw = random.Random(digest(search.seed + number, *(text for pair in train for text in pair)))
    order, most = list(train), search.num_demos
    if number:
        draw.shuffle(order)
        most = draw.randint(1, most) if most else 0
    demos = [ordered(pair, search.seed + number) for pair in order]
    questions = []
    for place, demo in enumerate(demos):
        others = Persona("", tuple([*demos[:place], *demos[place + 1 :]][: search.num_demos]))
        questions.append(Question(ask_pair(others, demo.prompt, demo.first, demo.second, True), REASON_TOKENS))
    answers = judge.ask(questions)
    kept = [
        demo._replace(reasoning=reasoning_of(answer))
        for demo, answer in zip(demos, answers, strict=True)
        if verdict(answer) == demo.preference
    ]
    return kept[:most]
