"""Chatbot Arena: people who compare the answers of two anonymous models.

Paper: Zheng et al. 2023, arXiv 2306.05685; by person as in PersonalRewardBench, arXiv 2506.05598.
Protocol: a judge is a user; judges with at least five decided comparisons in one language; the data module draws who is
seen and what is tested, whole prompts at a time.
Deviations: only dialogues of one turn, for later turns of the two sides answer different histories; the filter of
PersonalRewardBench for judges with a measurable taste is left out, since it looks at the labels that are tested.
Licence: human texts CC-BY-4.0, model responses CC-BY-NC-4.0. Gated: accept its terms on the hub.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from plm.data.schema import PairTable, make_pairs
from plm.data.sources import PairSource
from plm.data.sources.corpus import PARQUET, corpus_files, corpus_rows, of_active_users, usable

REPO = "lmsys/chatbot_arena_conversations"
COLUMNS = {
    **{name: name for name in ("judge", "winner", "turn", "conversation_a", "conversation_b", "language")},
    "tstamp": "tstamp?",
}


def decided_pair(row: Mapping[str, Any]) -> dict[str, Any] | str:
    """A comparison as a pair, or why it is none."""
    if row["turn"] != 1:
        return "several_turns"
    if row["winner"] not in ("model_a", "model_b"):
        return "undecided"
    sides = [[message["content"] for message in row[f"conversation_{side}"]] for side in "ab"]
    if any(len(side) != 2 for side in sides) or sides[0][0] != sides[1][0]:
        return "several_turns"
    texts = [side[1] for side in sides]
    won = int(row["winner"] == "model_b")
    pair = {"user_id": row["judge"], "prompt": sides[0][0], "chosen": texts[won], "rejected": texts[1 - won]}
    return pair if row["tstamp"] is None else {**pair, "timestamp": row["tstamp"]}


class ArenaPairs(PairSource):
    """Chatbot Arena comparisons by judge.

    Args:
        path: Folder with ``default/train/*.parquet``; null = download from the hub.
        min_pairs: Fewest decided comparisons of a judge.
        language: Language of the dialogues as the corpus names it; null = all.
    """

    name = "chatbot-arena"
    checked_on = "schema"

    def __init__(self, path: str | None = None, min_pairs: int = 5, language: str | None = "English") -> None:
        self.path, self.min_pairs, self.language = path, min_pairs, language

    def load(self) -> PairTable:
        """Read the comparisons and keep judges with enough of them."""
        rows = corpus_rows(corpus_files(self.path, REPO, "default/train/*.parquet", PARQUET), COLUMNS)
        spoken = [row for row in rows if self.language in (None, row["language"])]
        outcomes = [decided_pair(row) for row in spoken]
        pairs, dropped = usable([pair for pair in outcomes if not isinstance(pair, str)])
        kept = of_active_users(pairs, self.min_pairs)
        counts = Counter(why for why in outcomes if isinstance(why, str))
        counts |= Counter(other_language=len(rows) - len(spoken), few_comparisons=len(pairs) - len(kept))
        return make_pairs(kept, self.name, {**dropped, **counts})
