"""UltraFeedback-P: types of people who each look at one of four ratings.

Paper: VPL, arXiv 2408.10075 (UF-P-2: helpfulness against honesty; UF-P-4: all four ratings).
Protocol: pairs of the cleaned binarised set, joined with the four ratings of both responses; a type prefers the
response with the higher rating on its attribute; only pairs about which two types disagree; a survey pool of 100 of
them, about which all have an opinion, is the only source of support.
Deviations: equal ratings give *no* opinion (the released code flips a coin, which makes 72 % of its conflicts); for two
types the conflict is between these two (the released code asks all four attributes); survey pairs are left out of the
targets; the test prompts are 10 % by a hash of the prompt, not of the pairs; many people share a type, see ``typed``.
Licence: MIT (both corpora, by their dataset cards).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plm.arrays import IntArray
from plm.data.keys import digest, mix, seed_key
from plm.data.sources.corpus import PARQUET, corpus_files, corpus_rows
from plm.data.sources.typed import SURVEY, TARGET, TEST, TypedPairs, TypedPool, conflict, number_texts

RATINGS_REPO = "openbmb/UltraFeedback"
PAIRS_REPO = "argilla/ultrafeedback-binarized-preferences-cleaned"
ATTRIBUTES = ("helpfulness", "honesty", "instruction_following", "truthfulness")
TEST_SHARE = 0.1


def ratings_of(completion: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The four ratings of a completion; None where one is missing or N/A."""
    ratings = [str((completion["annotations"].get(name) or {}).get("Rating")) for name in ATTRIBUTES]
    return tuple(int(text) for text in ratings) if all(text.isdigit() for text in ratings) else None


def opinions(left: IntArray, right: IntArray) -> IntArray:
    """Who is better on each attribute: ratings ``(N, T)``, ``(N, T)`` -> 1, -1, or 0 for equal ones."""
    sign: IntArray = np.sign(left - right)
    return sign


def parts(prompts: Sequence[str], opinion: IntArray, survey_size: int, seed: int) -> IntArray:
    """``(N,)`` SURVEY, TARGET or TEST of every pair: test by prompt, survey from what all have a view on."""
    names = list(dict.fromkeys(prompts))
    order = np.argsort(mix(digest(names), seed_key(seed)), kind="stable")
    held = {names[row] for row in order[: max(1, round(TEST_SHARE * len(names)))].tolist()}
    part = np.array([TEST if prompt in held else TARGET for prompt in prompts], dtype=np.int64)
    able = np.flatnonzero((part == TARGET) & (opinion != 0).all(axis=1))
    part[np.random.default_rng(seed).permutation(able)[:survey_size]] = SURVEY
    return part


class UltraFeedbackPPairs(TypedPairs):
    """UltraFeedback-P-2 or -4: people who judge by one rating each, on pairs that divide them.

    Args:
        path: Folder with one subfolder per dataset, named as on the hub; null = download from the hub.
        types: Attributes that have people: two of them for UF-P-2, all four for UF-P-4.
        survey_size: Pairs set apart as the only source of support.
        **people: The arguments of `TypedPairs`.
    """

    checked_on = "schema"

    def __init__(
        self,
        path: str | None = None,
        types: Sequence[str] = ("helpfulness", "honesty"),
        survey_size: int = 100,
        **people: Any,
    ) -> None:
        super().__init__(**people)
        self.path, self.types, self.survey_size = path, list(types), survey_size
        if len(set(self.types)) < 2 or not set(self.types) <= set(ATTRIBUTES):
            raise ValueError(f"types: expected two or more of {', '.join(ATTRIBUTES)}, got {self.types!r}")

    @property
    def name(self) -> str:
        """The number of types."""
        return f"ultrafeedback-p-{len(self.types)}"

    def read_pool(self) -> TypedPool:
        """Join pairs with ratings and keep those that divide the types."""
        inside = None if self.path is None else self.path.rstrip("/")
        rating: dict[tuple[str, str], tuple[int, ...]] = {}
        columns = {"instruction": "instruction", "completions": "completions"}
        files = corpus_files(inside and f"{inside}/{RATINGS_REPO}", RATINGS_REPO, "*.jsonl")
        for row in corpus_rows(files, columns):
            for completion in row["completions"]:
                if (ratings := ratings_of(completion)) is not None:
                    rating[row["instruction"], completion["response"]] = ratings
        files = corpus_files(inside and f"{inside}/{PAIRS_REPO}", PAIRS_REPO, "default/train/*.parquet", PARQUET)
        texts: dict[tuple[str, str, str], None] = {}
        dropped = dict.fromkeys(("unrated", "empty", "same_text", "duplicates"), 0)
        for row in corpus_rows(files, {name: name for name in ("prompt", "chosen", "rejected")}):
            left, right = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
            reasons = {
                "unrated": (row["prompt"], left) not in rating or (row["prompt"], right) not in rating,
                "empty": not (left.strip() and right.strip()),
                "same_text": left == right,
                "duplicates": (row["prompt"], left, right) in texts,
            }
            if any(reasons.values()):
                dropped[next(why for why, holds in reasons.items() if holds)] += 1
            else:
                texts[row["prompt"], left, right] = None
        if not texts:
            raise ValueError(f"expected pairs of {PAIRS_REPO} whose responses are rated in {RATINGS_REPO}, got none")
        rows = [ATTRIBUTES.index(name) for name in self.types]
        sides = [np.array([rating[text[0], text[side]] for text in texts])[:, rows] for side in (1, 2)]
        opinion = opinions(*sides)
        kept = np.flatnonzero(conflict(opinion))
        dropped["no_conflict"] = len(opinion) - len(kept)
        pairs = [text for text, keep in zip(texts, conflict(opinion).tolist(), strict=True) if keep]
        part = parts([prompt for prompt, _, _ in pairs], opinion[kept], self.survey_size, self.seed)
        return TypedPool(self.types, *number_texts(pairs), opinion[kept], part, dropped)
