"""Features from a server: an encoder behind OpenAI's ``/v1/embeddings`` in the place of one in this process.

That a server runs the model of the same name says little: pooling, normalisation, precision and where long texts are
cut are its own settings. So features are compared before they are used.

Axes: N texts, D feature width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plm.backbones.backbone import Backbone, Key
from plm.backbones.huggingface import HFBackbone
from plm.backbones.remote import PATIENT, Patience, RemoteError, ask
from plm.messages import to_text

KEY_VARIABLE = "PLM_ENCODER_KEY"
"""Environment variable with the key of the server, if it wants one."""
LEAST_COSINE = 0.9999
"""Between a golden text's features here and there."""
LENGTH_TOLERANCE = 0.01
"""Share by which the lengths of these features may differ: no cosine sees a missing normalisation."""
MOST_TEXTS = 32
"""Texts of one request: what servers take by default."""
MOST_CUT = 4096
"""Tokens of an encoder up to which a golden text is longer than it reads."""
GOLDEN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What should I drink?", ("Strong tea with milk.", "Black coffee, no sugar.", "Water – 水 – is enough.")),
    ("", ("A text without a prompt.",)),
    (
        '[{"role":"user","content":"Plan my evening."},{"role":"assistant","content":"With whom?"}]',
        ("Alone: a walk by the sea.", "With friends: films, and much to eat."),
    ),
)
"""Prompts and responses that checks are made with."""
log = logging.getLogger("plm.encoder")


class EncoderError(Exception):
    """The server of an encoder gives no features.

    Args:
        status: What clients are told: 503 if it may be there later, 502 if its answer is of no use.
        message: What it did.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Agreement(NamedTuple):
    """How near a server's features of golden texts are to those of the backbone here."""

    num_texts: int
    cosine: float
    """The least."""
    shortest: float
    """Least length of a feature there, divided by that here."""
    longest: float


