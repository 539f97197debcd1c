"""PRISM: 1,396 people of 75 countries in live dialogues with language models.

Paper: Kirk et al. 2024, arXiv 2404.16019. Split: LoRe, arXiv 2504.14439, as its released code draws it.
Protocol: every rejected response of a turn is a pair of its own (up to three in the first turn, one later); the prompt
is the whole dialogue so far as chat messages, continued with the chosen replies; people with more than five dialogues;
people shuffled (seed 123), 80 % seen; the dialogues of each shuffled, one half train, the other test.
Deviations: LoRe's released code keeps one row per turn with all rejected responses as one *list*, which the chat
template prints with its brackets: the label can be read off the formatting. Here a response is a text or an error.
Equal scores (the corpus breaks those ties at random) are marked as ties. People are shuffled from the order of their
numbers.
Licence: human texts CC-BY-4.0, model responses CC-BY-NC-4.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from plm.data.schema import PairTable, make_pairs
from plm.data.sources import PairSource
from plm.data.sources.corpus import corpus_files, corpus_rows, usable

REPO = "HannahRoseKirk/prism-alignment"
NO_TEXT = (None, "", "EMPTY STRING")
"""What the corpus writes where a model gave no reply."""


def natural(name: str) -> list[int | str]:
    """Sort key by the numbers in a name: user2 before user10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def lore_split(
    dialogues: Mapping[str, Iterable[str]], seed: int = 123, seen_share: float = 0.8, min_dialogues: int = 6
) -> tuple[dict[str, str], dict[str, str]]:
    """LoRe's split: who is seen, and which half of a person's dialogues trains.

    Args:
        dialogues: All people -> their dialogues; those with too few are left out *after* the shuffle.
        seed: Of numpy's legacy generator, which the published split was drawn with.
        seen_share: Share of all people who are seen.
        min_dialogues: Fewest dialogues of a person who is kept.

    Returns:
        person -> ``seen`` or ``unseen``, and dialogue -> ``train`` or ``test``.
    """
    shuffle = np.random.RandomState(seed).shuffle
    users = sorted(dialogues, key=natural)
    shuffle(users)
    num_seen = int(seen_share * len(users))
    users_of = {user: "seen" if row < num_seen else "unseen" for row, user in enumerate(users)}
    users_of = {user: split for user, split in users_of.items() if len(set(dialogues[user])) >= min_dialogues}
    rows_of: dict[str, str] = {}
    for user in users_of:
        user_dialogues = sorted(set(dialogues[user]), key=natural)
        shuffle(user_dialogues)
        half = len(user_dialogues) // 2
        rows_of |= {dialogue: "train" if row < half else "test" for row, dialogue in enumerate(user_dialogues)}
    return users_of, rows_of


def dialogue_pairs(utterances: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of one dialogue, turn by turn, up to the first turn without a chosen reply."""
    pairs: list[dict[str, Any]] = []
    history: list[dict[str, str]] = []
    for turn in sorted({row["turn"] for row in utterances}):
        rows = [row for row in utterances if row["turn"] == turn and row["model_response"] not in NO_TEXT]
        chosen = next((row for row in rows if row["if_chosen"]), None)
        if chosen is None or chosen["user_prompt"] in NO_TEXT:
            break
        history = [*history, {"role": "user", "content": chosen["user_prompt"]}]
        for row in rows:
            if row is not chosen:
                pair = {"user_id": row["user_id"], "dialogue_id": row["conversation_id"], "turn": turn}
                pair |= {"prompt": history, "chosen": chosen["model_response"], "rejected": row["model_response"]}
                pair |= {"chosen_score": chosen["score"], "rejected_score": row["score"]}
                pairs.append({**pair, "tie": chosen["score"] is not None and chosen["score"] == row["score"]})
        history = [*history, {"role": "assistant", "content": chosen["model_response"]}]
    return pairs


class PrismPairs(PairSource):
    """PRISM dialogues as pairs with LoRe's split.

    Args:
        path: Folder with ``utterances.jsonl`` and ``survey.jsonl``; null = download from the hub.
        seed: Of the split.
        seen_share: Share of the people who are seen: 0.8 in the released code, 0.5 in the paper.
        min_dialogues: Fewest dialogues of a person.
    """

    name = "prism"
    checked_on = "schema"

    def __init__(
        self, path: str | None = None, seed: int = 123, seen_share: float = 0.8, min_dialogues: int = 6
    ) -> None:
        self.path, self.seed, self.seen_share, self.min_dialogues = path, seed, seen_share, min_dialogues

    def load(self) -> PairTable:
        """Read the utterances of everyone who completed a dialogue, pair and split them."""
        wanted = "conversation_id user_id turn user_prompt model_response score if_chosen".split()
        survey = {"user_id": "user_id", "done": "num_completed_conversations"}
        people = {
            row["user_id"] for row in corpus_rows(corpus_files(self.path, REPO, "survey.jsonl"), survey) if row["done"]
        }
        dialogues: dict[str, list[dict[str, Any]]] = {}
        files = corpus_files(self.path, REPO, "utterances.jsonl")
        for row in corpus_rows(files, {name: name for name in wanted}):
            if row["user_id"] in people:
                dialogues.setdefault(row["conversation_id"], []).append(row)
        pairs, dropped = usable([pair for rows in dialogues.values() for pair in dialogue_pairs(rows)])
        dialogues_of: dict[str, list[str]] = {user: [] for user in people}
        for pair in pairs:
            dialogues_of[pair["user_id"]].append(pair["dialogue_id"])
        users_of, rows_of = lore_split(dialogues_of, self.seed, self.seen_share, self.min_dialogues)
        kept = [
            {**pair, "user_split": users_of[pair["user_id"]], "row_split": rows_of[pair["dialogue_id"]]}
            for pair in pairs
            if pair["user_id"] in users_of
        ]
        return make_pairs(kept, self.name, {**dropped, "few_dialogues": len(pairs) - len(kept)})
