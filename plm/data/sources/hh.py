"""Relabelled HH: people who want help in conflict with people who want no harm.

Corpus: Bai et al. 2022, arXiv 2204.05862 (helpful-base and harmless-base of HH-RLHF); as two conflicting users in VPL,
arXiv 2408.10075.
Protocol: both types agree with the labels of helpful-base; on harmless-base the harmless type keeps the label and the
helpful type reverses it, for the reply marked as harmful is mostly the one that does as asked. The prompt is the
dialogue so far; the corpus's own test half is the test.
Deviations: VPL ships labels of its own, whose making is not described; this rule is ours, so results are comparable
among methods here and not with its tables. Many people share a type, see ``typed``.
Licence: MIT. The texts hold offensive content.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from plm.data.conversations import transcript
from plm.data.sources.corpus import corpus_files, corpus_rows
from plm.data.sources.typed import TARGET, TEST, TypedPairs, TypedPool
from plm.data.values import canonical_messages

REPO = "Anthropic/hh-rlhf"
TYPES = ("helpful", "harmless")


def split_dialogue(text: str) -> tuple[str, str] | None:
    r"""A transcript as (messages before the last reply, last reply); None where it does not end with a reply.

    Example:
        >>> split_dialogue("\n\nHuman: Hi\n\nAssistant: Hello.")
        ('[{"role":"user","content":"Hi"}]', 'Hello.')
    """
    messages = transcript(text)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return None
    return canonical_messages(messages[:-1]), messages[-1]["content"]


class HHPairs(TypedPairs):
    """Relabelled HH: helpful and harmless people who disagree on the harmless half.

    Args:
        path: Folder with ``helpful-base/`` and ``harmless-base/``; null = download from the hub.
        support_pairs: Pairs an unseen person gives.
        target_pairs: Further training pairs of a seen person.
        test_pairs: Test pairs of everyone.
        **people: The other arguments of `TypedPairs`.
    """

    name = "hh-relabelled"
    checked_on = "schema"

    def __init__(
        self,
        path: str | None = None,
        support_pairs: int = 16,
        target_pairs: int = 64,
        test_pairs: int = 64,
        **people: Any,
    ) -> None:
        super().__init__(support_pairs=support_pairs, target_pairs=target_pairs, test_pairs=test_pairs, **people)
        self.path = path

    def read_pool(self) -> TypedPool:
        """Read both subsets; a pair of transcripts that share nothing but the question is left out."""
        dropped: Counter[str] = Counter()
        opinions: dict[tuple[str, str, str], tuple[list[int], int]] = {}
        test_prompts: set[str] = set()
        for half, part in (("test", TEST), ("train", TARGET)):
            for subset in TYPES:
                files = corpus_files(self.path, REPO, f"{subset}-base/{half}.jsonl*")
                for row in corpus_rows(files, {"chosen": "chosen", "rejected": "rejected"}):
                    better, worse = split_dialogue(row["chosen"]), split_dialogue(row["rejected"])
                    if better is None or worse is None:
                        dropped["no_last_reply"] += 1
                        continue
                    (prompt, chosen), (other, rejected) = better, worse
                    reasons = {
                        "other_dialogue": prompt != other,
                        "same_text": chosen == rejected,
                        "prompt_of_the_test": part == TARGET and prompt in test_prompts,
                        "duplicates": (prompt, chosen, rejected) in opinions,
                    }
                    if any(reasons.values()):
                        dropped[next(why for why, holds in reasons.items() if holds)] += 1
                        continue
                    if part == TEST:
                        test_prompts.add(prompt)
                    opinions[prompt, chosen, rejected] = [-1 if subset == "harmless" else 1, 1], part
        if not opinions:
            raise ValueError(f"expected transcripts that end with the assistant's reply in {REPO}, got none")
        return TypedPool.of(TYPES, opinions, dropped)
