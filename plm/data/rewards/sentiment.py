"""A sentiment classifier as a reward, and another one, trained on other reviews, as its judge.

A policy that climbs a learned reward also climbs its mistakes. The judge makes mistakes of its own: a gain that both
see is better text, a gain that only the reward sees is its exploitation.

Axes: N responses, F words and word pairs of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from plm.arrays import Float64Array
from plm.atomic import whole_file
from plm.data.rewards.reward import Reward
from plm.data.sources.reviews import Review, read_reviews

VERSION = 1
"""Of the training below: another one gives other files."""
MAX_FEATURES = 60_000
INVERSE_RIDGE = 3.0


class SentimentModel(NamedTuple):
    """A linear classifier of tf-idf vectors."""

    vocabulary: list[str]
    """F words and pairs of words."""
    idf: Float64Array
    """``(F,)``."""
    coefficients: Float64Array
    """``(F,)``."""
    intercept: float


class Sentiment(Reward):
    """Log-odds that the author of a response liked the film, by words and pairs of words (tf-idf, logistic regression).

    It is trained when it is first needed, on windows of labelled reviews, and kept under ``cache_dir``. Reviews of one
    part are in no other, and none of either are among the texts of `plm.data.sources.reviews.ReviewPairs`.

    Args:
        path: Folder of the reviews, see `ReviewPairs`.
        part: ``reward`` to please, ``judge`` to check.
        window: Words of the windows it is trained on, about as long as the responses it will read.
        cache_dir: Folder of the cache.
    """

    def __init__(
        self,
        path: str,
        part: Literal["reward", "judge"] = "reward",
        window: int = 48,
        cache_dir: str = "~/.cache/plm",
    ) -> None:
        if part not in ("reward", "judge"):
            raise ValueError(f"Sentiment.part: expected reward or judge, got {part!r}")
        if window < 1:
            raise ValueError(f"Sentiment.window: expected a number of words, got {window!r}")
        self.path, self.part, self.window, self.cache_dir = path, part, window, cache_dir

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float64Array:
        """Log-odds ``(N,)``; the prompt is not read."""
        model = self.classifier
        vectors = self._vectorizer.transform(responses)
        scores: Float64Array = np.asarray(vectors @ model.coefficients) + model.intercept
        return scores

    @cached_property
    def classifier(self) -> SentimentModel:
        """The trained classifier, from the cache where it is there."""
        reviews = [review for half in ("train", "test") for review in read_reviews(self.path, half, self.part)]
        file = Path(self.cache_dir).expanduser() / "rewards" / f"sentiment-{self._key(reviews)}.npz"
        if not file.is_file():
            classifier = _train(reviews, self.window)
            with whole_file(file) as whole:
                _save(classifier, whole)
        return _load(file)

    def _key(self, reviews: Sequence[Review]) -> str:
        """Hash of the reviews and of how they are used."""
        digest = hashlib.sha256(f"{VERSION} {self.window} {MAX_FEATURES} {INVERSE_RIDGE}".encode())
        for text, positive in reviews:
            digest.update(f"\0{int(positive)}{text}".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def _vectorizer(self) -> Any:
        vectorizer = _tfidf(vocabulary=self.classifier.vocabulary)
        vectorizer.idf_ = self.classifier.idf
        return vectorizer


def windows(text: str, size: int) -> list[str]:
    """A text in pieces of ``size`` words; what remains belongs to the last.

    Example:
        >>> windows("a b c d e", 2)
        ['a b', 'c d e']
    """
    words = text.split()
    starts = list(range(0, max(len(words) - size, 0) + 1, size)) or [0]
    return [" ".join(words[start : start + size if start != starts[-1] else None]) for start in starts]


def _tfidf(**options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w[\w']*\b", dtype=np.float64, **options
    )


def _train(reviews: Sequence[Review], window: int) -> SentimentModel:
    """Fit on all windows; a review counts as often as it has windows."""
    from sklearn.linear_model import LogisticRegression

    pieces = [(piece, positive) for text, positive in reviews for piece in windows(text, window)]
    if len({positive for _, positive in pieces}) < 2:
        raise ValueError(f"expected positive and negative reviews, got {len(reviews)} reviews of one kind or none")
    vectorizer = _tfidf(min_df=min(3, len(reviews)), max_features=MAX_FEATURES)
    vectors = vectorizer.fit_transform([piece for piece, _ in pieces])
    fitted = LogisticRegression(C=INVERSE_RIDGE, max_iter=200).fit(vectors, [positive for _, positive in pieces])
    return SentimentModel(
        list(vectorizer.get_feature_names_out()), vectorizer.idf_, fitted.coef_[0], float(fitted.intercept_[0])
    )


def _save(classifier: SentimentModel, file: IO[bytes]) -> None:
    words: npt.NDArray[np.uint8] = np.frombuffer("\n".join(classifier.vocabulary).encode(), dtype=np.uint8)
    np.savez(
        file,
        vocabulary=words,
        idf=classifier.idf,
        coefficients=classifier.coefficients,
        intercept=np.array(classifier.intercept),
    )


def _load(file: Path) -> SentimentModel:
    with np.load(file, allow_pickle=False) as arrays:
        return SentimentModel(
            arrays["vocabulary"].tobytes().decode().split("\n"),
            arrays["idf"],
            arrays["coefficients"],
            float(arrays["intercept"]),
        )
