"""Film reviews as running text, to train a language model on.

Corpus: Large Movie Review Dataset, Maas et al. 2011 (research use with citation), as ``train.parquet`` and
``test.parquet`` with the columns text and label (pos or neg).

Every review belongs to one part, by a hash of its text: ``text`` trains language models, ``prompts`` asks them, and the
classifiers of `plm.data.rewards` learn from ``reward`` and ``judge``. What trains a policy never trains its reward, nor
the judge of that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from plm.arrays import IntArray
from plm.data.keys import digest, mix, seed_key
from plm.data.schema import PairTable, pair_table
from plm.data.sources import PairSource
from plm.data.sources.corpus import corpus_rows, local_files
from plm.data.values import EVERYONE
from plm.messages import Problems

Part = Literal["text", "prompts", "reward", "judge"]
Half = Literal["train", "test"]
SHARES: dict[Part, float] = {"text": 0.5, "prompts": 0.1, "reward": 0.2, "judge": 0.2}
"""Of all reviews."""
_BETWEEN_SENTENCES = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')]))\s+(?=["'(]?[A-Z])""")


class Review(NamedTuple):
    """One review."""

    text: str
    """Its words, one space between them."""
    positive: bool
    """Whether its author liked the film."""


def read_reviews(path: str, half: Half, part: Part) -> list[Review]:
    """Reviews of one file and one part, in the order of a hash of their text.

    Args:
        path: Folder with ``train.parquet`` and ``test.parquet``; a relative one is also looked up under PLM_DATA.
        half: Which file.
        part: Which reviews of it.

    Raises:
        ValueError: If there is no such file or column.
    """
    rows = corpus_rows(local_files(os.path.join(path, f"{half}.parquet")), {"text": "text", "label": "label"})
    label_of = {text: row["label"] == "pos" for row in rows if (text := " ".join(row["text"].split()))}
    texts = list(label_of)
    key = mix(digest(texts), seed_key(0))
    place = key.astype(np.float64) / 2.0**64
    start = sum(share for name, share in SHARES.items() if list(SHARES).index(name) < list(SHARES).index(part))
    kept = np.flatnonzero((place >= start) & (place < start + SHARES[part]))
    return [Review(texts[row], label_of[texts[row]]) for row in kept[np.argsort(key[kept], kind="stable")].tolist()]


class ReviewPairs(PairSource):
    """Running text of film reviews as pairs of one user: how a passage truly goes on, against how another one does.

    A review is cut into passages of one to ``max_sentences`` sentences, drawn by a hash of its text, so that a model
    trained on them ends its responses after any of a few sentences. The first words of a passage are the prompt. The
    other response of a pair belongs to a passage of as many words, or nearly. The files' own halves are the training
    and the test rows, and validation keeps whole reviews apart.

    Args:
        path: Folder with ``train.parquet`` and ``test.parquet``; a relative one is also looked up under PLM_DATA.
        part: ``text`` to train a language model on, ``prompts`` for its prompts.
        prompt_words: Words of a passage that are the prompt.
        response_words: Most words after them; sentences that do not fit are left to the next passage.
        max_sentences: Most sentences of a passage.
        num_train: Most passages to train on; null = all.
        num_test: Most passages to test on; null = all.
    """

    def __init__(
        self,
        path: str,
        part: Literal["text", "prompts"] = "text",
        prompt_words: int = 8,
        response_words: int = 72,
        max_sentences: int = 4,
        num_train: int | None = None,
        num_test: int | None = 1000,
    ) -> None:
        self.path, self.part = path, part
        self.prompt_words, self.response_words = prompt_words, response_words
        self.max_sentences, self.num_train, self.num_test = max_sentences, num_train, num_test
        problems = Problems("ReviewPairs.")
        problems.at_least(1, prompt_words=prompt_words, response_words=response_words, max_sentences=max_sentences)
        problems.at_least(2, num_train=num_train, num_test=num_test)
        problems.choices(part=(part, ("text", "prompts")))
        problems.check()

    @property
    def name(self) -> str:
        """Folder of the files and part."""
        return f"{self.part} of {os.path.basename(os.path.normpath(self.path))}"

    def load(self) -> PairTable:
        """Read both files.

        Raises:
            ValueError: If a file has fewer than two passages.
        """
        prompts: dict[str, int] = {}
        responses: dict[str, int] = {}
        dropped = {"repeated": 0}
        num_reviews = 0
        columns: list[IntArray] = []
        halves: list[tuple[Half, int | None, int]] = [("train", self.num_train, 0), ("test", self.num_test, 2)]
        for half, limit, split in halves:
            rows: list[list[int]] = []  # prompt, response, review, words of the response
            for review in read_reviews(self.path, half, self.part):
                num_reviews += 1
                for opening, rest in self._passages(review.text):
                    if opening in prompts or rest in responses:
                        dropped["repeated"] += 1
                        continue
                    prompts[opening], responses[rest] = len(prompts), len(responses)
                    rows.append([len(prompts) - 1, len(responses) - 1, num_reviews - 1, rest.count(" ")])
                if limit is not None and len(rows) >= limit:
                    break
            if len(rows) < 2:
                raise ValueError(
                    f"expected two or more passages to {half} on in {self.path!r}, got {len(rows)}; raise "
                    "response_words or lower prompt_words"
                )
            prompt, chosen, review_of, words = np.array(rows[:limit], dtype=np.int64).T
            by_length = np.argsort(words, kind="stable")
            neighbour = np.arange(len(words)) ^ 1
            neighbour[-1] = min(neighbour[-1], len(words) - 2)
            rejected = np.empty_like(chosen)
            rejected[by_length] = chosen[by_length[neighbour]]
            columns.append(np.stack([prompt, chosen, rejected, review_of, np.full(len(words), split)]))
        prompt, chosen, rejected, review_of, row_split = np.concatenate(columns, axis=1)
        return pair_table(
            [EVERYONE],
            list(prompts),
            list(responses),
            user=np.zeros(len(prompt), dtype=np.int64),
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            dialogues=[f"review {number}" for number in range(num_reviews)],
            dialogue=review_of,
            row_split=row_split,
            user_split=np.zeros(len(prompt), dtype=np.int64),
            dropped=dropped,
        )

    def _passages(self, text: str) -> Iterator[tuple[str, str]]:
        """First words and rest of every passage; the rest keeps the space before it, as running text does."""
        most = self.prompt_words + self.response_words
        for words in passages(text, self.max_sentences, most):
            if self.prompt_words < len(words) <= most:
                yield " ".join(words[: self.prompt_words]), " ".join(["", *words[self.prompt_words :]])


def passages(text: str, max_sentences: int, max_words: int) -> list[list[str]]:
    """Words of the passages of a text: one to ``max_sentences`` sentences each, drawn by a hash of the text.

    A passage ends before a sentence that would take it beyond ``max_words``; only a sentence alone can be longer.

    Example:
        >>> passages("Good film. See it! Twice.", 1, 80)
        [['Good', 'film.'], ['See', 'it!'], ['Twice.']]
    """
    rng = np.random.default_rng(int(digest([text])[0]))
    found: list[list[str]] = []
    sentences = [sentence.split() for sentence in _BETWEEN_SENTENCES.split(text)]
    while sentences:
        passage = sentences.pop(0)
        for _ in range(int(rng.integers(max_sentences))):
            if not sentences or len(passage) + len(sentences[0]) > max_words:
                break
            passage = passage + sentences.pop(0)
        found.append(passage)
    return found