class RemoteEncoder(Backbone):
    """A backbone whose features a server makes; prompts and responses become texts, and long ones are cut, as before.

    Args:
        local: The backbone whose features they are, and with which those of golden texts are compared.
        feature_dim: Width D of its features.
        url: Where the server's paths begin, such as ``http://localhost:8000/v1``.
        model: Name of the model there.
        is_unchecked: Whether features are used that nobody has compared.
        patience: How long the server is waited for.
        concurrency: Requests under way at once.
        quotes: Whether errors repeat texts, and what the server says, which may repeat them; a log must not.
    """

    def __init__(
        self,
        local: Backbone,
        feature_dim: int,
        url: str,
        model: str,
        is_unchecked: bool = False,
        patience: Patience = PATIENT,
        concurrency: int = 1,
        quotes: bool = False,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--encoder_url: expected an address such as http://localhost:8000/v1, got {url!r}")
        self.local, self.width, self.url, self.model = local, feature_dim, url.rstrip("/"), model
        self.is_unchecked, self.patience, self.concurrency, self.quotes = is_unchecked, patience, concurrency, quotes

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return self.width

    def key(self) -> Key:
        """Who encodes, wherever it is served."""
        return {"engine": "openai", "model": self.model}

    def render(self, prompt: str, response: str) -> str:
        """The text that the backbone here would read."""
        return self.local.render(prompt, response)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Features ``(N, D)`` of N rendered texts.

        Raises:
            ValueError: If the server refuses a text.
            EncoderError: If it does not answer, or with something else than N rows of D finite numbers.
        """
        sent = self._cut(texts)
        parts = [sent[start : start + MOST_TEXTS] for start in range(0, len(sent), MOST_TEXTS)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            rows = list(chain.from_iterable(pool.map(self._ask, parts)))
        return torch.tensor(rows, dtype=torch.float32).reshape(len(sent), self.width)

    def _cut(self, texts: Sequence[str]) -> list[str]:
        """What the encoder reads of each text; all of it where its tokenizer is not here to tell."""
        if not isinstance(self.local, HFBackbone):
            return list(texts)
        try:
            tokenizer, most = self.local.tokenizer, self.local.max_tokens
        except ValueError:
            return list(texts)
        special = self.local.template != "chat"
        found = tokenizer(
            [to_text(text) for text in texts],
            add_special_tokens=special,
            truncation=True,
            max_length=most,
            return_offsets_mapping=True,
        )
        starts = [next((start for start, end in row if end > start), 0) for row in found["offset_mapping"]]
        is_full = [len(ids) == most for ids in found["input_ids"]]
        return [text[start * full :] for text, start, full in zip(texts, starts, is_full, strict=True)]

    def _ask(self, texts: list[str]) -> list[list[float]]:
        """Features of as many texts as the server takes at once."""
        body = {"model": self.model, "input": texts, "encoding_format": "float"}
        url = f"{self.url}/embeddings"
        try:
            answer = ask(url, body, KEY_VARIABLE, self.patience)
        except RemoteError as error:  # its words may repeat a text
            words = f" ({error})" if self.quotes else ""
            if not self.quotes:
                log.warning("the encoder at %s failed: %s", url, error.status or "no answer")
            if error.status in (400, 413, 422):
                longest = f", the longest of {len(texts)}: {max(texts, key=len)!r:.80}" if self.quotes else ""
                raise ValueError(
                    f"the encoder refuses a text with status {error.status}; it may be too long{longest}{words}"
                ) from None
            if error.is_passing:
                raise EncoderError(503, f"the encoder does not answer now; try again{words}") from None
            what = f"with status {error.status}" if error.status else "without a JSON object"
            raise EncoderError(502, f"the encoder answers {what}{words}") from None
        return self._rows(answer, len(texts))

    def _rows(self, answer: dict[str, Any], num_texts: int) -> list[list[float]]:
        """The rows of an answer in the order of the texts."""
        data = answer.get("data")
        try:
            rows = {entry["index"]: [float(value) for value in entry["embedding"]] for entry in data or ()}
        except (TypeError, KeyError, ValueError):
            raise EncoderError(502, "the encoder gives no embeddings as lists of numbers") from None
        if not isinstance(data, list) or len(data) != num_texts or set(rows) != set(range(num_texts)):
            raise EncoderError(502, f"expected {num_texts} embeddings from the encoder, each once, got {len(rows)}")
        if widths := {len(row) for row in rows.values()} - {self.width}:
            raise EncoderError(502, f"expected embeddings of {self.width} numbers, as here, got {min(widths)}")
        if not all(math.isfinite(value) for row in rows.values() for value in row):
            raise EncoderError(502, "the encoder gives numbers that are not finite")
        return [rows[index] for index in range(num_texts)]

    @cached_property
    def agreement(self) -> Agreement | None:
        """How near the server's features are to those here, of golden texts, one of them longer than the encoder reads.

        None where nobody compares: then the server has answered.

        Raises:
            ValueError: If the backbone here cannot be loaded, or they differ.
            EncoderError: If the server fails.
        """
        if self.is_unchecked:
            self.encode(["a text"])
            return None
        local = self.local
        try:
            texts = [local.render(prompt, response) for prompt, responses in GOLDEN for response in responses]
            names = [repr(text) for text in texts]
            if isinstance(local, HFBackbone) and local.max_tokens <= MOST_CUT:
                texts.append(local.render("", " ".join(f"{number} cups of tea" for number in range(local.max_tokens))))
                names.append("one that is longer than the encoder reads here")
            here = local.encode(texts).double()
        except ValueError as error:
            raise ValueError(
                f"--encoder_url: the encoder cannot be loaded here ({error}), so nobody knows whether {self.model!r} "
                "gives its features; start once where it can be loaded, and if they agree there, go on here with "
                "--encoder_unchecked"
            ) from error
        local.release()
        there = self.encode(texts).double()
        cosines = torch.nn.functional.cosine_similarity(here, there)
        ratio = there.norm(dim=1) / here.norm(dim=1)
        found = Agreement(len(texts), float(cosines.min()), float(ratio.min()), float(ratio.max()))
        is_long = found.shortest >= 1 - LENGTH_TOLERANCE and found.longest <= 1 + LENGTH_TOLERANCE
        if not (found.cosine >= LEAST_COSINE and is_long):
            raise ValueError(
                f"--encoder_url: expected the features of the encoder here, cosines of at least {LEAST_COSINE} and "
                f"lengths within {LENGTH_TOLERANCE:.0%}, got from {self.model!r} for {len(texts)} texts cosines down "
                f"to {found.cosine:.6f}, the least for {names[int(cosines.argmin())]}, and {found.shortest:.4g} to "
                f"{found.longest:.4g} times the length; its model, pooling, normalisation, precision or longest text "
                "differ"
            )
        return found
