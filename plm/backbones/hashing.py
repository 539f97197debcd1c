"""Features without a model: hashed words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from plm.backbones.backbone import Backbone, Key, choose, plain_text


class HashingBackbone(Backbone):
    """Counts of hashed words: needs no download and no learning, for quick starts and tests.

    Args:
        dim: Width of the features; words that share a bucket share a feature.
        ngrams: Longest run of words that counts as one; 2 adds neighbouring pairs of words.
        norm: Length every feature vector is scaled to.
        include_prompt: Whether the words of the prompt count too.
    """

    def __init__(
        self, dim: int = 512, ngrams: int = 1, norm: Literal["l2", "l1", "none"] = "l2", include_prompt: bool = False
    ) -> None:
        if dim < 1 or ngrams < 1:
            raise ValueError(f"HashingBackbone expects dim >= 1 and ngrams >= 1, got dim={dim!r}, ngrams={ngrams!r}")
        choose("norm", norm, ("l2", "l1", "none"))
        self.dim = dim
        self.ngrams = ngrams
        self.norm = norm
        self.include_prompt = include_prompt

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return self.dim

    def key(self) -> Key:
        """Identity of the cache."""
        return {"engine": "sklearn.HashingVectorizer", "dim": self.dim, "ngrams": self.ngrams, "norm": self.norm}

    def render(self, prompt: str, response: str) -> str:
        """The response, after its prompt if asked for."""
        return plain_text(prompt, response) if self.include_prompt else response

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Signed counts ``(N, D)`` of the words of each text, scaled to ``norm``."""
        from sklearn import config_context
        from sklearn.feature_extraction.text import HashingVectorizer

        vectorizer = HashingVectorizer(
            n_features=self.dim,
            ngram_range=(1, self.ngrams),
            norm=None if self.norm == "none" else self.norm,
            dtype="float32",
        )
        with config_context(assume_finite=True, skip_parameter_validation=True):  # a third of the time of a few texts
            return torch.from_numpy(vectorizer.transform(texts).toarray())
