"""Features from a server: an encoder behind OpenAI's ``/v1/embeddings`` in the place of the one in this process.

That a server runs the model of the same name says little: pooling, normalisation, precision and where long texts are
cut are its own settings. So features are compared before anybody is served.

Axes: N texts, D feature width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plm.backbones import Backbone, HFBackbone, Key, RemoteError, ask
from plm.method import PersonalizationMethod

KEY_VARIABLE = "PLM_ENCODER_KEY"
"""Environment variable with the key of the server, if it wants one."""
LEAST_COSINE = 0.9999
"""Between a golden text's features here and there."""
LENGTH_TOLERANCE = 0.01
"""Share by which the lengths of these features may differ: no cosine sees a missing normalisation."""
MOST_TEXTS = 32
"""Texts of one request: what servers take by default."""
TIMEOUT = 10.0
RETRIES = 2
LONGEST_WAIT = 5.0  # seconds
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
log = logging.getLogger("plm.serving")


class EncoderError(Exception):
    """The server of an encoder gives no features.

    Args:
        status: What clients are told: 503 if it may be there later, 502 if its answer is of no use.
        message: What it did.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RemoteEncoder(Backbone):
    """A backbone whose features a server makes; prompts and responses become texts, and long ones are cut, as before.

    Args:
        local: The backbone of the checkpoint, whose weights are not loaded.
        feature_dim: Width D that the method reads.
        url: Where the server's paths begin, such as ``http://localhost:8000/v1``.
        model: Name of the model there.
    """

    def __init__(self, local: Backbone, feature_dim: int, url: str, model: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--encoder_url: expected an address such as http://localhost:8000/v1, got {url!r}")
        self.local, self.width, self.url, self.model = local, feature_dim, url.rstrip("/"), model

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return self.width

    def key(self) -> Key:
        """Who encodes, wherever it is served."""
        return {"engine": "openai", "model": self.model}

    def render(self, prompt: str, response: str) -> str:
        """The text that the checkpoint's own backbone would read."""
        return self.local.render(prompt, response)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Features ``(N, D)`` of N rendered texts.

        Raises:
            ValueError: If the server refuses a text.
            EncoderError: If it does not answer, or with something else than N rows of D finite numbers.
        """
        sent = self._cut(texts)
        rows = [row for start in range(0, len(sent), MOST_TEXTS) for row in self._ask(sent[start : start + MOST_TEXTS])]
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
            list(texts), add_special_tokens=special, truncation=True, max_length=most, return_offsets_mapping=True
        )
        starts = [next((start for start, end in row if end > start), 0) for row in found["offset_mapping"]]
        is_full = [len(ids) == most for ids in found["input_ids"]]
        return [text[start * full :] for text, start, full in zip(texts, starts, is_full, strict=True)]

    def _ask(self, texts: list[str]) -> list[list[float]]:
        """Features of as many texts as the server takes at once."""
        body = {"model": self.model, "input": texts, "encoding_format": "float"}
        url = f"{self.url}/embeddings"
        try:
            answer = ask(url, body, KEY_VARIABLE, retries=RETRIES, timeout=TIMEOUT, longest_wait=LONGEST_WAIT)
        except RemoteError as error:  # its words may repeat a text
            log.warning("the encoder at %s failed: %s", url, error.status or "no answer")
            if error.status in (400, 413, 422):
                raise ValueError(f"the encoder refuses a text with status {error.status}; it may be too long") from None
            if error.is_passing:
                raise EncoderError(503, "the encoder does not answer now; try again") from None
            raise EncoderError(502, f"the encoder answers with status {error.status}") from None
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
            message = f"expected embeddings of {self.width} numbers, which the checkpoint reads, got {min(widths)}"
            raise EncoderError(502, message)
        if not all(math.isfinite(value) for row in rows.values() for value in row):
            raise EncoderError(502, "the encoder gives numbers that are not finite")
        return [rows[index] for index in range(num_texts)]


class EncoderServer(NamedTuple):
    """Where features come from."""

    url: str
    model: str
    is_unchecked: bool = False
    """Whether features are used that nobody has compared."""

    def attach(self, method: PersonalizationMethod) -> None:
        """Let a loaded method read features of this server, after a comparison with its own encoder.

        Raises:
            ValueError: If it reads no features, its own encoder cannot be loaded to compare, or they differ.
        """
        local = method.text_encoder.backbone
        if local.view != "features":
            raise ValueError(
                f"--encoder_url: expected a checkpoint that reads features of texts, got one of "
                f"{type(method).__name__} that reads the {local.view} of a language model of its own"
            )
        encoder = RemoteEncoder(local, method.feature_dim, self.url, self.model)
        try:
            if self.is_unchecked:
                log.warning("nobody has compared %s at %s with the checkpoint's encoder", self.model, self.url)
                encoder.encode(["a text"])
            else:
                self._compare(encoder)
        except EncoderError as error:
            raise ValueError(f"--encoder_url: {error}") from error
        method.text_encoder.backbone = encoder

    def _compare(self, encoder: RemoteEncoder) -> None:
        """Encode the golden texts here and there, one of them longer than the encoder reads."""
        local = encoder.local
        try:
            texts = [local.render(prompt, response) for prompt, responses in GOLDEN for response in responses]
            num_short = len(texts)
            if isinstance(local, HFBackbone) and local.max_tokens <= MOST_CUT:
                texts.append(local.render("", " ".join(f"{number} cups of tea" for number in range(local.max_tokens))))
            here = local.encode(texts).double()
        except ValueError as error:
            raise ValueError(
                f"--encoder_url: the checkpoint's encoder cannot be loaded here ({error}), so nobody knows whether "
                f"{self.model!r} gives its features; start once where it can be loaded, and if they agree there, "
                "serve here with --encoder_unchecked"
            ) from error
        local.release()
        there = encoder.encode(texts).double()
        cosines = torch.nn.functional.cosine_similarity(here, there)
        ratio = there.norm(dim=1) / here.norm(dim=1)
        cosine, low, high = float(cosines.min()), float(ratio.min()), float(ratio.max())
        if not (cosine >= LEAST_COSINE and low >= 1 - LENGTH_TOLERANCE and high <= 1 + LENGTH_TOLERANCE):
            where = "one that is longer than the encoder reads here" if cosines.argmin() >= num_short else "a short one"
            raise ValueError(
                f"--encoder_url: expected the features of the checkpoint's encoder, cosines of at least {LEAST_COSINE} "
                f"and lengths within {LENGTH_TOLERANCE:.0%}, got from {self.model!r} for {len(texts)} texts cosines "
                f"down to {cosine:.6f}, the least for {where}, and {low:.4g} to {high:.4g} times the length; its "
                "model, pooling, normalisation, precision or longest text differ"
            )
        log.info("%s at %s gives the checkpoint's features: cosines from %.6f", self.model, self.url, cosine)
