"""Backbones that hand out tokens instead of features, and texts as batches of tokens.

Axes: B texts, T tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from plm.backbones.backbone import Backbone, Key, plain_text
from plm.messages import to_text
from plm.types import Tokens


class Completion(NamedTuple):
    """Token ids of a response and of the prompt before it."""

    prompt: list[int]
    response: list[int]


class TooLong(ValueError):
    """A prompt that leaves no room for a response.

    Args:
        prompt: The prompt.
        message: What is wrong with it.
    """

    def __init__(self, prompt: str, message: str) -> None:
        super().__init__(message)
        self.prompt = prompt


class TokenBackbone(Backbone):
    """A backbone with which the data hand out tokens, for methods that know what to do with them."""

    view: ClassVar[Literal["features", "tokens", "latents"]] = "tokens"

    @abstractmethod
    def prompt_tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt alone, at least one.

        Raises:
            ValueError: If it leaves no room for a response, or has no token to start from.
        """

    @abstractmethod
    def cut_completion(self, prompt: str, response: str) -> tuple[Completion, int]:
        """Token ids of a prompt and of the response to it, and how many tokens of the response were cut off.

        Raises:
            ValueError: If the prompt leaves no room, or the response has no tokens.
        """

    def completion(self, prompt: str, response: str) -> Completion:
        """Token ids of a prompt and of the response to it, see `cut_completion`."""
        return self.cut_completion(prompt, response)[0]

    def represent(self, prompts: Sequence[str], responses: Sequence[str]) -> Tokens:
        """Tokens ``(B, T)`` of B responses to B prompts."""
        return completion_tokens([self.completion(*pair) for pair in zip(prompts, responses, strict=True)])

    def represent_prompts(self, prompts: Sequence[str]) -> Tokens:
        """Tokens ``(B, T)`` of B prompts alone, as they stand before their responses."""
        return completion_tokens([Completion(self.prompt_tokens(prompt), []) for prompt in prompts])

    def prepare(self, texts: Iterable[str]) -> None:
        """Get ready for the texts to train on, before any is tokenised."""


class PlainText(TokenBackbone):
    """Texts as they are: a token is a byte of their UTF-8, and no model is there to read it.

    For methods that ask a language model elsewhere, such as `plm.methods.persona_judge.PersonaJudge`.
    """

    @property
    def feature_dim(self) -> int:
        """Nothing has features: 1."""
        return 1

    def key(self) -> Key:
        """Identity of what is cached with it."""
        return {"tokens": "utf-8"}

    def render(self, prompt: str, response: str) -> str:
        """Prompt and response, messages of a chat headed by their roles."""
        return plain_text(prompt, response)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Refuse.

        Raises:
            ValueError: Always, for bytes are no features.
        """
        raise ValueError("expected a backbone that gives features of texts, got plm.backbones.PlainText")

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Bytes of a prompt, none of an empty one."""
        return list(to_text(prompt).encode())

    def cut_completion(self, prompt: str, response: str) -> tuple[Completion, int]:
        """Bytes of prompt and response, of which none is cut off.

        Raises:
            ValueError: If the response is empty.
        """
        if not response:
            raise ValueError("expected a response of at least one character, got ''")
        return Completion(self.prompt_tokens(prompt), self.prompt_tokens(response)), 0

    @staticmethod
    def texts(tokens: Tokens) -> list[tuple[str, str]]:
        """The prompt and the response of each of B texts ``(B, T)``."""
        ids, attended = tokens.input_ids.to("cpu", torch.uint8).numpy(), tokens.attention_mask.cpu().numpy()
        completion = tokens.completion_mask.cpu().numpy()

        def text(row: int, mask: object) -> str:
            return bytes(ids[row][mask]).decode(errors="replace")

        return [
            (text(row, attended[row] & ~completion[row]), text(row, completion[row])) for row in range(tokens.num_rows)
        ]


def completion_tokens(rows: Sequence[Completion], *, left: bool = False) -> Tokens:
    """Token ids of B texts as one padded batch.

    Args:
        rows: Prompt and response of each text.
        left: Whether padding stands before the text, as for writing.
    """
    start = torch.tensor([len(prompt) for prompt, _ in rows], dtype=torch.long)[:, None]
    length = start + torch.tensor([len(response) for _, response in rows], dtype=torch.long)[:, None]
    column = torch.arange(int(length.max()) if rows else 0)[None, :]
    if left:
        column = column - (column.shape[1] - length)
    attended = (column >= 0) & (column < length)
    ids = torch.zeros(attended.shape, dtype=torch.long)
    ids[attended] = torch.tensor(
        [token for prompt, response in rows for token in (*prompt, *response)], dtype=torch.long
    )
    return Tokens(ids, attended, attended & (column >= start))


def batches_by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Places of texts of similar length, batch by batch, the longest first.

    Args:
        lengths: Tokens of each text, at least one.
        most: Most tokens of a batch, padding included; a text that has more is alone.

    >>> list(batches_by_length([2, 4, 3, 1], 6))
    [[1], [2, 0], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
    start = 0
    while start < len(order):
        batch = order[start : start + max(1, most // lengths[order[start]])]
        yield batch
        start += len(batch)
