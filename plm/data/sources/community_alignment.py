"""Community Alignment: people of five countries who pick the best of four replies, turn by turn.

Paper: Zhang et al. 2025, arXiv 2507.09650.
Protocol: an annotator is a user; every reply that was not picked is a pair of its own; the prompt is the dialogue so
far as chat messages, continued with the picked replies. The pairs of one dialogue carry its id, so that the data module
keeps them on one side: pairs of one turn share the picked reply, and dividing them raises accuracy without any merit.
Deviations: none known; the paper splits by annotator and prompt for other purposes.
Licence: CC-BY-4.0, by its dataset card.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plm.data.schema import PairTable, make_pairs
from plm.data.sources import PairSource
from plm.data.sources.corpus import PARQUET, corpus_files, corpus_rows, of_active_users, usable

REPO = "facebook/community-alignment-dataset"
TURNS = ("first", "second", "third", "fourth")
LETTERS = "abcd"
COLUMNS = {
    **{name: name for name in ("conversation_id", "annotator_id", "assigned_lang")},
    **{
        f"{turn}_turn_{field}": f"{turn}_turn_{field}" + ("" if turn == "first" else "?")
        for turn in TURNS
        for field in ("prompt", "preferred_response", *(f"response_{letter}" for letter in LETTERS))
    },
}


def picked_letter(value: str | None) -> str | None:
    """Which reply was picked: ``response_b``, ``b`` and ``B`` are ``b``; None where there is no answer.

    Example:
        >>> picked_letter("response_b")
        'b'
    """
    letter = value.strip().lower()[-1:] if value else ""
    return letter if letter and letter in LETTERS else None


def dialogue_pairs(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs of one dialogue, up to the first turn without a pick."""
    pairs: list[dict[str, Any]] = []
    history: list[dict[str, str]] = []
    for number, turn in enumerate(TURNS):
        prompt, letter = row[f"{turn}_turn_prompt"], picked_letter(row[f"{turn}_turn_preferred_response"])
        if not prompt or letter is None:
            break
        history = [*history, {"role": "user", "content": prompt}]
        chosen = row[f"{turn}_turn_response_{letter}"]
        pairs += [
            {
                "user_id": row["annotator_id"],
                "prompt": history,
                "chosen": chosen,
                "rejected": row[f"{turn}_turn_response_{other}"],
                "dialogue_id": row["conversation_id"],
                "turn": number,
            }
            for other in LETTERS
            if other != letter and row[f"{turn}_turn_response_{other}"] is not None
        ]
        if chosen is None:
            break
        history = [*history, {"role": "assistant", "content": chosen}]
    return pairs


class CommunityAlignmentPairs(PairSource):
    """Community Alignment dialogues by annotator.

    Args:
        path: Folder with ``default/train/*.parquet``; null = download from the hub.
        min_pairs: Fewest pairs of an annotator.
        language: Language of the dialogues as the corpus names it, such as ``en``; null = all.
    """

    name = "community-alignment"
    checked_on = "schema"

    def __init__(self, path: str | None = None, min_pairs: int = 30, language: str | None = None) -> None:
        self.path, self.min_pairs, self.language = path, min_pairs, language

    def load(self) -> PairTable:
        """Read the dialogues and keep annotators with enough pairs."""
        rows = corpus_rows(corpus_files(self.path, REPO, "default/train/*.parquet", PARQUET), COLUMNS)
        spoken = [row for row in rows if self.language in (None, row["assigned_lang"])]
        pairs, dropped = usable([pair for row in spoken for pair in dialogue_pairs(row)])
        kept = of_active_users(pairs, self.min_pairs)
        return make_pairs(kept, self.name, {**dropped, "few_pairs": len(pairs) - len(kept)})
